"""Files from strangers: used, or refused in one sentence; no code in them runs, and none takes all memory."""

import gzip
import hashlib
import io
import json
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_cli import ROOT, fit, refused
from test_experiments import QUICK
from test_shards import make_folder, refuses

from cdm_lightning.__main__ import main
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import digest, read_bundle, write_bundle
from cdm_lightning.data.preparation.raw_images import decode as decode_raw
from cdm_lightning.data.preparation.raw_images import list_train_archive, list_val_archive
from cdm_lightning.data.shards import Manifest, Shard, read_manifest, read_shard
from cdm_lightning.data.shards.reading import decode_sample
from cdm_lightning.data.shards.tar import MAX_FILE_BYTES
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.evaluation.detectors import load_detector, load_head
from cdm_lightning.evaluation.detectors.loading import FOLDER
from cdm_lightning.evaluation.metrics.distance import Moments
from cdm_lightning.evaluation.metrics.features import feature_file, finished
from cdm_lightning.evaluation.references.cards import Facts, ReferenceCard, check_card, read_card
from cdm_lightning.evaluation.samples import check_counts
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.sampling.sample import origin
from cdm_lightning.stages.loading import check_checkpoint, load_stage

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def examples(few, many):
    """So many inputs by default, always the same ones; so many, others each time, with the long tests."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=[pytest.mark.long, pytest.mark.timeout(0)])])


def tried(n, whole, strategy, use):
    """use(whole) succeeds; use(input) of n others may succeed or refuse in one line, and do nothing else."""
    use(whole)
    counts = {"used": 0, "refused": 0}

    @settings(max_examples=n, deadline=None, database=None, derandomize=n < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(given_input):
        try:
            use(given_input)
            counts["used"] += 1
        except InputError as error:
            assert "\n" not in str(error) and str(error)
            counts["refused"] += 1

    run()
    print(f"{n} inputs: {counts}")
    assert counts["refused"] > n // 20  # else nothing was tried
    return counts


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**12)
    | st.floats()
    | st.sampled_from(["", "x", "../x", "8", "\n", "ü"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name"]), inner, max_size=2),
    max_leaves=4,
)


def paths_in(value, path=()):
    """Paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from ([path] if path else [])
    for name, each in inside:
        yield from paths_in(each, (*path, name))


@st.composite
def mutated_json(draw, value):
    """The JSON value with one or two of its parts left out, changed a little, or replaced by anything."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(paths_in(value)) or [()]))
        holder = value
        for name in path[:-1]:
            holder = holder[name]
        if not path:
            continue
        old, kind = holder[path[-1]], draw(st.sampled_from(["any", "any", "like", "like", "out"]))
        if kind == "out":
            del holder[path[-1]]
        elif kind == "like" and type(old) is int:
            holder[path[-1]] = old + draw(st.integers(-3, 3))
        elif kind == "like" and isinstance(old, (list, str)) and old:
            holder[path[-1]] = draw(st.sampled_from([old[1:], old + old[:1], old * 2, old[::-1]]))
        else:
            holder[path[-1]] = draw(JSON)
    return value


@st.composite
def mutated_bytes(draw, data):
    """Bytes with some changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        last = max(0, len(data) - 1)
        place = draw(
            st.integers(0, last)
            | st.integers(0, min(600, last))
            | st.integers(0, last).map(lambda k, end=last: end - k)
        )
        kind = draw(st.sampled_from(["change", "change", "cut", "insert", "repeat", "zero"]))
        if kind == "change":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 600))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "repeat":
            data[place:place] = data[place : place + 512]
        else:
            data[place : place + 512] = bytes(len(data[place : place + 512]))
    return bytes(data)


# ---------------------------------------------------------------------------------------------------- mutated by chance


@examples(150, 4000)
def test_manifests(tmp_path, n):
    make_folder(tmp_path / "train/8", [3, 2])
    folder, whole = tmp_path / "train/8", json.loads((tmp_path / "train/8/manifest.json").read_text())

    def use(table):
        (folder / "manifest.json").write_text(json.dumps(table))
        manifest = read_manifest(folder)
        for batch in ShardStream(folder, manifest, manifest.resolution, 2, end=manifest.count):
            assert batch[0].dtype == torch.uint8

    tried(n, whole, mutated_json(whole), use)


@examples(60, 1000)
def test_manifests_of_random_bytes(tmp_path, n):
    manifest = make_folder(tmp_path, [3])
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    assert manifest.count == 3
    tried(n, data, mutated_bytes(data), lambda mutated: (path.write_bytes(mutated), read_manifest(tmp_path)))


@examples(150, 4000)
def test_shards(tmp_path, n):
    """The manifest vouches for the bytes, so that what is read is what the stranger wrote."""
    manifests = {}
    for suffix in (".tar", ".tar.gz"):
        manifests[suffix] = make_folder(tmp_path / suffix, [4], suffix=suffix)

    def use(given_input):
        suffix, data = given_input
        folder, manifest = tmp_path / suffix, manifests[suffix]
        path = folder / manifest.shards[0].name
        path.write_bytes(data)
        shard = Shard(path.name, 4, len(data), hashlib.sha256(data).hexdigest())
        for batch in ShardStream(folder, replace(manifest, shards=[shard]), 8, 4, end=4):
            assert batch[0].shape == (4, 1, 8, 8) and int(batch[1].min()) >= 0 and int(batch[1].max()) < 10

    def mutated(suffix):
        return mutated_bytes((tmp_path / suffix / f"000{suffix}").read_bytes()).map(lambda data: (suffix, data))

    whole = (".tar.gz", (tmp_path / ".tar.gz/000.tar.gz").read_bytes())
    tried(n, whole, st.one_of(mutated(".tar"), mutated(".tar.gz")), use)


@examples(100, 2500)
def test_pngs(tmp_path, n):
    manifest = make_folder(tmp_path, [1], channels=3)
    [sample] = read_shard(tmp_path / "000.tar")

    def use(data):
        image, label = decode_sample({**sample, "png": data}, manifest)
        assert image.shape == (8, 8, 3) and label == 0

    tried(n, sample["png"], mutated_bytes(sample["png"]), use)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    stages = tiny()
    write_bundle(folder, stages, {"levels": [3], "truncated": False, "classes": None})
    return folder


@examples(60, 2500)
def test_bundles(bundle, n):
    """Changed by one who knows to compute the hashes anew."""
    whole = json.loads((bundle / "bundle.json").read_text())

    def bounded(value):  # a network of 10^12 channels is not refused, see docs/security.md
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value if abs(value) < 300 else 7
        if isinstance(value, dict):
            return {name: bounded(each) for name, each in value.items()}
        return [bounded(each) for each in value] if isinstance(value, list) else value

    def use(table):
        table = bounded(table)
        if isinstance(table.get("stages"), list) and "stages_sha256" in table:
            table["stages_sha256"] = digest(table["stages"])
        (bundle / "bundle.json").write_text(json.dumps(table))
        cascade = CascadeModule(bundle)
        origin(json.loads((bundle / "bundle.json").read_text()))
        assert cascade.resolution == 16

    try:
        tried(n, whole, mutated_json(whole), use)
    finally:
        (bundle / "bundle.json").write_text(json.dumps(whole))


@examples(40, 1500)
def test_weights(bundle, n):
    whole = json.loads((bundle / "bundle.json").read_text())
    path = bundle / whole["stages"][0]["weights"]
    data = path.read_bytes()

    def use(mutated):
        path.write_bytes(mutated)
        entry = {**whole["stages"][0], "sha256": hashlib.sha256(mutated).hexdigest()}
        table = {**whole, "stages": [entry, whole["stages"][1]]}
        (bundle / "bundle.json").write_text(json.dumps({**table, "stages_sha256": digest(table["stages"])}))
        read_bundle(bundle)

    try:
        tried(n, data, mutated_bytes(data), use)
    finally:
        path.write_bytes(data)
        (bundle / "bundle.json").write_text(json.dumps(whole))


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
    refuses(lambda: read_card(path), f"{path} is no reference card", next(iter(fact)))


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


KEYS = ["model", "model.lr", "model.class_path", "model.init_args", "data", "data.root", "data.on_damage", "trainer",
        "trainer.max_steps", "trainer.callbacks", "trainer.logger", "trainer.strategy", "trainer.plugins", "ckpt_path",
        "seed_everything", "nonsense", "trainer.profiler", "weights_only"]  # fmt: skip
VALUES = JSON | st.sampled_from(
    ["os.system", "builtins.exec", "${oc.env:HOME}", "${oc.decode:'1'}", "${nowhere}", "${", "!!python/name:os.system",
     {"class_path": "os.system", "init_args": {"command": "touch pwned"}}, {"class_path": "subprocess.Popen"},
     {"class_path": "cdm_lightning.stages.BaseStage", "init_args": {"resolution": []}}, [{"class_path": "pdb.Pdb"}]]
)  # fmt: skip


@examples(12, 400)
def test_configurations(tmp_path, n, monkeypatch, capsys):
    """Parsed, by the real command line, or refused with exit code 2, and never a traceback."""
    monkeypatch.chdir(tmp_path)
    arguments = [a if not a.startswith("experiments") else str(ROOT / a) for a in fit()]
    outcomes = {0: 0, 2: 0}

    @settings(
        max_examples=n, deadline=None, database=None, derandomize=n < 100, suppress_health_check=list(HealthCheck)
    )
    @given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3) | st.binary(max_size=20))
    def run(table):
        text = table if isinstance(table, bytes) else json.dumps(nested(table)).encode()
        Path("given.yaml").write_bytes(text)
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--config", "given.yaml", "--print_config"])
        outcomes[stop.value.code or 0] += 1

    run()
    assert "Traceback" not in capsys.readouterr().err and not Path("pwned").exists()
    assert outcomes[2] > n // 4
    print(f"{n} inputs: {outcomes}")


def nested(table):
    made = {}
    for name, value in ((name, deepcopy(value)) for name, value in table.items()):
        first, *rest = name.split(".", 1)
        if rest and isinstance(made.setdefault(first, {}), dict):
            made[first][rest[0]] = value
        elif not rest:
            made[first] = value
    return made


# ------------------------------------------------------------------------------------------------- written with intent


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def evil_checkpoint(path, trace, kind):
    if kind == "torch":
        torch.save({"stage": "BaseStage", "state_dict": {}, "callbacks": Evil(trace)}, path)
    elif kind == "legacy":
        torch.save(Evil(trace), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Evil(trace)))


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_pickle_that_acts_is_refused_wherever_it_is_given(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    trace, path = tmp_path / "pwned", tmp_path / "evil.ckpt"
    evil_checkpoint(path, trace, kind)
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)  # it would act indeed
    assert trace.exists()
    trace.unlink()
    here = f"--trainer.default_root_dir={tmp_path}/run"
    files = [ROOT / "experiments/fashion" / name for name in ("defaults.yaml", "base8.yaml")]  # none says weights_only
    plain = [*(word for file in files for word in ("--config", str(file))), *QUICK, "--model.sampling_steps=2", here]
    for command in ("fit", "validate", "test", "predict"):
        assert "evil.ckpt is not a checkpoint that can be loaded safely" in refused(
            capsys, [command, *plain, f"--ckpt_path={path}"]
        )
    assert "loaded safely" in refused(capsys, ["bundle", "--checkpoints", f"[{path}]", "--out", str(tmp_path / "b")])
    (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
    path.rename(tmp_path / "run/checkpoints/last.ckpt")  # passed over where it would be gone on from
    main(["fit", *plain, "--ckpt_path=last"])
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    evil_checkpoint(tmp_path / "run/checkpoints/last.ckpt", trace, kind)
    assert "holds no whole checkpoint" in refused(capsys, ["validate", *plain, "--ckpt_path=last"])
    for name, read in {"x.pt": load_detector, "x.safetensors": load_detector, "y.pth": load_head, "x.npz": read_card,
                       "c.safetensors": read_card}.items():  # fmt: skip
        evil_checkpoint(tmp_path / name, trace, kind)
        refuses(lambda n=name, r=read: r(tmp_path / n), name)
    assert not trace.exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    trace = tmp_path / "pwned"
    objects = np.array([Evil(trace)], dtype=object)
    for arrays in ({"mu": objects, "sigma": objects}, {"arr_0": objects}):
        np.savez(tmp_path / "x.npz", **arrays)
        refuses(lambda: read_card(tmp_path / "x.npz"), "x.npz holds")
    assert not trace.exists()


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("name, shape, dtype", [
    ("mu", (10**11,), "<f8"), ("mu", (1 << 28,), "|u1"), ("arr_0", (3, 60000, 60000, 3), "|u1"),
    ("mu", (8,), "<U99999999"),
])  # fmt: skip
def test_an_npz_that_unpacks_to_more_than_it_should(tmp_path, name, shape, dtype):
    path, before = tmp_path / "x.npz", memory()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
        member.write(header(shape, dtype))
        for _ in range(256):  # 256 MB of zeros
            member.write(bytes(1 << 20))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sigma.npy", header((8, 8), "<f8") + bytes(512))
    refuses(lambda: read_card(path, Means()), "x.npz holds")
    assert memory() - before < 100e6


def bomb(width, height):
    """A PNG that claims a size, with a kilobyte of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", about)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def test_a_png_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path):
    manifest = Manifest(8, 3, "train", ["a"], [1], [])
    for size in ((100_000, 100_000), (12_000, 12_000), (8, 12_000)):
        before = memory()
        sample = {"__key__": "0", "__url__": "x.tar", "png": bomb(*size), "cls": b"0"}
        refuses(
            lambda s=sample: decode_sample(s, manifest), "x.tar", "where 8x8 is expected" if size[0] < 10**5 else ""
        )
        assert memory() - before < 50e6
    with pytest.raises(ValueError, match="decompression bomb"):  # which `cdm prepare` counts as unreadable
        decode_raw(bomb(100_000, 100_000))


def test_a_picture_that_another_program_would_draw_is_no_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file's name ends in."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="no known image format"):
        decode_raw(script)
    assert not started


def tar_of(*members):
    """A tar of (name, data or TarInfo's changes) entries."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, dict):
                for key, value in data.items():
                    setattr(info, key, value)
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


MEMBERS = {
    "absolute": ("/tmp/pwned.png", b"x"),
    "parent": ("../pwned.png", b"x"),
    "parent inside": ("a/../../pwned.png", b"x"),
    "symbolic link": ("0.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("0.png", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    "device": ("0.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
    "fifo": ("0.png", {"type": tarfile.FIFOTYPE}),
    "control signs": ("a\x1b[31m\n.png", b"x"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_members_that_could_reach_outside_are_refused_by_name(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    member, rule = MEMBERS[case], "is refused" if isinstance(MEMBERS[case][1], bytes) else "plain files alone are read"
    for data in (tar_of(("0.cls", b"1"), member), gzip.compress(tar_of(member))):
        Path("x.tar").write_bytes(data)
        refuses(lambda: list(read_shard(Path("x.tar"))), "x.tar holds", repr(member[0]), rule)
    Path("raw.tar").write_bytes(tar_of(member))
    for read in (lambda: list_train_archive(Path("raw.tar")), lambda: list_val_archive(Path("raw.tar"), Path("d"))):
        refuses(read, "raw.tar holds", repr(member[0]), rule)
    Path("devkit.tar.gz").write_bytes(gzip.compress(tar_of(member)))
    Path("val.tar").write_bytes(tar_of(("ILSVRC2012_val_00000001.JPEG", b"x")))
    refuses(lambda: list_val_archive(Path("val.tar"), Path("devkit.tar.gz")), "devkit.tar.gz holds", repr(member[0]))
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar", "raw.tar", "devkit.tar.gz", "val.tar"}


def test_archives_that_claim_or_unpack_to_more_than_they_should(tmp_path):
    path, before = tmp_path / "x.tar.gz", memory()
    info = tarfile.TarInfo("0.png")
    info.size = 10**12
    path.write_bytes(gzip.compress(info.tobuf() + bytes(10240)))
    refuses(lambda: list(read_shard(path)), f"'0.png' of {10**12} bytes: more than {MAX_FILE_BYTES} is no image")
    info.size = MAX_FILE_BYTES
    many = info.tobuf() + bytes(MAX_FILE_BYTES)
    with gzip.open(path, "wb", compresslevel=1) as file:  # 256 MB of zeros
        for _ in range(4):
            file.write(many)
    refuses(lambda: [len(s) for s in read_shard(path)], "it unpacks to far more than its size")
    longname = tarfile.TarInfo("././@LongLink")
    longname.type, longname.size = tarfile.GNUTYPE_LONGNAME, 4 * MAX_FILE_BYTES
    with gzip.open(path, "wb", compresslevel=1) as file:  # a name of 256 MB
        file.write(longname.tobuf())
        for _ in range(4):
            file.write(bytes(MAX_FILE_BYTES))
    refuses(lambda: list(read_shard(path)), "it unpacks to far more than its size")
    assert memory() - before < 6 * MAX_FILE_BYTES


YAML = {
    "a tag that calls": "model: !!python/object/apply:os.system ['touch pwned']",
    "a tag that builds": "trainer:\n  callbacks: !!python/object/new:subprocess.Popen [['touch', 'pwned']]",
    "a function as a callback": "trainer:\n  callbacks: [{class_path: os.system, init_args: {command: touch pwned}}]",
    "a class that is no callback": "trainer:\n  callbacks: [{class_path: subprocess.Popen, init_args: {args: [id]}}]",
    "a class that is no model": "model: {class_path: subprocess.Popen, init_args: {args: [touch, pwned]}}",
    "a class that is no logger": "trainer:\n  logger: {class_path: subprocess.Popen, init_args: {args: [touch, x]}}",
    "an unknown resolver": "data:\n  root: ${shell:touch pwned}",
}


@pytest.mark.parametrize("case", YAML)
def test_a_configuration_does_not_run_what_is_no_part_of_a_training(tmp_path, case, capsys, monkeypatch):
    arguments = [a if not a.startswith("experiments") else str(ROOT / a) for a in fit()]
    monkeypatch.chdir(tmp_path)
    Path("given.yaml").write_text(YAML[case])
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--config", "given.yaml"])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"given.yaml"}


def test_a_configuration_imports_the_modules_that_it_names(tmp_path, capsys, monkeypatch):
    """As docs/security.md says: a configuration is trusted as a script is."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / "handed.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    with pytest.raises(SystemExit):
        main([*fit(), "--trainer.callbacks+=handed.Anything"])
    assert (tmp_path / "imported").exists()
    assert "imports the modules" in (ROOT / "docs/security.md").read_text()
    sys.modules.pop("handed", None)


# ------------------------------------------------------------------------------------------- our own folders, torn


def test_files_of_our_own_that_were_torn(tmp_path, few_real, capsys):
    out, judge = str(tmp_path / "c.safetensors"), ["--detector", "fashion-cnn-64", "--accelerator", "cpu"]
    card = ["reference", "--shards", str(few_real), "--resolution", "16", "--split", "val", "--out", out, *judge]
    work = tmp_path / "c.safetensors.partial-features"
    work.mkdir()
    for text in ("{", "[1]", "\xff", ""):
        (work / "about.json").write_text(text)
        assert f"{work}/about.json is damaged or foreign" in refused(capsys, card)
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


@pytest.mark.parametrize("arguments, words", [
    (["evaluate", "--samples", "[x]", "--references", "[y]", "--out", "z", "--resolution", "0"], "resolution"),
    (["evaluate", "--samples", "[x]", "--references", "[y]", "--out", "z", "--devices", "-3"], "devices"),
    (["evaluate", "--samples", "[x]", "--references", "[y]", "--out", "z", "--batch_size", "0"], "batch_size"),
    (["reference", "--shards", "x", "--out", "z.safetensors", "--resolution", "0"], "resolution"),
    (["search", "--bundle", "x", "--out", "z", "--devices", "0"], "devices"),
    (["sample", "--bundle", "x", "--out", "z", "--count", "1", "--devices", "-3"], "devices"),
    (["cas", "--samples", "x", "--out", "z", "--devices", "0"], "devices"),
    (["cas", "--samples", "x", "--out", "z", "--num_workers", "-1"], "num_workers"),
    (["npz", "--samples", "x", "--out", "z.npz", "--resolution", "-8"], "resolution"),
])  # fmt: skip
def test_numbers_that_are_none_are_refused_by_name(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and ">" in said and "Traceback" not in said
