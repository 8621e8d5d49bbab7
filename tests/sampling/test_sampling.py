"""`cdm sample`: the same bits from one process and from two, resumable, and shards that training reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import hashes
from small_models import randomise_weights

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.shards import read_manifest, read_shard, write_images
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, to_uint8
from cdm_lightning.sampling.sample import sample


@pytest.fixture
def bundle(stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {"levels": [501, 0], "truncated": False, "classes": list("abcdefghij")})
    return tmp_path / "b"


def test_shards_hold_what_the_cascade_draws(bundle, tmp_path):
    sample(bundle, tmp_path / "s", count=10, classes=[7, 2], seed=4, block_size=4)
    cascade = CascadeModule(bundle=bundle, seed=4)
    for number, resolution in enumerate((8, 16, 32)):
        folder = tmp_path / "s" / "train" / str(resolution)
        manifest = read_manifest(folder)
        assert manifest.count == 10 and manifest.counts == [0, 0, 5, 0, 0, 0, 0, 5, 0, 0]
        assert [shard.count for shard in manifest.shards] == [4, 4, 2]
        samples = [s for shard in manifest.shards for s in read_shard(folder / shard.name)]
        assert [int(s["cls"]) for s in samples] == [7, 2] * 5
        assert [int(s["__key__"]) for s in samples] == list(range(10))
        expected = to_uint8(cascade.sample(torch.tensor([7, 2]), torch.arange(8, 10))[number])
        got = torch.from_numpy(decode_png(samples[8]["png"])).permute(2, 0, 1)
        assert torch.equal(got, expected[0])
    assert (tmp_path / "s" / "samples.png").stat().st_size > 1000


def test_few_images_cost_few_and_compiled_networks_see_one_size(bundle, tmp_path, monkeypatch):
    sizes = []
    real = CascadeModule.sample
    monkeypatch.setattr(CascadeModule, "sample", lambda c, *given: sizes.append(len(given[0])) or real(c, *given))
    sample(bundle, tmp_path / "three", count=3)
    assert sizes == [3] and json.loads((tmp_path / "three/manifest.json").read_text())["block_size"] == 3
    sample(bundle, tmp_path / "five", count=5, block_size=4)
    assert sizes[1:] == [4, 1]
    monkeypatch.setattr("cdm_lightning.network.unet.UNet.compile", lambda network, mode: None)
    sample(bundle, tmp_path / "compiled", count=5, block_size=4, compile="default")
    assert sizes[3:] == [4, 4]
    assert read_manifest(tmp_path / "compiled/train/32").count == 5


def test_a_folder_without_an_image_binds_nobody(bundle, tmp_path):
    out = tmp_path / "s"
    with pytest.raises(InputError, match="accelerator gpu with devices 1 cannot be used here"):
        sample(bundle, out, count=10, accelerator="gpu" if not torch.cuda.is_available() else "tpu")
    assert not out.exists()
    with pytest.raises(InputError, match="class 'x' is none of this cascade's classes"):
        sample(bundle, out, count=10, classes=["x"])
    with pytest.raises(InputError, match="is a file: the results need a folder"):
        sample(bundle, bundle / "bundle.json", count=2)
    out.mkdir()
    (out / "manifest.json").write_text('{"count": 10}')  # of a command that failed before its first image
    sample(bundle, out, count=3)
    assert read_manifest(out / "train" / "32").count == 3
    with pytest.raises(InputError, match="was begun with count 3, not 4"):
        sample(bundle, out, count=4)


def test_a_folder_that_another_command_has_taken_is_left_to_it(bundle, tmp_path, monkeypatch):
    real = CascadeModule.sample

    def taken(cascade, *rest):
        (tmp_path / "s" / "manifest.json").write_text('{"count": 7}')
        return real(cascade, *rest)

    monkeypatch.setattr(CascadeModule, "sample", taken)
    with pytest.raises(InputError, match="was begun with"):
        sample(bundle, tmp_path / "s", count=3)
    assert not any((tmp_path / "s").rglob("*.tar"))


def test_classes_are_given_by_name_or_number(bundle, tmp_path):
    sample(bundle, tmp_path / "names", count=4, classes=["h", 2])
    sample(bundle, tmp_path / "numbers", count=4, classes=[7, "c"])
    assert hashes(tmp_path / "names") == hashes(tmp_path / "numbers")
    sample(bundle, tmp_path / "one", per_class=2, classes="c")
    assert read_manifest(tmp_path / "one" / "train" / "8").counts == [0, 0, 2, *[0] * 7]


def renamed(folder, out, classes, numbers):
    """The same stored images in a list of other classes; numbers: of each old class in the new list."""
    manifest = read_manifest(folder)
    read = [s for shard in manifest.shards for s in read_shard(folder / shard.name)]
    images = np.stack([decode_png(s["png"]) for s in read])
    labels = np.array([numbers[int(s["cls"])] for s in read])
    write_images(out, images, labels, range(len(read)), classes, None)
    return out


def test_stored_images_are_taken_up_by_the_names_of_their_classes(bundle, tmp_path):
    """Another order of the same names is mapped; another name is refused, whatever its number."""
    sample(bundle, tmp_path / "whole", count=4, classes=["a", "d"])
    stored, names = tmp_path / "whole" / "train" / "16", list("abcdefghij")
    turned = renamed(stored, tmp_path / "turned" / "train" / "16", names[::-1], {0: 9, 3: 6})
    alone = renamed(stored, tmp_path / "alone" / "train" / "16", ["d", "a"], {0: 1, 3: 0})
    for number, start in enumerate((turned, alone)):
        sample(bundle, tmp_path / f"{number}", count=4, classes=["a", "d"], start=start)
        whole = tmp_path / "whole" / "train" / "32" / "000000.tar"
        assert (tmp_path / f"{number}" / "train" / "32" / "000000.tar").read_bytes() == whole.read_bytes()
    with pytest.raises(InputError, match=r"image 0 of .* has class 0, and sample 0 has 1: its class is called 'a'"):
        sample(bundle, tmp_path / "wrong", count=4, classes=["b", "d"], start=alone)
    other = renamed(stored, tmp_path / "other" / "train" / "16", ["dress", "c"], {0: 0, 3: 1})
    with pytest.raises(InputError, match="holds images of class 'dress', which is none of the cascade's classes: a, b"):
        sample(bundle, tmp_path / "wrong", count=4, classes=[0, 1], start=other)
    assert not (tmp_path / "wrong").exists() or not any((tmp_path / "wrong").rglob("*.tar"))


def test_where_a_bundle_knows_no_names_the_number_of_classes_is_compared(stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {})
    sample(tmp_path / "b", tmp_path / "whole", count=3)
    start = tmp_path / "whole" / "train" / "16"
    assert read_manifest(start).classes == [str(c) for c in range(10)] and read_manifest(start).class_names is None
    sample(tmp_path / "b", tmp_path / "more", count=3, start=start)
    few = renamed(start, tmp_path / "few" / "train" / "16", ["a", "b", "c"], {c: c for c in range(3)})
    with pytest.raises(InputError, match="has 3 classes, and the cascade 10"):
        sample(tmp_path / "b", tmp_path / "else", count=3, start=few)


def test_networks_are_compiled_where_asked_and_the_manifest_says_so(bundle, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr("cdm_lightning.network.unet.UNet.compile", lambda network, mode: modes.append(mode))
    sample(bundle, tmp_path / "out", count=4, block_size=4, compile="default", accelerator="cpu")
    assert modes == ["default"] * 3
    assert json.loads((tmp_path / "out/manifest.json").read_text())["compile"] == "default"
    with pytest.raises(InputError, match="begun with compile default, not None"):
        sample(bundle, tmp_path / "out", count=4, block_size=4, accelerator="cpu")


def test_it_goes_on_after_a_kill(bundle, tmp_path, monkeypatch):
    sample(bundle, tmp_path / "whole", count=9, block_size=2)
    real, written = Path.replace, []

    def killed(self, target):
        written.append(target)
        if len(written) == 7:  # in the middle of the third block
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        sample(bundle, tmp_path / "parts", count=9, block_size=2)
    monkeypatch.undo()
    before = hashes(tmp_path / "parts")
    assert not any("samples.png" in name or "/manifest.json" in name for name in before) and len(before) >= 4
    sample(bundle, tmp_path / "parts", count=9, block_size=2)
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")


def test_another_block_size_and_other_batches_agree_within_one_grey_level(bundle, tmp_path):
    pixels = []
    for number, (size, batches) in enumerate([(1, None), (5, None), (5, [5, 3, 1])]):
        sample(bundle, tmp_path / f"{number}", count=5, block_size=size, batch_sizes=batches)
        folder = tmp_path / f"{number}" / "train" / "32"
        samples = [s for shard in read_manifest(folder).shards for s in read_shard(folder / shard.name)]
        pixels.append(torch.stack([torch.from_numpy(decode_png(s["png"])).int() for s in samples]))
    assert max(int((pixels[0] - other).abs().max()) for other in pixels[1:]) <= 1
    with pytest.raises(InputError, match="begun with batch_sizes None, not "):
        sample(bundle, tmp_path / "1", count=5, block_size=5, batch_sizes=[5, 3, 1])


def test_a_truncated_run_keeps_finished_images_alone(bundle, tmp_path):
    sample(bundle, tmp_path / "s", count=2, truncated=True)
    assert [p.name for p in (tmp_path / "s" / "train").iterdir()] == ["32"]


def test_a_folder_is_continued_with_nothing_else(bundle, stages, tmp_path):
    sample(bundle, tmp_path / "s", count=2)
    with pytest.raises(InputError, match="was begun with seed 0, not 1"):
        sample(bundle, tmp_path / "s", count=2, seed=1)
    about = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**about, "levels": [0, 0]}))
    with pytest.raises(InputError, match=r"was begun with levels \[501, 0\], not \[0, 0\]"):
        sample(bundle, tmp_path / "s", count=2)
    write_bundle(bundle, [randomise_weights(stage, seed=1) for stage in stages], {"levels": [501, 0]})
    with pytest.raises(InputError, match="was begun with bundle"):
        sample(bundle, tmp_path / "s", count=2)


def test_the_bundles_choice_of_s_is_used_when_none_is_given(bundle, tmp_path):
    sample(bundle, tmp_path / "a", count=2)
    sample(bundle, tmp_path / "b2", count=2, levels=[501, 0], truncated=False)
    sample(bundle, tmp_path / "c", count=2, levels=[0, 0])
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b2") != hashes(tmp_path / "c")


def test_it_goes_on_from_stored_images(bundle, tmp_path):
    """From the 8x8 or the 16x16 of a whole run the cascade makes the rest of that run, to the bit."""
    sample(bundle, tmp_path / "whole", count=5, block_size=2)
    whole = hashes(tmp_path / "whole")
    for resolution in (8, 16):
        start = tmp_path / "whole" / "train" / str(resolution)
        sample(bundle, tmp_path / f"from{resolution}", count=5, block_size=2, start=start)
        parts = hashes(tmp_path / f"from{resolution}")
        made = {name for name in parts if name.endswith(".tar")}
        assert len(made) == (6 if resolution == 8 else 3) and all(parts[name] == whole[name] for name in made)


@pytest.mark.parametrize(
    "start, options, sentence",
    [
        ("32", {"count": 4}, r"holds images of 32: the cascade goes on from \[8, 16\]"),
        ("16", {"count": 5}, "holds 4 images, and 5 are to be drawn from them"),
        ("8", {"count": 4, "classes": [1, 0]}, "image 0 of .* has class 0, and sample 0 has 1"),
    ],
)
def test_stored_images_that_do_not_fit_are_refused(bundle, tmp_path, start, options, sentence):
    sample(bundle, tmp_path / "whole", count=4)
    with pytest.raises(InputError, match=sentence):
        sample(bundle, tmp_path / "more", start=tmp_path / "whole" / "train" / start, **options)


def test_mixed_precision_is_part_of_what_samples_are(bundle, tmp_path):
    sample(bundle, tmp_path / "full", count=2)
    sample(bundle, tmp_path / "mixed", count=2, precision="bf16-mixed")
    pixels = []
    for name in ("full", "mixed"):
        folder = tmp_path / name / "train" / "8"
        samples = [s for shard in read_manifest(folder).shards for s in read_shard(folder / shard.name)]
        pixels.append(torch.stack([torch.from_numpy(decode_png(s["png"])).int() for s in samples]))
    difference = (pixels[0] - pixels[1]).abs()
    assert (
        0 < difference.float().mean() < 10  # of 255: random weights make much of a rounding
        and json.loads((tmp_path / "mixed" / "manifest.json").read_text())["precision"] == "bf16-mixed"
    )
    with pytest.raises(InputError, match="was begun with precision 32-true, not bf16-mixed"):
        sample(bundle, tmp_path / "full", count=2, precision="bf16-mixed")
