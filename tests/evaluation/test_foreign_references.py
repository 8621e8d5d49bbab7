"""Reference cards, .npz files and detectors from strangers, and our own when torn: used, or refused in one sentence."""

import io
import json
import struct
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from refusals import sentence_of_error, sentence_of_refusal
from safetensors.torch import save
from strangers import FileMaker, examples, mutated_bytes, mutated_json, taking_less_than, tried

from cdm_lightning.__main__ import main
from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.detectors.loading import FOLDER
from cdm_lightning.evaluation.metrics.distance import Moments
from cdm_lightning.evaluation.metrics.features import feature_file, finished
from cdm_lightning.evaluation.references.cards import Facts, ReferenceCard, check_card, read_card
from cdm_lightning.evaluation.samples import check_counts
from cdm_lightning.stages.checkpoints import check_checkpoint
from cdm_lightning.stages.loading import load_stage

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


FACTS = Facts(
    "fashion", "val", 8, 1, "none", "none", 20, ["a", "b"], [12, 8], "small", "0" * 64, "1" * 64, {"date": "now"}
)


def card_bytes(facts):
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    moments = Moments.from_features([features])
    tensors = {"total": moments.total, "outer": moments.outer, "features": features, "places": torch.arange(20)}
    return save(tensors, {"card": json.dumps(facts)})


@examples(150, 3000)
def test_cards(tmp_path, n):
    path = tmp_path / "card.safetensors"

    def use(given_input):
        path.write_bytes(given_input if isinstance(given_input, bytes) else card_bytes(given_input))
        card = read_card(path)
        assert isinstance(card, ReferenceCard)
        check_card(card, None, 8, 1, ["a", "b"], "none", "none")
        check_counts(card, [3, 4])

    tried(n, asdict(FACTS), st.one_of(mutated_json(asdict(FACTS)), mutated_bytes(card_bytes(asdict(FACTS)))), use)


@pytest.mark.parametrize("fact", [
    {"classes": 5}, {"classes": "ab"}, {"classes": [1, 2]}, {"counts": "ab"}, {"counts": [1.5, 2]}, {"counts": [-1, 2]},
    {"resolution": "8"}, {"resolution": 0}, {"channels": True}, {"made": []}, {"crop": 3}, {"detector": "a\nb"},
])  # fmt: skip
def test_a_fact_of_another_type_makes_no_card(tmp_path, fact):
    path = tmp_path / "card.safetensors"
    path.write_bytes(card_bytes({**asdict(FACTS), **fact}))
    sentence_of_error(lambda: read_card(path), f"{path} is no reference card", next(iter(fact)))


class Means(torch.nn.Module):
    """A detector without weights."""

    name, sha256 = "means", "2" * 64

    def forward(self, image):
        return image.float().mean((2, 3)).repeat(1, 4)


@examples(80, 1000)
def test_npz(tmp_path, n):
    path, file = tmp_path / "x.npz", io.BytesIO()
    np.savez_compressed(file, mu=np.zeros(2048), arr_0=np.zeros((3, 8, 8, 1), np.uint8), arr_1=np.arange(3))

    def use(data):
        path.write_bytes(data)
        assert read_card(path, Means()).count == 3

    tried(n, file.getvalue(), mutated_bytes(file.getvalue()), use)


@examples(40, 500)
def test_checkpoints_and_detectors_of_random_bytes(tmp_path, n):
    file = io.BytesIO()
    torch.save({"stage": "BaseStage", "hyper_parameters": {"resolution": 8}, "state_dict": {}, "global_step": 3}, file)
    small = (FOLDER / "fashion-cnn-64.safetensors").read_bytes()

    def use(given_input):
        kind, data = given_input
        path = tmp_path / f"x{kind}"
        path.write_bytes(data)
        for read in {".ckpt": [load_stage, check_checkpoint], ".safetensors": [load_detector], ".pt": [load_detector]}[
            kind
        ]:
            read(path)

    strategies = [mutated_bytes(small).map(lambda d: (".safetensors", d))]
    strategies += [mutated_bytes(file.getvalue()).map(lambda d, k=k: (k, d)) for k in (".ckpt", ".pt")]
    tried(n, (".safetensors", small), st.one_of(strategies), use)


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    trace = tmp_path / "pwned"
    objects = np.array([FileMaker(trace)], dtype=object)
    for arrays in ({"mu": objects, "sigma": objects}, {"arr_0": objects}):
        np.savez(tmp_path / "x.npz", **arrays)
        sentence_of_error(lambda: read_card(tmp_path / "x.npz"), "x.npz holds")
    assert not trace.exists()


def header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("name, shape, dtype", [
    ("mu", (10**11,), "<f8"), ("mu", (1 << 28,), "|u1"), ("arr_0", (3, 60000, 60000, 3), "|u1"),
    ("mu", (8,), "<U99999999"),
])  # fmt: skip
def test_an_npz_that_unpacks_to_more_than_it_should(tmp_path, name, shape, dtype):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
        member.write(header(shape, dtype))
        for _ in range(256):  # 256 MB of zeros
            member.write(bytes(1 << 20))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sigma.npy", header((8, 8), "<f8") + bytes(512))
    with taking_less_than(100e6):
        sentence_of_error(lambda: read_card(path, Means()), "x.npz holds")


def test_files_of_our_own_that_were_torn(tmp_path, few_real, capsys):
    out, judge = str(tmp_path / "c.safetensors"), ["--detector", "fashion-cnn-64", "--accelerator", "cpu"]
    card = ["reference", "--shards", str(few_real), "--resolution", "16", "--split", "val", "--out", out, *judge]
    work = tmp_path / "c.safetensors.partial-features"
    work.mkdir()
    for text in ("{", "[1]", "\xff", ""):
        (work / "about.json").write_text(text)
        (work / "000000.safetensors").write_bytes(b"")  # a folder without features is begun anew
        assert f"{work}/about.json is damaged or foreign" in sentence_of_refusal(capsys, card)
    (work / "about.json").unlink()
    main(card)
    made = read_card(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").unlink()
    for data in (b"", b"x" * 50, save({"features": torch.zeros(3, 64), "label": torch.zeros(3)})):
        work.mkdir(exist_ok=True)
        path = feature_file(work, 1)
        path.write_bytes(data)
        assert not finished(path, 60)
        main(card)
        assert f"{path} is damaged or foreign, and is made again" in capsys.readouterr().out
        again = read_card(tmp_path / "c.safetensors")
        assert torch.equal(again.moments.outer, made.moments.outer) and torch.equal(again.features, made.features)
        (tmp_path / "c.safetensors").unlink()
