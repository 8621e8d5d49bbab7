"""Shards from an address give the batches of the disk, through a cache that is bounded, shared and never wrong."""

import fcntl
import json
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch
from dealt_images import SIZES
from folders import make_folder
from refusals import sentence_of_error
from servers import serving
from torch.utils.data import DataLoader

from cdm_lightning.data.shards import Manifest, find_folder, read_manifest, shards_root, write_manifest, write_packed
from cdm_lightning.data.shards import cache as cache_module
from cdm_lightning.data.shards.cache import ShardCache
from cdm_lightning.data.shards.folders import fetching_ahead, local_file
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation import addresses
from cdm_lightning.foundation.addresses import NoAnswer
from cdm_lightning.foundation.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def pack_folder(folder, sizes):
    """The same as make_folder, packed."""
    rng, shards = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        images = rng.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8)
        shards.append(
            write_packed(folder / f"{number}.tar", images, np.arange(size) % 10, [f"{i}" for i in range(size)])
        )
    counts = np.sum([np.bincount(np.arange(size) % 10, minlength=10) for size in sizes], 0).tolist()
    write_manifest(folder, Manifest(8, 1, folder.parent.name, [f"class {c}" for c in range(10)], counts, shards))


@pytest.fixture(params=["png", "packed"])
def stored(request, tmp_path):
    """A root of seven shards, in either form."""
    (make_folder if request.param == "png" else pack_folder)(tmp_path / "data/train/8", SIZES)
    return tmp_path / "data"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path/data, which holds seven shards of PNGs."""
    make_folder(tmp_path / "data/train/8", SIZES)
    monkeypatch.setattr(addresses, "PAUSES", (0.01, 0.01))
    with serving(tmp_path / "data") as server:
        yield server


def remote(server, cache, gigabytes=1.0):
    """The folder of a server, through a cache, and its manifest."""
    folder = find_folder(shards_root(server.address, cache, gigabytes), "train", 8)
    return folder, read_manifest(folder)


def batches(folder, workers=0, number=30, **options):
    """The first batches of the stream of a folder, into the third epoch."""
    stream = ShardStream(folder, read_manifest(folder), 8, 4, **{"window": 2, "flip": True, **options})
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers))
    found = list(islice(loader, number))
    if workers:
        loader._shutdown_workers()
    return found


def assert_equal(found, expected):
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def held(folder):
    """Bytes of the shards in a cache."""
    return sum(file.stat().st_size for file in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_server_are_those_of_the_disk_also_amid_the_sequence(stored, tmp_path, workers):
    disk = stored / "train/8"
    bound = sum(sorted(s.bytes for s in read_manifest(disk).shards)[-4:]) / 1e9  # two windows: shards are fetched anew
    with serving(stored) as server:
        for start in (0, 37):
            folder = find_folder(shards_root(server.address, tmp_path / "cache", bound), "train", 8)
            assert_equal(batches(folder, workers, start=start), batches(disk, start=start))
        assert max(server.asked.values()) > 1
    if not workers:
        assert held(tmp_path / "cache") <= bound * 1e9


def test_batches_from_memory_are_those_of_the_disk(stored, tmp_path):
    files = fsspec.filesystem("memory")
    for file in (stored / "train/8").iterdir():
        files.pipe_file(f"/{tmp_path.name}/train/8/{file.name}", file.read_bytes())
    folder = find_folder(shards_root(f"memory://{tmp_path.name}/", tmp_path / "cache"), "train", 4)
    assert folder.name == "8" and str(folder) == f"memory://{tmp_path.name}/train/8"
    assert_equal(batches(folder), batches(stored / "train/8"))


def test_the_next_window_is_fetched_while_one_is_read_and_no_further(server, tmp_path):
    folder, manifest = remote(server, tmp_path / "cache")
    windows = fetching_ahead(folder, iter([(i, [shard], None) for i, shard in enumerate(manifest.shards)]))
    next(windows)
    wait_for(lambda: len(list((tmp_path / "cache").glob("?" * 64))) == 2)
    time.sleep(0.2)
    assert server.asked.keys() == {f"/train/8/{name}" for name in ("manifest.json", "000.tar", "001.tar")}
    windows.close()
    stream = ShardStream(folder, manifest, 8, 4, shuffle=False, window=1, end=SIZES[0] + 1)
    assert len(list(stream)) == 2


def test_only_the_first_reader_fetches_ahead(server, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cdm_lightning.data.stream.fetching_ahead", lambda folder, windows: asked.append(1) or windows)
    stream = ShardStream(*remote(server, tmp_path / "cache"), 8, 4)
    for worker, expected in ((None, 1), (0, 2), (1, 2)):
        info = None if worker is None else type("Info", (), {"num_workers": 2, "id": worker})
        monkeypatch.setattr("torch.utils.data.get_worker_info", lambda info=info: info)
        next(stream.open_windows())
        assert len(asked) == expected


def test_a_shard_that_is_fetched_ahead_takes_no_room_of_one_that_is_read(server, tmp_path):
    folder, manifest = remote(server, tmp_path / "cache", 30000 / 1e9)
    first, second = manifest.shards[:2]
    with local_file(folder, first):
        ahead = folder.cache.local(f"{folder}/{second.name}", second, threading.Event())
        sentence_of_error(ahead.__enter__, "no room for a shard that is fetched ahead")
        with local_file(folder, second) as path:  # but one that is needed now goes beyond the bound
            assert path.is_file() and (tmp_path / "cache" / first.sha256).is_file()
    stop = threading.Event()
    stop.set()
    with (
        pytest.raises(InputError, match="not needed any more"),
        folder.cache.local(f"{folder}/002.tar", manifest.shards[2], stop),
    ):
        pass
    assert not list((tmp_path / "cache").glob("*.partial"))


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------ a bad server


def test_a_connection_that_is_cut_and_a_server_that_fails_are_tried_again(server, tmp_path):
    for name in ("000.tar", "003.tar", "005.tar"):
        server.trouble[f"/train/8/{name}"] = [500, "cut", "changed", 0.01]
    folder, _ = remote(server, tmp_path / "cache")
    assert_equal(batches(folder), batches(tmp_path / "data/train/8"))
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("trouble", ["changed", "short"])
def test_a_changed_file_is_fetched_twice_and_refused(server, tmp_path, trouble):
    server.trouble["/train/8/002.tar"] = [trouble] * 9
    folder, manifest = remote(server, tmp_path / "cache")
    sentence_of_error(
        lambda: batches(folder),
        f"{server.address}/train/8/002.tar was changed on the server: its size or SHA-256 is not",
    )
    assert server.asked["/train/8/002.tar"] >= 2
    assert not (tmp_path / "cache" / manifest.shards[2].sha256).exists()
    wait_for(lambda: not list((tmp_path / "cache").glob("*.partial")))  # the thread that fetches ahead ends too


def test_a_longer_file_is_not_written_to_its_end(server, tmp_path):
    folder, manifest = remote(server, tmp_path / "cache")
    file = server.folder / "train/8/000.tar"
    file.write_bytes(file.read_bytes() + bytes(5_000_000))
    sentence_of_error(lambda: batches(folder), "000.tar was changed on the server")
    assert held(tmp_path / "cache") < 1_000_000


def test_what_is_changed_or_missing_is_damage_and_a_server_that_fails_is_not(server, tmp_path):
    """`skip` leaves the former out, as on a disk, and ends at the latter: it will be back."""
    files = server.folder / "train/8"
    (files / "001.tar").unlink()
    server.trouble["/train/8/004.tar"] = ["changed"] * 20
    folder, _ = remote(server, tmp_path / "cache")
    with_gaps = list(ShardStream(folder, read_manifest(folder), 8, 53, end=53, on_damage="skip"))
    assert sum(len(image) for image, _, _ in with_gaps) == 53 - SIZES[1] - SIZES[4]
    server.trouble["/train/8/003.tar"] = [500] * 99
    fresh, _ = remote(server, tmp_path / "other")
    with pytest.raises(NoAnswer, match=r"003\.tar could not be read in 3 tries, the server answers 500"):
        batches(fresh, on_damage="skip")


def test_a_changed_manifest_reads_no_old_file(server, tmp_path):
    batches(remote(server, tmp_path / "cache")[0])
    make_folder(server.folder / "train/8", [s + 1 for s in SIZES])  # the same names
    assert_equal(batches(remote(server, tmp_path / "cache")[0]), batches(server.folder / "train/8"))


def test_a_hash_that_leads_out_of_the_cache_is_refused(server, tmp_path):
    path = server.folder / "train/8/manifest.json"
    fields = json.loads(path.read_text())
    fields["shards"][0]["sha256"] = "../../stolen"
    path.write_text(json.dumps(fields))
    sentence_of_error(lambda: remote(server, tmp_path / "cache"), "lists 000.tar with the SHA-256 '../../stolen'")


# -------------------------------------------------------------------------------------------------------- the cache


def test_what_was_used_longest_ago_makes_room(server, tmp_path):
    folder, manifest = remote(server, tmp_path / "cache")
    shards = manifest.shards[:4]
    folder.cache.size = sum(shard.bytes for shard in shards[:3])
    cached = lambda: {shard.name for shard in shards if (tmp_path / "cache" / shard.sha256).exists()}  # noqa: E731
    for shard in [*shards[:3], shards[0]]:  # the first is used once more
        with local_file(folder, shard) as path:
            assert path.read_bytes() == (server.folder / "train/8" / shard.name).read_bytes()
    shards[3] = replace(shards[3])
    folder.cache.size = sum(shard.bytes for shard in shards) - min(shard.bytes for shard in shards[:3])
    with local_file(folder, shards[3]):
        assert "001.tar" not in cached() and {"000.tar", "003.tar"} <= cached()
    assert held(tmp_path / "cache") <= folder.cache.size
    assert server.asked["/train/8/000.tar"] == 1


def test_another_bound_and_a_killed_process_leave_nothing_for_ever(server, tmp_path):
    batches(remote(server, tmp_path / "cache")[0])
    left = tmp_path / "cache" / ("0" * 64 + ".partial")  # of a process that was killed
    left.write_bytes(bytes(40000))
    os.utime(left, (1, 1))
    (tmp_path / "cache/notes.txt").write_text("of somebody else")
    folder, manifest = remote(server, tmp_path / "cache", 40000 / 1e9)
    cut = tmp_path / "cache" / manifest.shards[0].sha256
    cut.write_bytes(b"cut")  # by a power failure
    with local_file(folder, manifest.shards[0]) as path:
        assert path.stat().st_size == manifest.shards[0].bytes
    assert not left.exists() and (tmp_path / "cache/notes.txt").exists() and held(tmp_path / "cache") <= 40016
    partial = tmp_path / "cache" / f"{manifest.shards[1].sha256}.partial"
    partial.write_bytes(b"begun")
    with local_file(folder, manifest.shards[1]) as path:
        assert path.read_bytes() == (server.folder / "train/8/001.tar").read_bytes() and not partial.exists()


def read_all(address, cache, barrier):
    folder = find_folder(shards_root(address, cache), "train", 8)
    barrier.wait()
    for shard in read_manifest(folder).shards:
        with local_file(folder, shard) as path:
            assert path.stat().st_size == shard.bytes


def test_of_two_processes_one_fetches_and_the_other_waits(server, tmp_path):
    for number in range(7):
        server.trouble[f"/train/8/00{number}.tar"] = [0.005]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    readers = [context.Process(target=read_all, args=(server.address, tmp_path / "cache", barrier)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    assert {path: n for path, n in server.asked.items() if path.endswith(".tar")} == {
        f"/train/8/00{number}.tar": 1 for number in range(7)
    }


def test_a_killed_process_lets_the_next_one_fetch(server, tmp_path):
    server.trouble["/train/8/000.tar"] = [5.0]
    context = multiprocessing.get_context("fork")
    reader = context.Process(target=read_all, args=(server.address, tmp_path / "cache", context.Barrier(1)))
    reader.start()
    wait_for(lambda: server.asked["/train/8/000.tar"])
    reader.kill()
    reader.join()
    begun = time.monotonic()
    read_all(server.address, tmp_path / "cache", context.Barrier(1))
    assert time.monotonic() - begun < 4 and not list((tmp_path / "cache").glob("*.partial"))


def test_what_an_ended_process_left_unfinished_goes_with_the_next_fetch(server, tmp_path):
    """Of a reader that ends while it fetches ahead, as after a shard that is refused; also where there is room."""
    folder, manifest = remote(server, tmp_path / "cache")
    left, held = (tmp_path / "cache" / f"{letter * 64}.partial" for letter in "ab")
    left.parent.mkdir()
    left.write_bytes(bytes(1000))
    held.write_bytes(bytes(1000))
    with held.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with local_file(folder, manifest.shards[0]):
            assert held.exists() and not left.exists()


def test_a_file_that_is_read_is_not_removed(server, tmp_path):
    folder, manifest = remote(server, tmp_path / "cache")
    with local_file(folder, manifest.shards[0]) as path:
        assert not cache_module.remove_if_free(path) and path.exists()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again
    assert cache_module.remove_if_free(path) and not path.exists() and not cache_module.remove_if_free(path)


def test_too_small_a_bound_is_refused_with_the_least(server, tmp_path):
    _, manifest = remote(server, tmp_path / "cache")
    sizes = sorted(shard.bytes for shard in manifest.shards)
    ShardCache(tmp_path, sum(sizes[-4:])).check_size("x", manifest, 2)
    ShardCache(tmp_path, sum(sizes)).check_size("x", manifest, 99)
    sentence_of_error(
        lambda: ShardCache(tmp_path, sum(sizes[-4:]) - 1).check_size("x", manifest, 2),
        "data.cache_gb", "is too small for x, which is read in windows of data.window 2 shards", "at least 0.001",
    )  # fmt: skip


def test_a_disk_without_room_or_rights_is_one_sentence(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder, _ = remote(server, tmp_path / "cache")
    monkeypatch.setattr(cache_module.os, "pwrite", full)
    said = f"the cache {tmp_path}/cache cannot hold {server.address}/train/8/"
    sentence_of_error(lambda: batches(folder), said, "No space left on device; data.cache may name another folder")
    wait_for(lambda: not list((tmp_path / "cache").glob("*.partial")))
    (tmp_path / "file").touch()
    sentence_of_error(lambda: batches(remote(server, tmp_path / "file/cache")[0]), "Not a directory")


def test_the_cache_lies_where_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CDM_CACHE", str(tmp_path))
    assert ShardCache(None, 1).folder == tmp_path / "shards" and ShardCache(tmp_path / "x", 1).folder == tmp_path / "x"
    monkeypatch.delenv("CDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache(None, 1).folder == tmp_path / ".cache/cdm_lightning/shards"
