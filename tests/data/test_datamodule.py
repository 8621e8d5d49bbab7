"""The data module: every image once, one sequence for any number of processes, and a run that goes on where it was."""

import warnings
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dealt_images import SIZES, Recorder, contents, deal, flat, places, record_run, record_two_processes
from folders import FASHION, make_folder, read_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from refusals import sentence_of_error

from cdm_lightning.data import ShardDataModule
from cdm_lightning.data.shards import read_manifest, write_manifest
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.training import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    make_folder(root / "train/8", SIZES)
    make_folder(root / "val/8", [4, 5], suffix=".tar.gz")
    return root


@pytest.fixture(scope="module")
def folder(root):
    return root / "train/8"


# ----------------------------------------------------------------------------------------------- the sequence of images


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 2), (3, 1)])
def test_every_image_is_dealt_exactly_once(folder, shuffle, world_size, workers):
    dealt = deal(folder, world_size, workers, shuffle=shuffle, end=53)
    for rank, batches in enumerate(dealt):
        assert places(batches) == list(range(rank, 53, world_size))
        assert {len(index) for _, _, index in batches[:-1]} == {4}  # the last alone is partial
    found = sorted(value for batches in dealt for value in contents(batches).values())
    assert found == sorted((image.tobytes(), label) for image, label in read_raw(folder).values())


def test_ranks_workers_and_accumulation_walk_one_sequence(folder):
    start, whole = 45, deal(folder, 1, 0, 12, 5, start=45, flip=True)[0]  # the first batch spans two epochs
    assert places(whole) == list(range(start, start + 60))
    layouts = [(1, 1, 1), (1, 2, 3), (1, 3, 1), (2, 0, 1), (2, 2, 1), (2, 1, 3), (3, 2, 2)]
    for world_size, workers, accumulate in layouts:
        size = 12 // world_size // accumulate
        dealt = deal(folder, world_size, workers, size, 5 * accumulate, start=start, flip=True)
        for step, expected in enumerate(whole):
            parts = [b for batches in dealt for b in batches[step * accumulate : (step + 1) * accumulate]]
            assert contents(parts) == contents([expected])


def test_the_order_is_a_function_of_seed_and_epoch_alone(folder):
    def order(**options):
        return [c for _, c in sorted(contents(deal(folder, end=106, **options)[0]).items())]

    once = order()
    torch.manual_seed(7)
    np.random.seed(7)
    assert order(batch_size=9) == once
    first, second = once[:53], once[53:]
    assert sorted(first) == sorted(second) and first != second
    assert order(seed=1) != once and order(window=1) != once
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10  # chance alone: 1
    assert order(shuffle=False)[:53] == [(i.tobytes(), label) for i, label in read_raw(folder).values()]


@pytest.mark.parametrize("sizes", [[1] * 12, [12]])  # the order of shards alone, and the order within one alone
def test_shards_and_the_images_in_them_are_shuffled_anew_by_epoch_and_seed(tmp_path, sizes):
    make_folder(tmp_path, sizes)
    dealt = [deal(tmp_path, seed=seed, window=1, end=24)[0] for seed in (0, 0, 1)]
    once, same, other = ([c for _, c in sorted(contents(batches).items())] for batches in dealt)
    assert once == same and once[:12] != once[12:] and once[:12] != other[:12] and once[12:] != other[12:]
    assert sorted(once[:12]) == sorted(once[12:]) == sorted(other[:12])


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 170), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_any_place_starts_the_tail_of_the_unbroken_sequence(folder, start, world_size, window, shuffle):
    manifest = read_manifest(folder)

    def walk(count, rank=0, **options):
        stream = ShardStream(folder, manifest, 8, 4, rank, window=window, shuffle=shuffle, **options)
        return list(islice(stream.names(), count))

    unbroken = walk(240)
    for rank in range(world_size):
        tail = unbroken[start + rank :: world_size][:15]
        assert walk(len(tail), rank, start=start, world_size=world_size) == tail


def test_images_and_labels_belong_together_and_are_floats_of_their_bytes():
    manifest, raw = read_manifest(FASHION / "val/32"), read_raw(FASHION / "val/32")
    stream = ShardStream(FASHION / "val/32", manifest, 32, 500, end=1500)
    keys = [name for _, name in stream.names()]
    module = ShardDataModule(FASHION)
    batches = [module.on_after_batch_transfer(batch, 0) for batch in stream]
    image, label, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert image.dtype == torch.float32 and image.min() == -1 and image.max() == 1
    assert len(set(keys)) == 1500 and label.bincount().min() > 100  # every class, well mixed
    for one, its_label, its_key in zip(image.numpy(), label.tolist(), keys, strict=True):
        expected, expected_label = raw[its_key]
        assert np.array_equal(one[0], expected.astype(np.float32) / np.float32(127.5) - 1)
        assert its_label == expected_label


def test_flips_are_a_fair_coin_per_image_keyed_by_place_and_seed():
    manifest = read_manifest(FASHION / "val/32")

    def images(**options):
        stream = ShardStream(FASHION / "val/32", manifest, 32, 500, end=2000, **options)
        return torch.cat([image for image, _, _ in stream])

    plain, flipped = images(), images(flip=True)
    mirrored = (flipped == plain.flip(-1)).all((1, 2, 3))
    assert (mirrored | (flipped == plain).all((1, 2, 3))).all()
    assert abs(mirrored.float().mean() - 0.5) < 0.05  # more than four standard deviations
    assert (mirrored[1:] != mirrored[:-1]).float().mean() > 0.4  # not by blocks
    later = images(flip=True, start=700)
    assert torch.equal(later, flipped[700:])
    assert not torch.equal((images(flip=True, seed=1) == images(seed=1)).all((1, 2, 3)), ~mirrored)


# ---------------------------------------------------------------------------------------------------- through a Trainer


RUNS = {  # name: options of the Trainer and the data module; every run is 7 steps of 12 images, into the second epoch
    "one pass": {},
    "two workers": {"workers": 2, "val_check_interval": 4},
    "accumulating": {"accumulate_grad_batches": 2},
    "passes of three batches": {"limit_train_batches": 3},
    "accumulating in passes of four, two workers": {
        "accumulate_grad_batches": 2, "limit_train_batches": 4, "workers": 2, "val_check_interval": 4,
    },
    "a loader reloaded every pass": {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
    "by epochs": {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("saver", [Checkpoint, ModelCheckpoint])
def test_a_run_resumed_anywhere_sees_what_the_unbroken_one_would_have_seen(root, tmp_path, name, saver):
    options = {**RUNS[name], "saver": saver}
    unbroken = record_run(root, tmp_path, **options)
    total = len(flat(unbroken.seen))
    assert flat(unbroken.seen) == list(range(total)) and total == (96 if name == "by epochs" else 84)
    validated = flat(unbroken.validated)
    assert validated and validated == list(range(9)) * (len(validated) // 9)
    for step in (1, 5) if options.get("workers") else range(1, total // 12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = record_run(root, tmp_path / "again", tmp_path / f"step={step}.ckpt", **options)
        assert flat(resumed.seen) == list(range(12 * step, total)), f"resumed after step {step}"
        assert not [w for w in caught if "not resumable" in str(w.message)]


def test_a_batch_cut_short_by_an_exception_is_seen_again(root, tmp_path):
    with pytest.raises(RuntimeError, match="lost power"):
        record_run(
            root, tmp_path, module=Recorder(fail_at=4), callbacks=[OnExceptionCheckpoint(tmp_path, "last_words")]
        )
    assert flat(record_run(root, tmp_path, tmp_path / "last_words.ckpt").seen) == list(range(48, 84))


def test_a_run_goes_on_with_another_batch_size_accumulation_or_data_module(root, tmp_path):
    record_run(root, tmp_path / "a", max_steps=3)
    data = ShardDataModule(root, 8, 0, window=3)
    other = record_run(
        root, tmp_path / "b", tmp_path / "a/step=3.ckpt", data=data, accumulate_grad_batches=2, max_steps=5
    )
    last = record_run(root, tmp_path / "c", tmp_path / "b/step=5.ckpt", batch_size=6, max_steps=7)
    assert flat(other.seen + last.seen) == list(range(36, 36 + len(flat(other.seen)) + 12))
    again = record_run(root, tmp_path / "d", data=data, max_steps=2)  # used before, in a new run
    assert flat(again.seen) == list(range(16))


def test_two_processes_share_out_every_batch_and_one_process_goes_on_after_them(root, tmp_path):
    steps = {"max_steps": 5, "accumulate_grad_batches": 2, "val_check_interval": 10}
    ranks = [found[:2] for found in record_two_processes(root, tmp_path, batch_size=16, workers=2, **steps)]
    for step in range(5):
        parts = [batch for seen, _ in ranks for batch in seen[2 * step : 2 * step + 2]]
        assert [len(batch) for batch in parts] == [4] * 4
        assert sorted(flat(parts)) == list(range(16 * step, 16 * step + 16))
    # 5 and 4 images: in batches of 4 one process would make two and the other one, so they are of 3
    assert [validated for _, validated in ranks] == [[[0, 2, 4], [6, 8]], [[1, 3, 5], [7]]]
    alone = record_run(root, tmp_path / "alone", tmp_path / "step=3.ckpt", batch_size=16, max_steps=5)
    assert flat(alone.seen) == list(range(48, 80))


# ------------------------------------------------------------------------------------------------------------- refusals


def attached(root, batch_size=12, world_size=1, accumulate=1, max_steps=5, resolution=8, channels=1, classes=10):
    """A data module that believes to be in a fit."""
    module = SimpleNamespace(resolution=resolution, image_channels=channels, num_classes=classes)
    data, progress = ShardDataModule(root, batch_size), SimpleNamespace(total=SimpleNamespace(processed=0))
    data.trainer = SimpleNamespace(
        world_size=world_size, global_rank=0, accumulate_grad_batches=accumulate, max_steps=max_steps, num_devices=1,
        lightning_module=module, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )  # fmt: skip
    return data


def test_data_that_does_not_fit_the_model_or_the_run_is_refused_before_it_starts(root, tmp_path):
    def setup(*parts, where=root, **options):
        sentence_of_error(lambda: attached(where, **options).setup("fit"), *parts)

    attached(root).setup("fit")
    attached(root, classes=None, resolution=4).setup("fit")
    train = root / "train/8"
    setup(f"{tmp_path / 'nowhere/train'} does not exist", where=tmp_path / "nowhere")
    setup("has no shards for resolution 16: stored are [8]", resolution=16)
    setup(f"{train} has 1 channels, the model takes 3", channels=3)
    setup(f"{train} has 10 classes, the model takes 1000", classes=1000)
    setup(f"{root / 'val/8'} holds 9 images for 10 processes", world_size=10)
    (tmp_path / "train/8").mkdir(parents=True)
    setup(f"{tmp_path / 'train/8'} holds no manifest.json", where=tmp_path)
    make_folder(tmp_path / "train/8", [3], resolution=4)
    setup("holds images of resolution 4, its name says 8", where=tmp_path)


def renamed(root, split, classes, **extra):
    """Call the classes of a split otherwise."""
    folder = root / split / "8"
    write_manifest(folder, replace(read_manifest(folder), classes=classes, extra=extra))


def test_classes_are_compared_by_name_wherever_two_lists_meet(tmp_path):
    """Splits with each other, with a checkpoint and with a cascade; a stage without classes takes any."""
    for split in ("train", "val"):
        make_folder(tmp_path / split / "8", [12])
    names = read_manifest(tmp_path / "train/8").classes
    data = attached(tmp_path)
    data.trainer.lightning_module.origin = {"classes": names}
    data.setup("fit")
    state = {"images_seen": 0, "batches": 0, "classes": names}
    data.load_state_dict(state)
    data.load_state_dict({**state, "classes": None})  # an older checkpoint
    other = ["dress", *names[1:]]
    sentence = "train/8 calls class 0 'class 0', and the checkpoint 'dress'"
    sentence_of_error(lambda: data.load_state_dict({**state, "classes": other}), sentence)
    validated = attached(tmp_path)
    validated.setup("validate")
    sentence = "val/8 calls class 0 'class 0', and the checkpoint 'class 9': the names are the same, in another order"
    sentence_of_error(lambda: validated.load_state_dict({**state, "classes": names[::-1]}), sentence)
    data.trainer.lightning_module.origin = {"classes": other}
    sentence_of_error(lambda: data.setup("fit"), "8 calls class 0 'class 0', and the cascade 'dress'")
    renamed(tmp_path, "val", other)
    sentence_of_error(lambda: attached(tmp_path).setup("fit"), f"{tmp_path}/val/8", "class 0", f"{tmp_path}/train/8")
    attached(tmp_path, classes=None).setup("fit")
    numbers = [str(number) for number in range(10)]
    renamed(tmp_path, "train", numbers)
    sentence_of_error(lambda: attached(tmp_path).setup("fit"), "class 0", "'0'")  # folders may be called so
    renamed(tmp_path, "train", numbers, samples={})  # samples of a cascade that knows no names
    attached(tmp_path).setup("fit")


def test_a_batch_that_cannot_be_shared_is_refused(root):
    for options in [{"world_size": 5}, {"accumulate": 8}, {"world_size": 3, "accumulate": 8}]:
        data = attached(root, **options)
        sentence_of_error(
            data.train_dataloader, f"batch_size {data.batch_size} cannot be shared by", "must be a multiple of"
        )
        sentence_of_error(data.val_dataloader, f"batch_size {data.batch_size} cannot be shared by")
    sentence_of_error(lambda: attached(root, batch_size=0), "batch_size is 0: it must be at least 1")
    sentence_of_error(
        attached(root, batch_size=54, max_steps=-1).train_dataloader, "54 is larger than the 53 training images"
    )
    for options in [{"window": 0}, {"window": -1}, {"num_workers": -1}]:
        sentence_of_error(lambda o=options: ShardDataModule(root, **o), "must be at least")
