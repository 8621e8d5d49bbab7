"""`cdm fit` with an address for its data, and addresses where paths are asked for."""

import os
import signal
import threading
import time

import pytest
import torch
from commands import fit_command
from folders import make_folder
from refusals import sentence_of_error, sentence_of_refusal
from servers import serving

from cdm_lightning.__main__ import main
from cdm_lightning.data import ShardDataModule
from cdm_lightning.data.shards import find_folder, read_manifest, shards_root
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation import addresses

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    make_folder(tmp_path / "data/train/8", [4, 4, 4])
    make_folder(tmp_path / "data/val/16", [4], 16)
    monkeypatch.setattr(addresses, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "data") as server:
        yield server


def training(server, root, *options):
    run = server.folder.parent / "run"
    return fit_command(f"--data.root={root}", "--data.window=1", f"--trainer.default_root_dir={run}", *options)


def test_a_run_on_an_address_is_that_on_the_disk(server, tmp_path, capsys):
    """Also where it goes on from one on the other."""
    roots = {"remote": server.address, "disk": server.folder}
    for steps, order in ((2, ("remote", "disk")), (3, ("disk", "remote"))):
        weights = []
        for name, other in zip(roots, order, strict=True):
            folder = f"--trainer.default_root_dir={tmp_path / name}"
            main(training(server, roots[other], f"--trainer.max_steps={steps}", folder, "--model.image_channels=data"))
            weights.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    said = capsys.readouterr().out
    assert f"{server.address}/train/8: 12 images of 8x8 in 10 classes" in said and said.count("resuming") == 2
    assert len(list((tmp_path / "cache/shards").glob("?" * 64))) == 4


def test_what_an_address_lacks_is_one_sentence(server, capsys):
    sentence = sentence_of_refusal(capsys, training(server, f"{server.address}/no"))
    assert f"{server.address}/no/train has no shards for resolution 8: at 8, 16, 32," in sentence and "4096" in sentence
    assert sentence_of_refusal(capsys, training(server, "nothing://x")).startswith(
        "nothing://x/train/8/manifest.json is"
    )
    assert "takes no ? or #" in sentence_of_refusal(capsys, training(server, f"{server.address}?token=1"))
    sentence = sentence_of_refusal(capsys, training(server, server.address, "--data.cache_gb=0.000001"))
    assert "data.cache_gb 1e-06 is too small for" in sentence and "at least 0.0" in sentence
    sentence_of_error(lambda: ShardDataModule("nowhere", cache_gb=0), "cache_gb 0 of the data is not positive")


def test_a_fetch_that_takes_too_long_names_what_was_awaited(server, capsys):
    for number in range(3):
        server.trouble[f"/train/8/00{number}.tar"] = [3.0] * 9
    options = ["--data.num_workers=1", "--data.timeout=1", "--trainer.limit_val_batches=0"]
    sentence = sentence_of_refusal(capsys, training(server, server.address, *options))
    assert "gave no batch for 1 s, which is data.timeout; it was to read from http" in sentence
    assert f"{server.address}/train/8/00" in sentence


def test_a_training_that_waits_for_a_fetch_is_saved_when_it_is_told_to_stop(server, tmp_path, caplog):
    last = tmp_path / "run/checkpoints/last.ckpt"

    def send():
        while not last.exists():
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    folder = find_folder(shards_root(server.address), "train", 8)
    second = ShardStream(folder, read_manifest(folder), 8, 2, window=1).shards_of(2)[0].name
    server.trouble[f"/train/8/{second}"] = [10.0] * 9
    threading.Thread(target=send, daemon=True).start()
    options = ["--trainer.max_steps=100", "--trainer.limit_val_batches=0", "--data.num_workers=0"]
    with pytest.raises(SystemExit) as stop:
        main(training(server, server.address, *options))
    assert stop.value.code == 128 + signal.SIGTERM and f"saved {last} at step 2" in caplog.text


@pytest.mark.parametrize(
    "command",
    [
        ["search", "--bundle", "data/fashion-cascade", "--out", "{tmp}/o", "--shards", "https://host/x"],
        ["cas", "--samples", "{tmp}", "--out", "{tmp}/o", "--shards", "https://host/x"],
        ["cas", "--samples", "https://host/x", "--out", "{tmp}/o", "--shards", "data/fashion"],
        ["reference", "--shards", "https://host/x", "--resolution", "8", "--out", "{tmp}/o.safetensors"],
        ["npz", "--samples", "https://host/x", "--out", "{tmp}/o.npz"],
        ["sample", "--bundle", "data/fashion-cascade", "--out", "{tmp}/o", "--start", "https://host/x", "--count", "1"],
        ["evaluate", "--samples", "[https://host/x]", "--references", "[data/references/fashion-val-32.safetensors]",
         "--out", "{tmp}/o"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_where_a_path_is_asked_for_an_address_is_refused_as_one(command, tmp_path, capsys):
    words = [word.format(tmp=tmp_path) for word in command]
    sentence = sentence_of_refusal(capsys, words)
    assert sentence.startswith("https://host/x") and " is an address, and only data.root" in sentence


def test_a_path_keeps_its_meaning():
    data = ShardDataModule("a/b")
    assert str(data.roots["train"]) == str(data.roots["val"]) == "a/b"
