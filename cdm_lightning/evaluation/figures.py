"""One measured figure and everything needed to compare it with another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A value, its error bar and what both mean."""

    key: str  # fd, kd, precision, recall or is
    name: str  # as it may be called: "FID" with the canonical detector, else "Fréchet distance (<detector>)"
    value: float
    spread: float | None  # a standard deviation
    spread_of: str  # what it is the deviation over: "3 disjoint seeds", "100 subsets of 500", "10 splits", ""
    against: str  # split of the real images: train, val, or ""
    n: int  # generated images of each measurement
    n_reference: int  # real images
    note: str = ""
