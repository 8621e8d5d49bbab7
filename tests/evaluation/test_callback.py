"""CascadeFigures in `cdm test`: the numbers of `cdm sample` and `cdm evaluate`, whatever the number of processes."""

import json
from html import unescape

import lightning.pytorch as L
import pytest
import torch
from evaluations import CNN, CPU, prepare_evaluation
from small_models import smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data import ShardDataModule
from cdm_lightning.evaluation.callback import CascadeFigures
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.evaluation.references.cards import read_card, write_card
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.sampling.sample import sample

pytestmark = pytest.mark.filterwarnings("ignore")
SETTING = {"seed": 3, "levels": [4], "truncated": True, "sampling_steps": [3, 2]}
TWO = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"  # quicker, but not after CUDA has started


@pytest.fixture(scope="module")
def toy(few_real, tmp_path_factory):
    return prepare_evaluation(tmp_path_factory.mktemp("toy"), few_real)


@pytest.fixture(scope="module")
def expected(toy):
    """What `cdm sample` and `cdm evaluate` make of the same setting: 20 images in blocks of 10."""
    sample(toy.bundle, toy.root / "same", count=20, block_size=10, **SETTING, **CPU)
    return evaluate([toy.root / "same"], toy.cards, toy.root / "figures", batch_size=10, seed=4, **CPU)["figures"]


def run(toy, folder, module=None, batches=2, cards=None, **options):
    """What a test logs: `batches` batches of ten of the 200 validation images."""
    module = module or CascadeModule(toy.bundle, **SETTING)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        default_root_dir=folder, use_distributed_sampler=False, limit_test_batches=batches,
        callbacks=[CascadeFigures(cards or toy.cards, seed=4)], **quiet, **options,
    )  # fmt: skip
    return trainer.test(module, ShardDataModule(toy.real, batch_size=10, num_workers=0), verbose=False)[0]


def logged(figures, rel=1e-6):
    """The same figures under the names of a log."""
    values = {f"test/{f['key']}_{CNN}_{f['against']}": f["value"] for f in figures}
    first = {f"test/{f['key']}_{CNN}": f["value"] for f in figures if f["against"] == "val"}  # the first card
    return pytest.approx({**values, **first, "test/n": 20.0}, rel=rel)


def test_a_test_gives_the_figures_of_stored_samples(toy, expected, tmp_path):
    module = CascadeModule(toy.bundle, **SETTING)
    found = run(toy, tmp_path, module)
    assert found == logged(expected) and len(found) == 8 + 4 + 1 and found[f"test/fd_{CNN}"] > 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["figures"] == expected and results["seed"] == 4
    assert results["detector"]["name"] == CNN and [r["split"] for r in results["references"]] == ["val", "train"]
    page = unescape((tmp_path / "report.html").read_text())
    assert f"Fréchet distance ({CNN})" in page and "20 samples" in page and page.count("<img") >= 10
    assert not any("detector" in name for name in module.state_dict())


class Stored(CascadeModule):
    """Hands out stored samples by their index, so that the batch size takes no part."""

    def test_step(self, batch, batch_idx):
        return {"generated": self.images[batch[2]], "index": batch[2]}


def test_two_processes_measure_the_images_of_both(toy, expected, tmp_path):
    module = Stored(toy.bundle, **SETTING)
    module.images = torch.cat([image for image, _ in read_images(toy.root / "same", "train", 16, 50)])
    found = run(toy, tmp_path, module, strategy=TWO, devices=2)
    assert found == logged(expected, rel=1e-4) and found["test/n"] == 20


class Few(CascadeModule):
    """Makes half of every batch."""

    def test_step(self, batch, batch_idx):
        return super().test_step([part[:5] for part in batch], batch_idx)


class Silent(L.LightningModule):
    resolution, image_channels, num_classes = 16, 1, 10

    def test_step(self, batch, batch_idx):
        return None


def test_cards_without_a_split_are_logged_under_their_files_names(toy, tmp_path):
    cards = []
    for name, path in zip(("one", "two"), toy.cards, strict=True):
        cards.append(changed(path, tmp_path / f"{name}.safetensors", split=None))
    found = run(toy, tmp_path, cards=cards)
    assert {f"test/fd_{CNN}", f"test/fd_{CNN}_one", f"test/fd_{CNN}_two"} <= set(found) and len(found) == 8 + 4 + 1
    assert found[f"test/fd_{CNN}"] == found[f"test/fd_{CNN}_one"] != found[f"test/fd_{CNN}_two"]
    against = [figure["against"] for figure in json.loads((tmp_path / "results.json").read_text())["figures"]]
    assert against == ["one"] * 4 + ["two"] * 4


def test_a_cascade_without_classes_is_measured_against_images_of_ten(toy, tmp_path):
    write_bundle(tmp_path / "bundle", smallest_stages(num_classes=None), {"classes": read_card(toy.cards[0]).classes})
    found = run(toy, tmp_path, CascadeModule(tmp_path / "bundle", **SETTING))
    sample(tmp_path / "bundle", tmp_path / "same", count=20, block_size=10, **SETTING, **CPU)
    same = evaluate([tmp_path / "same"], toy.cards, tmp_path / "figures", batch_size=10, seed=4, **CPU)["figures"]
    assert found == logged(same)
    text = (tmp_path / "report.html").read_text()
    assert "image 9, generated" in text and "T-shirt" not in text


def changed(card, path, **changes):
    """The same card under another name, with other facts."""
    card = read_card(card)
    about = {name: getattr(card, name) for name in type(card).__dataclass_fields__}
    write_card(type(card)(**about | changes | {"path": path}))
    return path


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"resolution": 32}, "with resolution 32, which do not compare with resolution 16"),
        ({"classes": list("abcdefghij")}, "calls class 0 'a', and the images 'T-shirt'"),
        ({"crop": "adm"}, "with crop adm, which do not compare with crop area"),
        ({"filter": "box"}, "with filter box, which do not compare with filter hamming"),
    ],
)
def test_a_card_of_other_images_than_the_cascade_was_trained_on(toy, tmp_path, changes, sentence):
    stages = smallest_stages()
    stages[0].trained = {"crop": "area", "filter": "hamming", "classes": read_card(toy.cards[0]).classes}
    write_bundle(tmp_path / "bundle", stages, {})
    alike = {"crop": "area", "filter": "hamming"}
    card = changed(toy.cards[0], tmp_path / "other.safetensors", **alike | changes)
    with pytest.raises(InputError, match=sentence):
        run(toy, tmp_path / "run", CascadeModule(tmp_path / "bundle", **SETTING), cards=[card])
    assert not list(tmp_path.rglob("results.json"))
    sample(tmp_path / "bundle", tmp_path / "same", count=20, **SETTING, **CPU)  # the same sentence of stored samples
    if "resolution" not in changes:
        with pytest.raises(InputError, match=sentence):
            evaluate([tmp_path / "same"], [card], tmp_path / "figures", **CPU)


def test_what_is_refused_writes_nothing(toy, tmp_path):
    for options, sentence in (
        ({"module": Few(toy.bundle, **SETTING), "batches": 1}, "hold 5 of the 10 classes of .*, without class 5"),
        ({"module": Silent()}, "belongs to the test of a cascade: Silent is none"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(toy, tmp_path / "run", **options)
    assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("report.html"))
    with pytest.raises(InputError, match=r"references \[\] names no card"):
        CascadeFigures([])
