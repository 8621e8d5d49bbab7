"""`cdm cas`: the classification accuracy score, a classifier trained on generated images and tested on real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.loggers import CSVLogger

from cdm_lightning.data.datamodule import ShardDataModule
from cdm_lightning.data.shards.manifest import Manifest
from cdm_lightning.evaluation.cas.classifier import Classifier
from cdm_lightning.evaluation.cas.plan import Plan, Recipe, make_plan, manifests
from cdm_lightning.evaluation.cas.report import KINDS, plot_classes, print_table, summarise
from cdm_lightning.evaluation.real_images import write_subset
from cdm_lightning.evaluation.report.report import write_cas
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import read_table, write_atomically
from cdm_lightning.sampling.draw import begin
from cdm_lightning.stages.loading import newest_checkpoint
from cdm_lightning.training.resume import Checkpoint

SUBSET_SEED = 0  # one choice of images for all trainings: their spread is the training's alone


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
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Classification accuracy score: train a classifier on generated images alone, test it on real ones.

    Beside it the control: the same training on as many real images of each class. Writes results.json and cas.png with
    top-1, top-5 and per-class accuracy of both, their ratio and its spread over the seeds. Stopped and called again
    with the same options, it goes on where it was; more seeds may be asked for later.

    Args:
        samples: Folder of generated images, as `cdm sample` leaves it; the largest resolution in it is used.
        out: Folder for results.json, cas.png and a run per training.
        shards: Root of the real images: the control is chosen from its train split, the test is its whole val split.
        recipe: How every classifier is trained.
        count: Generated images to train on; null for all. The original protocol takes as many as there are real ones.
        seeds: One training on generated and one on real images for each.
        devices: Processes to share each training.
        num_workers: Processes that read and decode, per training process.
        accelerator: cpu, gpu or auto.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {seeds} must be one number or more, each once")
    generated, real, validation = manifests(samples, shards)
    plan = make_plan(generated, real, validation, count, recipe, devices)
    classifier_of(plan, 0)  # refuses what it cannot be built with, before the folder is begun
    begin(out, plan)
    roots = {
        "generated": choose(samples, generated, plan, Path(out) / "generated"),
        "real": choose(shards, real, plan, Path(out) / "real"),
    }
    todo = [(kind, seed) for seed in seeds for kind in KINDS if not run_of(out, kind, seed, "result.json").is_file()]
    for number, (kind, seed) in enumerate(todo, 1):
        run = run_of(out, kind, seed)
        data = ShardDataModule(roots[kind], plan.batch_size, num_workers, seed=seed, val_root=shards)
        reports = train(plan, data, seed, run, accelerator, f"{kind} images, seed {seed} ({number} of {len(todo)})")
    if todo and not reports:
        return {}  # of several processes the first one goes on
    results = found(Path(out), plan, seeds, real.count, validation.count) | {"samples": generated.extra.get("samples")}
    plot_classes(results, Path(out) / "cas.png")
    results = write_cas(Path(out), results)
    print_table(results)
    print(results["conclusion"])
    return results


def found(out: Path, plan: Plan, seeds: Sequence[int], n_real: int, n_validation: int) -> dict[str, Any]:
    """The figures of all trainings together, and what they were trained and tested on."""
    figures = {
        kind: [read_table(run_of(out, kind, seed, "result.json"), "top1", "top5", "per_class") for seed in seeds]
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


def run_of(out: Path, kind: str, seed: int, *rest: str) -> Path:
    return Path(out, "runs", f"{kind}-{seed}", *rest)


def choose(root: Path, manifest: Manifest, plan: Plan, out: Path) -> Path:
    """The root to train on: `root` itself where all of its images are asked for, else a subset written to `out`."""
    if manifest.counts == plan.counts:
        return Path(root)
    write_subset(root, "train", plan.resolution, plan.counts, out, SUBSET_SEED)
    return out


def classifier_of(plan: Plan, seed: int) -> Classifier:
    """An untrained classifier, its weights a function of the seed."""
    L.seed_everything(seed, verbose=False)
    model = {name: value for name, value in plan.recipe().items() if name not in ("steps", "batch_size", "precision")}
    return Classifier(plan.resolution, plan.channels, len(plan.classes), seed=seed, **model)


def train(plan: Plan, data: ShardDataModule, seed: int, run: Path, accelerator: str, title: str) -> bool:
    """Fit one classifier, test it, and leave its figures in run/result.json; whether this is the process to report."""
    classifier = classifier_of(plan, seed)
    saver = Checkpoint(run / "checkpoints", every_n_train_steps=max(1, plan.steps // 20))
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=plan.devices,
        strategy="ddp" if plan.devices > 1 else "auto",
        precision=plan.precision,
        max_steps=plan.steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=CSVLogger(run, name="logs"),
        callbacks=[saver],
        use_distributed_sampler=False,  # the data module deals out the images itself
        enable_model_summary=False,
        default_root_dir=run,
    )
    if trainer.is_global_zero:
        print(f"training on {title}")
    trainer.fit(classifier, datamodule=data, ckpt_path=newest_checkpoint([run / "checkpoints"]), weights_only=True)
    # From the file: every process has gathered running statistics of its own, and those of the first one count.
    last = newest_checkpoint([run / "checkpoints"])
    [figures] = trainer.test(classifier, datamodule=data, ckpt_path=last, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        result = {
            "top1": round(figures["test/cas_top1"], 7),  # of a float32
            "top5": round(figures["test/cas_top5"], 7),
            "per_class": [round(value, 7) for value in classifier.per_class.tolist()],
            "steps": trainer.global_step,
            "seed": seed,
        }
        write_atomically(run / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return trainer.is_global_zero
