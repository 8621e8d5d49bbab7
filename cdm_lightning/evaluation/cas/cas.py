"""`cdm cas`: the classification accuracy score of a classifier trained on generated images and tested on real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from cdm_lightning.data.shards import Manifest
from cdm_lightning.evaluation.cas.protocol import Plan, Recipe, make_plan, read_manifests
from cdm_lightning.evaluation.cas.report import KINDS, plot_classes, print_table, summarise
from cdm_lightning.evaluation.real_images import write_subset
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import begin_folder, check_output_folder, read_table
from cdm_lightning.foundation.process_group import Accelerator

SUBSET_SEED = 0  # all trainings use the same images, so that their spread comes from training only


DEFAULT = Recipe()


def cas(
    samples: Path,
    out: Path,
    shards: Path = Path("data/fashion"),
    recipe: Recipe = DEFAULT,
    count: int | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006, read only
    devices: PositiveInt = 1,
    num_workers: NonNegativeInt = 0,
    accelerator: Accelerator = "auto",
) -> dict[str, Any]:
    """Classification accuracy score: train a classifier on generated images alone, test it on real ones.

    As a control, another classifier is trained on equally many real images of each class. Writes results.json and
    cas.png with the top-1, top-5 and per-class accuracy of both, their ratio, and its spread over the seeds. If it is
    stopped, the same command continues; seeds can be added later.

    Args:
        samples: Folder of generated images, written by `cdm sample`; its largest resolution is used.
        out: Folder for results.json, cas.png and the training runs.
        shards: Root of the real images: the control trains on images of the train split, and all classifiers are tested
            on the val split.
        recipe: How every classifier is trained.
        count: Number of generated images to train on; null for all. The original protocol takes as many as there are
            real ones.
        seeds: Seeds; each gives one training on generated and one on real images.
        devices: Number of processes of each training.
        num_workers: Processes that read and decode images, for each training process.
        accelerator: cpu, gpu or auto.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {seeds} must be one number or more, each once")
    check_output_folder(out)
    generated, real, validation = read_manifests(samples, shards)
    plan = make_plan(generated, real, validation, count, recipe, devices)
    from cdm_lightning.data import ShardDataModule
    from cdm_lightning.evaluation.cas.classifier import build_classifier, train
    from cdm_lightning.evaluation.report.evaluation_pages import write_cas
    from cdm_lightning.sampling.shared_work import make_trainer

    build_classifier(plan, 0)  # refuses a recipe that cannot be built, before the folder is begun
    make_trainer(devices, accelerator)  # and a device that is not there
    begin_folder(out, plan, begun=any(Path(out).glob("*/*")))
    roots = {
        "generated": training_root(samples, generated, plan, Path(out) / "generated"),
        "real": training_root(shards, real, plan, Path(out) / "real"),
    }
    todo = [(kind, seed) for seed in seeds for kind in KINDS if not run_path(out, kind, seed, "result.json").is_file()]
    for number, (kind, seed) in enumerate(todo, 1):
        run = run_path(out, kind, seed)
        data = ShardDataModule(roots[kind], plan.batch_size, num_workers, seed=seed, val_root=shards)
        reports = train(plan, data, seed, run, accelerator, f"{kind} images, seed {seed} ({number} of {len(todo)})")
    if todo and not reports:
        return {}  # with several processes, only the first one continues
    results = collect_results(Path(out), plan, seeds, real.count, validation.count) | {
        "samples": generated.extra.get("samples")
    }
    plot_classes(results, Path(out) / "cas.png")
    results = write_cas(Path(out), results)
    print_table(results)
    print(results["conclusion"])
    return results


def collect_results(out: Path, plan: Plan, seeds: Sequence[int], n_real: int, n_validation: int) -> dict[str, Any]:
    """The figures of all trainings, summarised, with what they were trained and tested on."""
    figures = {
        kind: [read_table(run_path(out, kind, seed, "result.json"), "top1", "top5", "per_class") for seed in seeds]
        for kind in KINDS
    }
    return summarise(figures, plan.classes, sum(plan.counts), n_real) | {
        "n_validation": n_validation,
        "epochs": plan.steps * plan.batch_size / sum(plan.counts),
        "seeds": list(seeds),
        "recipe": plan.recipe(),
        **{name: getattr(plan, name) for name in ("resolution", "counts", "classes", "devices")},
        "sha256": {"samples": plan.samples, "training": plan.training, "validation": plan.validation},
    }


def run_path(out: Path, kind: str, seed: int, *rest: str) -> Path:
    """The folder of one training, or a file in it."""
    return Path(out, "runs", f"{kind}-{seed}", *rest)


def training_root(root: Path, manifest: Manifest, plan: Plan, out: Path) -> Path:
    """The root to train on: `root` itself if all its images are used, else a subset written to `out`."""
    if manifest.counts == plan.counts:
        return Path(root)
    write_subset(root, "train", plan.resolution, plan.counts, out, SUBSET_SEED)
    return out
