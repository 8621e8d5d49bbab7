"""The stream where little is said of it, against the same said in full."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from dealt_images import SIZES
from folders import make_folder, read_raw, repacked

from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation.randomness import key


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "train/8"
    return folder, make_folder(folder, SIZES)


def test_by_default_the_whole_sequence_from_its_start_by_one_process(stored):
    said = {"rank": 0, "world_size": 1, "seed": 0, "window": 4, "flip": False, "shuffle": True, "start": 0, "end": None}
    short, full = ShardStream(*stored, 8, 4), ShardStream(*stored, 8, 4, **said, length=0, on_damage="refuse")
    for batch, other in zip(islice(short, 30), islice(full, 30), strict=True):  # into the third epoch
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    assert len(short) == 0 and len(ShardStream(*stored, 8, 4, length=7)) == 7


def test_stored_order_is_that_of_the_shards(stored):
    """Without shuffling place p holds image p, by tarfile and Pillow alone, and the last batch holds what is left."""
    raw = list(read_raw(stored[0]).values())
    batches = list(ShardStream(*stored, 8, 8, shuffle=False, start=3, end=53))
    assert [len(image) for image, _, _ in batches] == [8] * 6 + [2]
    image, label, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert index.tolist() == list(range(3, 53)) and label.tolist() == [label for _, label in raw[3:]]
    assert all(torch.equal(x[0], torch.from_numpy(expected)) for x, (expected, _) in zip(image, raw[3:], strict=True))


def test_a_mirrored_image_is_its_left_and_right_changed_over(stored):
    plain, flipped = (list(ShardStream(*stored, 8, 8, seed=5, end=53, flip=flip)) for flip in (False, True))
    for (image, _, index), (other, _, _) in zip(plain, flipped, strict=True):
        for one, its_own, place in zip(image, other, index.tolist(), strict=True):
            assert torch.equal(its_own, one.flip(2) if key(5, "flip", place) % 2 else one)


@pytest.mark.parametrize(("start", "rank", "world_size"), [(0, 0, 1), (5, 0, 1), (9, 1, 2)])
def test_every_worker_reads_its_own_batches_of_the_sequence(stored, monkeypatch, start, rank, world_size):
    about = {"rank": rank, "world_size": world_size, "start": start, "end": start + 53}
    whole = [index.tolist() for _, _, index in ShardStream(*stored, 8, 4, **about)]
    assert [place for batch in whole for place in batch] == list(range(start + rank, start + 53, world_size))
    for worker in range(3):
        monkeypatch.setattr("torch.utils.data.get_worker_info", lambda w=worker: SimpleNamespace(num_workers=3, id=w))
        assert [index.tolist() for _, _, index in ShardStream(*stored, 8, 4, **about)] == whole[worker::3]


def test_a_batch_of_damage_alone_is_mirrored_as_its_first_place(tmp_path):
    manifest = make_folder(tmp_path / "train/8", [1, 4])
    path = tmp_path / "train/8/001.tar"
    path.write_bytes(repacked(path, lambda name, data: b"damaged" if name.endswith(".png") else data))
    about = {"shuffle": False, "end": 5, "window": 1, "on_damage": "skip"}
    plain, flipped = (list(ShardStream(tmp_path / "train/8", manifest, 8, 2, flip=f, **about)) for f in (False, True))
    assert [len(image) for image, _, _ in flipped] == [1, 1, 1]
    for number, ((image, _, _), (other, _, _)) in enumerate(zip(plain, flipped, strict=True)):
        assert torch.equal(image, plain[0][0])  # all others are damaged
        assert torch.equal(other, image.flip(3) if key(0, "flip", 2 * number) % 2 else image)
