"""Train a small detector: `python data/detector.py SHARDS OUT.safetensors [--width N] [--epochs N] [--seed N]`.

SHARDS is a folder written by `cdm prepare`, with grey or colour images of 32x32. In every batch, half of the images are
first downscaled to 16x16, so that the features suit both resolutions. data/detectors/README.md says how the shipped
detector was made.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

from cdm_lightning.evaluation.detectors import SmallCNN
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.images import downscale

BATCH, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING, SHIFT = 256, 4e-3, 5e-2, 0.05, 2


def read_split(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, uint8 (N, C, 32, 32), and their labels, int64 (N,)."""
    images, labels = zip(*read_images(root, split, SmallCNN.resolution, 1000), strict=True)
    return torch.cat(images), torch.cat(labels)


def augment(image: torch.Tensor) -> torch.Tensor:
    """Shift the batch by up to two pixels, and mirror a random half of the images: uint8 (B, C, 32, 32)."""
    down, across = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    padded = F.pad(image, [SHIFT] * 4)
    image = padded[:, :, SHIFT + down :, SHIFT + across :][:, :, : image.shape[2], : image.shape[3]]
    return torch.where(torch.rand(len(image), 1, 1, 1) < 0.5, image.flip(3), image)


def train(model: SmallCNN, image: torch.Tensor, label: torch.Tensor, epochs: int) -> None:
    """Train the classifier with AdamW and a one-cycle learning rate, and print the loss of every epoch."""
    steps = len(image) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
    for epoch in range(epochs):
        order, total = torch.randperm(len(image)), 0.0
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = augment(image[chosen])
            half = len(batch) // 2
            prepared = torch.cat([model.prepare(batch[:half]), model.prepare(downscale(batch[half:], 16))])
            logits = model.last(model.features(prepared))
            loss = F.cross_entropy(logits, label[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}", flush=True)


@torch.no_grad()
def accuracy(model: SmallCNN, image: torch.Tensor, label: torch.Tensor) -> float:
    """The share of correctly classified images, 0 ... 1."""
    model.eval()
    guess = torch.cat([model.classify(batch).argmax(1) for batch in image.split(500)])
    return (guess == label).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--width", type=int, default=24, help="channels of the first convolution")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    image, label = read_split(arguments.shards, "train")
    model = SmallCNN(image.shape[1], arguments.width, int(label.max()) + 1)
    train(model, image, label, arguments.epochs)
    held_out, held_out_label = read_split(arguments.shards, "val")
    for resolution in (32, 16, 8):
        right = accuracy(model, downscale(held_out, resolution), held_out_label)
        print(f"accuracy at {resolution}x{resolution}: {right:.4f} of {len(held_out)} validation images")
    weights = save({name: value.contiguous() for name, value in model.state_dict().items()})
    write_atomically(arguments.out, weights)
    digest = hashlib.sha256(weights).hexdigest()
    print(f"{arguments.out}: {len(weights):,} bytes, {len(image)} training images, seed {arguments.seed}")
    print(f"SHA-256 {digest}")


if __name__ == "__main__":
    main()
