"""Results of measurements: a figure with its name, value, spread, and the images it was measured on."""

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
    against: str  # the real images: "train", "val", a card's file name, or "" for none
    n: int  # generated images
    n_reference: int  # real images
    note: str  # "" or a caveat, such as the bias of a small n
    is_result: bool = True  # False for a distance of fewer images than it takes to estimate a covariance


@dataclass(frozen=True)
class Accuracy:
    """Classification accuracy score: the accuracy on real images of a classifier trained on one set of images."""

    trained_on: str  # "generated", "real", ...
    n: int  # training images
    top1: float  # per cent
    top5: float | None = None  # per cent; None if there are too few classes for it to mean anything
    spread: float | None = None  # one standard deviation of top1
    spread_of: str = ""


def against(figure: Figure) -> str:
    """The real images of a figure, in words."""
    return SETS.get(figure.against, figure.against)


def full_name(figure: Figure) -> str:
    """The figure's name with the real images it was measured against."""
    return f"{figure.name} against the {against(figure)}" if figure.against else figure.name


def spreads(figures: Iterable[Figure]) -> str:
    """What the spreads of the figures are over; stated once if it is the same for all."""
    meaning = {figure.name: figure.spread_of for figure in figures if figure.spread is not None}
    different = dict.fromkeys(meaning.values())
    return (
        ", ".join(different) if len(different) < 2 else "; ".join(f"{name}: {what}" for name, what in meaning.items())
    )
