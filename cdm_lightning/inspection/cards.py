"""Reference cards, and ADM's .npz of statistics or of samples."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from cdm_lightning.evaluation.references import adm
from cdm_lightning.evaluation.references.cards import bias_note, read_card
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.inspection.findings import Findings, about_classes, settings, size_of, written
from cdm_lightning.inspection.networks import torn_member


def is_card(path: Path) -> bool:
    """Whether a .safetensors says that it is a reference card. Refuses a file that is no safetensors."""
    try:
        with safe_open(path, "pt") as stored:
            return "card" in (stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {str(error).splitlines()[0]}") from error


def inspect_card(path: Path, check: bool) -> Findings:
    """What a reference card holds. Reading it looks at every number; it has no hash of its own."""
    card = read_card(path)
    kept = 0 if card.features is None else len(card.features)
    found = Findings(f"a reference card, features of {card.detector}")
    found.note(
        images=f"{card.count:,}, {card.resolution}x{card.resolution}, {card.channels} channels" if card.count else None,
        features=f"{len(card.moments.total)} per image; those of {kept:,} images are kept, for KID and precision",
        classes=about_classes(card.classes, card.counts), source=card.source, split=card.split, crop=card.crop,
        filter=card.filter, size=size_of(path.stat().st_size), made=card.made.get("date") or written(path),
        versions=settings(v) if isinstance(v := card.made.get("versions"), dict) else None,
        detector_SHA256=card.detector_sha256[:16], note=bias_note(card.count),
        hash="none is recorded: --check finds numbers that are not finite, and no others",
    )  # fmt: skip
    return found


def inspect_npz(path: Path, check: bool) -> Findings:
    """What an .npz of ADM holds: statistics, images, or both. check: compare every CRC-32, and read every number."""
    names = adm.names_in(path)
    statistics = {"mu", "sigma"} <= names
    if not statistics and "arr_0" not in names:
        raise InputError(f"{path} holds {sorted(names)[:8]}, and neither mu and sigma nor images arr_0")
    found = Findings("ADM's .npz: " + ("a reference card" if statistics else "images"))
    if images := found.try_to(lambda: adm.find_images(path)) if "arr_0" in names else None:
        n, height, width, channels = images.shape
        found.note(images=f"{n:,}, {height}x{width}, {channels} channels")
        counts = found.try_to(lambda: adm.count_labels(path, n)) if "arr_1" in names else None
        found.note(classes=f"{sum(map(bool, counts))} with images" if counts else None)
    if statistics:
        found.note(statistics="mu and sigma; how many images they are of is not recorded")
        found.try_to(lambda: read_card(path))
    found.note(arrays=", ".join(sorted(names)[:8]), size=size_of(path.stat().st_size), written=written(path))
    if check and not found.damage and (torn := torn_member(path)):
        found.damage.append(f"{path} is damaged: the CRC-32 of {torn} is another")
    return found
