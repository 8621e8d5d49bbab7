"""What a measurement is: one figure with its name, its spread, and what it was measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SETS = {"train": "training set", "val": "validation set"}


@dataclass(frozen=True)
class Figure:
    """One measured figure of one set of generated images. A distance is called FID or KID only with Inception."""

    key: str  # fd, kd, precision, recall or is
    name: str  # "FID", "Fréchet distance (fashion-cnn-64)", "KID", "Inception Score", "precision (inception)", ...
    value: float
    spread: float | None  # one standard deviation
    spread_of: str  # "3 disjoint seeds", "100 subsets of 500", "10 splits" or ""
    against: str  # the real images: "train", "val", the name of a card's file, or "" for none
    n: int  # generated images
    n_reference: int  # real images
    note: str  # "" or what a reader must know, such as the bias of a small n


@dataclass(frozen=True)
class Accuracy:
    """Classification accuracy score: of a classifier trained on one set of images, on real validation images."""

    trained_on: str  # "generated", "real", ...
    n: int  # images it was trained on
    top1: float  # per cent
    top5: float | None = None  # per cent; None where there are too few classes to say anything
    spread: float | None = None  # one standard deviation of top1
    spread_of: str = ""


def against(figure: Figure) -> str:
    return SETS.get(figure.against, figure.against)


def full_name(figure: Figure) -> str:
    """The figure's name and what it was measured against."""
    return f"{figure.name} against the {against(figure)}" if figure.against else figure.name


def spreads(figures: Iterable[Figure]) -> str:
    """What the spreads are over, said once where it is the same for all."""
    said = {figure.name: figure.spread_of for figure in figures if figure.spread is not None}
    different = dict.fromkeys(said.values())
    return ", ".join(different) if len(different) < 2 else "; ".join(f"{name}: {what}" for name, what in said.items())
