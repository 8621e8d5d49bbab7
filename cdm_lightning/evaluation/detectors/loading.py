"""Loading detectors by name or from files: the canonical Inception, SmallCNNs, and trusted TorchScript."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from cdm_lightning.evaluation.detectors import inception
from cdm_lightning.evaluation.detectors.detector import Detector, SmallCNN
from cdm_lightning.evaluation.detectors.inception import Inception, ScriptedDetector
from cdm_lightning.foundation.errors import InputError

FOLDER = Path(__file__).resolve().parents[3] / "data" / "detectors"
PINNED = {"fashion-cnn-64": "5d4a02594e8c4e0340531d6149bb5ed5808f39a28b8c2ce78e63220392c034b0"}


def load_detector(name_or_path: str | Path, trust: bool = False) -> Detector:
    """The detector of that name or in that file; in eval mode, frozen.

    name_or_path: "inception" (or its full name) for the canonical network in the cache, the name of a pinned detector,
    a .safetensors file of a SmallCNN, the canonical network's .pt file, recognised by its hash, or another TorchScript
    .pt file. The last is a program: it runs only if `trust` is true, and its SHA-256 is printed.

    The name of a detector from a file is the stem of the file. Raises InputError for an unknown name, a missing file or
    wrong weights. Nothing is unpickled.
    """
    name = str(name_or_path)
    path = FOLDER / f"{name}.safetensors" if name in PINNED else Path(name)
    if name in ("inception", Inception.name):
        return inception.load()
    if path.suffix not in (".safetensors", ".pt"):
        known = ["inception", *sorted(PINNED)]
        raise InputError(f"detector {name!r} is unknown: known are {known}, or a path to .safetensors or .pt")
    if not path.is_file():
        raise InputError(f"{path} is missing: it holds the weights of detector {path.stem}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".pt":
        return load_script(path, data, digest, trust)
    if name in PINNED and digest != PINNED[name]:
        raise InputError(f"{path} is not the detector {name}: its SHA-256 is {digest}, and {PINNED[name]} is expected")
    try:
        detector = SmallCNN.from_state_dict(load_safetensors(data))
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not hold the weights of a SmallCNN: {str(error).splitlines()[0]}") from error
    detector.name, detector.sha256 = path.stem, digest
    return detector.eval().requires_grad_(False)


def load_script(path: Path, data: bytes, digest: str, trust: bool) -> Detector:
    """The canonical network, if the file is its own; else the TorchScript in it, if `trust` is true."""
    if digest == Inception.sha256:
        return inception.read(data)
    if not trust:
        raise InputError(
            f"{path} (SHA-256 {digest}) is not the canonical Inception, and loading it would run the program in it: "
            "give --trust_detector true if you trust its maker"
        )
    print(f"{path}: running a TorchScript that is not the canonical Inception, SHA-256 {digest}")
    return ScriptedDetector.from_file(path, data, digest)
