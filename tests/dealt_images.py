"""Images as training gets them: dealt out by streams to any number of processes, and seen through a Trainer."""

import json
from itertools import islice

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from cdm_lightning.data import ShardDataModule
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.training import Checkpoint

START = "spawn" if torch.cuda.is_available() else "fork"  # quicker, but not after CUDA has started
SIZES = [7, 11, 5, 9, 6, 8, 7]  # of shards: 53 images, a prime number


def deal(folder, world_size=1, workers=0, batch_size=4, batches=None, whole=True, **options):
    """[rank][batch] -> (image, label, index), each rank through a DataLoader of its own.

    whole: whether a shard that is missing or cut is refused.
    """
    manifest, options = read_manifest(folder, check_files=whole), {"window": 3, **options}
    streams = [ShardStream(folder, manifest, 8, batch_size, rank, world_size, **options) for rank in range(world_size)]
    loaders = [iter(DataLoader(s, batch_size=None, num_workers=workers)) for s in streams]
    dealt = [list(islice(loader, batches)) for loader in loaders]
    for loader in loaders if workers else []:
        loader._shutdown_workers()
    return dealt


def places(batches):
    return [i for _, _, index in batches for i in index.tolist()]


def contents(batches):
    """place -> (bytes, label) of the image that was dealt there."""
    return {int(i): (x.numpy().tobytes(), int(y)) for batch in batches for x, y, i in zip(*batch, strict=True)}


def flat(batches):
    return [i for batch in batches for i in batch]


class Recorder(L.LightningModule):
    """Learns nothing and writes down the places that it sees."""

    resolution, image_channels, num_classes = 8, 1, 10

    def __init__(self, fail_at=None):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))  # it has buffers
        self.fail_at, self.seen, self.validated = fail_at, [], []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("lost power")
        self.seen.append(batch[2].tolist())
        return self.net(batch[0].mean((1, 2, 3))[:, None]).square().mean()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append(batch[2].tolist())
        self.log("val", self.net(batch[0].mean((1, 2, 3))[:, None]).mean(), sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Notes(L.Callback):
    """Leaves what a process of a run saw in a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        skipped = float(trainer.logged_metrics.get("val/skipped_images", 0))
        seen = [pl_module.seen, pl_module.validated, trainer.datamodule.skipped.tolist(), skipped]
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


def record_two_processes(root, out, **options):
    """The same run by two processes: what each saw and validated, the images it skipped, and those of validation."""
    strategy = DDPStrategy(start_method=START, process_group_backend="gloo")
    record_run(root, out, devices=2, strategy=strategy, callbacks=[Notes(out)], **options)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def record_run(
    root, out, ckpt_path=None, module=None, data=None, batch_size=12, workers=0, callbacks=(), saver=Checkpoint,
    **options,
):  # fmt: skip
    """Train a Recorder to the end and give it; a checkpoint is left in `out` after each step."""
    module = module or Recorder()
    data = data or ShardDataModule(root, batch_size, workers, window=3)
    save = saver(out, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    options = {"max_steps": 7, "val_check_interval": 2, "check_val_every_n_epoch": None, "devices": 1, **options}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    L.Trainer(callbacks=[save, *callbacks], **quiet, **options).fit(module, data, ckpt_path=ckpt_path)
    return module
