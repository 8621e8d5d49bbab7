"""A checkpoint, a shard or a bundle that cannot be written is one sentence, and the previous one stays."""

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from commands import ROOT
from small_models import smallest_stages
from small_training import smallest_stage, train

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.data.shards import read_shard, write_shard
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import encode_png
from cdm_lightning.training.checkpoint_files import AtomicCheckpointIO, CheckpointWriteError, Trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def on_a_full_disk(limit, work, *args):
    """What `work` raised and its exit code, in a process whose files cannot grow beyond `limit` bytes."""

    def inside(queue):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work(*args)
            queue.send(("", 0))
        except SystemExit as ending:
            queue.send(("", ending.code))
        except Exception as error:
            queue.send((str(error), 1 if isinstance(error, InputError) else -1))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=inside, args=(theirs,))
    process.start()
    process.join(120)
    return ours.recv()


def untouched(folder, before):
    return {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["checkpoint", "shard", "bundle"])
def test_a_full_disk_is_one_sentence_and_leaves_the_previous_file(tmp_path, kind):
    folder = tmp_path / "bundle" if kind == "bundle" else tmp_path
    image = torch.randint(0, 256, (8, 8, 1), generator=torch.Generator().manual_seed(0)).byte().numpy()

    def write(count):
        if kind == "checkpoint":
            AtomicCheckpointIO().save_checkpoint({"x": torch.full((count, 1000), 1.0)}, tmp_path / "last.ckpt")
        elif kind == "shard":
            write_shard(tmp_path / "0.tar", [(f"{i:05d}", encode_png(image), 1) for i in range(count)])
        else:
            write_bundle(tmp_path / "bundle", smallest_stages(channels=4 * count), {"levels": [0], "truncated": False})

    write(1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    message, code = on_a_full_disk(12_000, write, 10)
    assert code == 1 and message.endswith("could not be written: File too large")
    assert untouched(folder, before) and [file.name for file in tmp_path.iterdir()] == [
        {"checkpoint": "last.ckpt", "shard": "0.tar", "bundle": "bundle"}[kind]
    ]
    if kind == "checkpoint":
        assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["x"].shape == (1, 1000)
    elif kind == "shard":
        assert len(list(read_shard(tmp_path / "0.tar", 1))) == 1
    else:
        assert len(read_bundle(tmp_path / "bundle")[0]) == 2
    write(10)
    assert not untouched(folder, before)


def test_commands_end_with_2_on_a_full_disk(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    fit_it = [
        "fit", "--config", "experiments/defaults.yaml", "--config", "experiments/fashion/defaults.yaml",
        "--config", "experiments/fashion/base8.yaml", "--config", "tests/reduced.yaml", "--trainer.logger=false",
        "--trainer.max_steps=1", "--trainer.devices=1", "--trainer.limit_val_batches=0", "--data.batch_size=2",
        "--model.channels=8", "--model.norm_groups=4", "--model.num_res_blocks=1", "--model.num_heads=1",
        "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}/run",
    ]  # fmt: skip
    main(fit_it)
    last = tmp_path / "run/checkpoints/last.ckpt"
    bundle = ["bundle", f"--checkpoints=[{last}]", f"--out={tmp_path}/bundle"]
    before = last.read_bytes()
    for command in ([*fit_it, "--trainer.max_steps=2"], bundle):
        capfd.readouterr()
        assert on_a_full_disk(20_000, main, command) == ("", 2)
        heard = capfd.readouterr().err
        assert heard.count("cdm: error:") == 1 and "could not be written: File too large" in heard
        assert "Traceback" not in heard
    assert last.read_bytes() == before and not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("*.partial"))


class Full(AtomicCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] == 4:
            raise CheckpointWriteError(f"{path} could not be written: No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


class Listening(Trainer):
    def save_checkpoint(self, *args, **kwargs):
        try:
            super().save_checkpoint(*args, **kwargs)
        except CheckpointWriteError as error:
            Path(self.default_root_dir, f"rank{self.global_rank}.txt").write_text(str(error))
            self.strategy.barrier()  # else the first to end would have the other killed
            raise


def test_all_processes_stop_when_the_first_cannot_write(few_real, tmp_path, monkeypatch):
    monkeypatch.setattr("small_training.AtomicCheckpointIO", Full)
    monkeypatch.setattr("small_training.Trainer", Listening)
    with pytest.raises(Exception, match="No space left on device"):
        train(smallest_stage(), few_real, tmp_path, 50, 2)
    words = {(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)}
    assert len(words) == 1 and words.pop().endswith("step=4.ckpt could not be written: No space left on device")
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_torn_and_foreign_checkpoints_are_refused(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(1000)}, tmp_path / "a.ckpt")
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-100])
    torch.save({"path": Path("x")}, tmp_path / "pickle.ckpt")
    for name, why in {"torn": "is cut short", "pickle": "is not a checkpoint that can be loaded safely"}.items():
        with pytest.raises(InputError, match=f"{name}.ckpt {why}"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt", weights_only=False)
