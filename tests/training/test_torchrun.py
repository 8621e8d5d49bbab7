"""Two agents of torchrun on one machine, as on two hosts: training, sampling and evaluation are as of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from conftest import tiny
from test_experiments import QUICK, configs

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import write_bundle

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from cdm_lightning.__main__ import main
from cdm_lightning.sampling.shared_work import wait_for_all
for command in open(sys.argv[1]).read().splitlines():
    main(command.split(chr(9)))
    wait_for_all()  # the next command reads what the first process wrote
"""


def two_hosts(folder, commands):
    """Run `cdm` commands one after the other, each shared by one process of either agent."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "commands").write_text("\n".join("\t".join(command) for command in commands))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1",
             "--master_addr=127.0.0.1", f"--master_port={port}", str(folder / "program.py"), str(folder / "commands")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(text[-3000:] for text in said)
    return said


def fit(folder, **options):
    path = ROOT / "experiments" / "fashion" / "sr16.yaml"
    options = {
        "max_steps": 3, "val_check_interval": 6, "accumulate_grad_batches": 2, "accelerator": "cpu",
        "default_root_dir": folder, **options,
    }  # fmt: skip
    return ["fit", *configs(path), *QUICK, "--data.batch_size=8", *(f"--trainer.{k}={v}" for k, v in options.items())]


def test_two_hosts_do_what_one_process_does(tmp_path, few_real, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_bundle(tmp_path / "bundle", tiny(), {})

    judge = ["--detector", "fashion-cnn-64"]

    def commands(out):
        sample = [
            "sample",
            "--bundle",
            tmp_path / "bundle",
            "--out",
            out / "samples",
            "--count",
            "30",
            "--block_size",
            "4",
        ]
        reference = [
            "reference",
            "--shards",
            few_real,
            "--split",
            "val",
            "--resolution",
            "16",
            *judge,
            "--out",
            out / "card.safetensors",
        ]
        evaluate = ["evaluate", "--samples", f"[{out / 'samples'}]", "--references", f"[{out / 'card.safetensors'}]"]
        every = [sample, reference, [*evaluate, *judge, "--out", out / "figures"]]
        return [[*map(str, command), "--accelerator", "cpu"] for command in every]

    one, two = tmp_path / "one", tmp_path / "two"
    hosts = {"num_nodes": 2, "devices": 1}
    static = {"strategy": "DDPStrategy", "strategy.static_graph": "true", "precision": "bf16-mixed"}
    mixed = fit(tmp_path / "mixed", **hosts, **static, accumulate_grad_batches=1, val_check_interval=3)
    two_hosts(tmp_path, [fit(two, **hosts, strategy="ddp"), mixed, *commands(two)])
    ended = torch.load(tmp_path / "mixed/checkpoints/last.ckpt", weights_only=True)
    assert ended["global_step"] == 3 and all(w.isfinite().all() for w in ended["current_model_state"].values())
    for command in [fit(one), *commands(one)]:
        main(command)
    trained = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, two)]
    assert [run["ShardDataModule"]["images_seen"] for run in trained] == [24, 24]
    for name, value in trained[0]["current_model_state"].items():
        torch.testing.assert_close(value, trained[1]["current_model_state"][name], rtol=1e-3, atol=1e-5, msg=name)
    for file in (one / "samples/train").rglob("*.tar"):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes()
    figures = [json.loads((run / "figures/results.json").read_text())["figures"] for run in (one, two)]
    assert figures[0] == figures[1]
