"""What `cdm sample` can go on from, and the batches of its networks: refused before a folder is made."""

import json

import pytest
from folders import make_folder
from small_models import smallest_stages

from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.sampling.sample import sample


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    write_bundle(folder, smallest_stages(), {})
    return folder


@pytest.mark.parametrize(
    ("resolution", "channels", "count", "sentence"),
    [
        (16, 1, 2, r"holds images of 16: the cascade goes on from \[8\]"),
        (8, 3, 2, "has 3 channels, and the cascade makes 1"),
        (8, 1, 4, "holds 3 images, and 4 are to be drawn from them"),
    ],
)
def test_stored_images_of_another_kind_or_too_few(bundle, tmp_path, resolution, channels, count, sentence):
    start = tmp_path / f"start/train/{resolution}"
    make_folder(start, [2, 1], resolution, channels)
    with pytest.raises(InputError, match=sentence):
        sample(bundle, tmp_path / "s", count=count, start=start, classes=[0, 3, 6], accelerator="cpu")
    assert not (tmp_path / "s").exists()


def test_as_many_stored_images_as_are_drawn(bundle, tmp_path):
    start = tmp_path / "start/train/8"
    make_folder(start, [2, 1])  # of classes 0, 3 and 6
    sample(bundle, tmp_path / "s", count=3, start=start, classes=[0, 3, 6], batch_sizes=[2, 1], accelerator="cpu")
    assert [path.name for path in (tmp_path / "s/train").iterdir()] == ["16"]
    assert json.loads((tmp_path / "s/manifest.json").read_text())["batch_sizes"] == [2, 1]
    with pytest.raises(InputError, match="must have 2 entries, one a stage"):
        sample(bundle, tmp_path / "t", count=3, batch_sizes=[2], accelerator="cpu")
