"""Every command that takes several processes gives on two what it gives on one, whoever starts them.

`--devices 2` starts the second process by Lightning; two agents of torchrun on one machine are as two hosts.
"""

import json
import socket
import subprocess
import sys

import lightning.pytorch as L
import pytest
import torch
from commands import ENVIRONMENT, QUICK, ROOT, SR16, configs
from folders import hashes
from safetensors import safe_open
from small_models import smallest_stages

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data import ShardDataModule
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.evaluation.cas.classifier import Classifier

pytestmark = pytest.mark.filterwarnings("ignore")
JUDGE = ["--detector", "fashion-cnn-64"]
PROGRAM = """
import os, time
from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from cdm_lightning.__main__ import main
from cdm_lightning.foundation.process_group import wait_for_all

def be_slow():
    "One process writes a shard for longer than torch waits for it."
    import cdm_lightning.sampling.blocks as blocks
    usual, write = DDPStrategy.__init__.__defaults__, blocks.write_shard
    assert timedelta(minutes=30) in usual
    short = (timedelta(seconds=3) if isinstance(d, timedelta) else d for d in usual)
    DDPStrategy.__init__.__defaults__ = tuple(short)

    def slow(path, samples):
        if path.name == "000001.tar":
            time.sleep(3)  # at each of two resolutions
        return write(path, samples)

    blocks.write_shard = slow
    return usual

os.environ.setdefault("CDM_FIRST_PROCESS", str(os.getpid()))  # a first command that samples would say so
for line in open(os.environ["COMMANDS"]).read().splitlines():
    command = line.split(chr(9))
    usual = be_slow() if command[0] == "sample" else None
    main(command)
    wait_for_all()  # the next command reads what the first process wrote
    if usual:
        DDPStrategy.__init__.__defaults__ = usual
"""


def fit(folder, **options):
    options = {
        "max_steps": 3, "val_check_interval": 6, "accumulate_grad_batches": 2, "accelerator": "cpu",
        "default_root_dir": folder, **options,
    }  # fmt: skip
    return ["fit", *configs(SR16), *QUICK, "--data.batch_size=8", *(f"--trainer.{k}={v}" for k, v in options.items())]


def commands(out, bundle, real, devices):
    """What follows a training: samples, a card, figures, a search."""
    sample = ["sample", "--bundle", bundle, "--out", out / "samples", "--count", "30", "--block_size", "4"]
    reference = ["reference", "--shards", real, "--split", "val", "--resolution", "16", *JUDGE, "--keep", "130"]
    evaluate = ["evaluate", "--samples", f"[{out / 'samples'}]", "--references", f"[{out / 'card.safetensors'}]"]
    search = ["search", "--bundle", bundle, "--out", out / "search", "--shards", real, "--levels", "[9]"]
    search += ["--truncated", "false", "--n", "20", "--block_size", "20"]  # one shard: fewer than processes
    every = [sample, [*reference, "--out", out / "card.safetensors"], [*evaluate, *JUDGE, "--out", out / "figures"]]
    return [[*map(str, command), "--accelerator", "cpu", *devices] for command in [*every, search]]


def score(out, real, devices):
    cas = [
        "cas",
        "--samples",
        out / "samples",
        "--shards",
        real,
        "--out",
        out / "cas",
        "--seeds",
        "[4]",
        "--count",
        "20",
    ]
    recipe = ["--recipe.architecture=resnet8", "--recipe.steps=6", "--recipe.batch_size=16", "--num_workers=0"]
    return [*map(str, cas), *recipe, "--accelerator", "cpu", *devices]


@pytest.fixture(scope="module")
def one(few_real, tmp_path_factory):
    """A bundle, and what one process makes of it."""
    root = tmp_path_factory.mktemp("one")
    write_bundle(root / "bundle", smallest_stages(), {"classes": read_manifest(few_real / "val/32").classes})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for command in [fit(root), *commands(root, root / "bundle", few_real, [])]:
            main(command)
    return root


def run(processes):
    """What each of the started processes said; all must end well."""
    try:
        said = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(said), "\n".join(
        out[-3000:] + err[-3000:] for out, err in said
    )
    return said


def start(folder, lines, launcher, **environment):
    (folder / "program.py").write_text(PROGRAM)
    (folder / "commands").write_text("\n".join("\t".join(line) for line in lines))
    return subprocess.Popen(
        [sys.executable, *launcher, str(folder / "program.py")], text=True, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**ENVIRONMENT, "COMMANDS": str(folder / "commands"), **environment},
    )  # fmt: skip


def content(path):
    """All tensors of a card, and what it says but for the date."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["card"])
        facts["made"].pop("date")
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  # no mapping


def check_same(one, two):
    trained = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, two)]
    assert [run["ShardDataModule"]["images_seen"] for run in trained] == [24, 24]
    for name, value in trained[0]["current_model_state"].items():
        torch.testing.assert_close(value, trained[1]["current_model_state"][name], rtol=1e-3, atol=1e-5, msg=name)
    samples = [hashes(run / "samples") for run in (one, two)]
    assert samples[0] == samples[1] and len(samples[0]) == 2 * (8 + 1) + 1  # shards and manifests
    (tensors, facts), (others, other_facts) = (content(run / "card.safetensors") for run in (one, two))
    assert facts == other_facts and tensors.keys() == others.keys() and len(tensors) == 4
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert not list(two.glob("card.safetensors.*"))
    figures = [json.loads((run / "figures/results.json").read_text()) for run in (one, two)]
    assert figures[0]["figures"] == figures[1]["figures"]
    found = [json.loads((run / "search/results.json").read_text()) for run in (one, two)]
    assert found[0]["levels"] == found[1]["levels"]
    assert [row["figures"] for row in found[0]["rows"]] == [row["figures"] for row in found[1]["rows"]]


def check_score(out, real):
    """The last weights, tested again on one process, to the last image."""
    for kind in ("generated", "real"):
        run = out / "cas/runs" / f"{kind}-4"
        result = json.loads((run / "result.json").read_text())
        classifier, data = Classifier(16, 1, 10, "resnet8"), ShardDataModule(real, 7, 0)
        trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        last = run / "checkpoints/last.ckpt"
        [alone] = trainer.test(classifier, datamodule=data, ckpt_path=last, weights_only=True, verbose=False)
        assert result["top1"] == pytest.approx(alone["test/cas_top1"], abs=1e-6)
        assert 0.05 < result["top5"] == pytest.approx(alone["test/cas_top5"], abs=1e-6)
        assert result["per_class"] == pytest.approx(classifier.per_class.tolist(), abs=1e-6)
    assert (out / "cas/results.json").is_file()


def test_two_devices_do_what_one_process_does(one, few_real, tmp_path):
    """Of each table one process speaks; a process that writes for long is waited for."""
    devices, two = ["--devices", "2"], tmp_path / "two"
    trained = fit(two, devices=2, strategy="ddp")
    after = [*commands(two, one / "bundle", few_real, devices), score(two, few_real, devices)]
    lines = [after[0], trained, *after[1:]]  # the first connects the processes, with the patience of sampling
    [(said, errors)] = run([start(tmp_path, lines, [])])
    check_same(one, two)
    check_score(two, few_real)
    spoken = ("200 images 16x16 of 10 of 10 classes, 64 features", "┃ figure", "generated / real")
    assert said.count(" on 2 x CPU") == 1
    assert [said.count(words) for words in spoken] == [1, 1, 1] and "Traceback" not in errors


def test_two_hosts_do_what_one_process_does(one, few_real, tmp_path):
    two, hosts = tmp_path / "two", {"num_nodes": 2, "devices": 1}
    static = {"strategy": "DDPStrategy", "strategy.static_graph": "true", "precision": "bf16-mixed"}
    mixed = fit(tmp_path / "mixed", **hosts, **static, accumulate_grad_batches=1, val_check_interval=3)
    lines = [fit(two, **hosts, strategy="ddp"), mixed, *commands(two, one / "bundle", few_real, [])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = [
        ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1",
         "--master_addr=127.0.0.1", f"--master_port={port}"]
        for rank in (0, 1)
    ]  # fmt: skip
    run([start(tmp_path, lines, launcher, GLOO_SOCKET_IFNAME="lo") for launcher in launchers])
    ended = torch.load(tmp_path / "mixed/checkpoints/last.ckpt", weights_only=True)
    assert ended["global_step"] == 3 and all(w.isfinite().all() for w in ended["current_model_state"].values())
    check_same(one, two)
