"""What docs/cluster.md says: the batch over any number of machines, SLURM's script, and what is refused."""

import os
import re
import subprocess

import pytest
import yaml
from commands import QUICK, ROOT, configs

from cdm_lightning.__main__ import main

SCRIPT = ROOT / "experiments" / "slurm.sh"


@pytest.mark.parametrize("code, requeued, left", [(0, False, 0), (138, True, 0), (2, False, 2)])
def test_the_slurm_script_asks_for_the_same_job_again_after_a_signal_alone(tmp_path, code, requeued, left):
    """With stand-ins that write down their arguments, of which srun leaves as the run would."""
    for name, ends in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/{name}.txt\nexit {ends}\n')
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "4", "SLURM_JOB_ID": "77",
        "SLURM_NTASKS_PER_NODE": "8(x4)",
    }  # fmt: skip
    command = ["bash", str(SCRIPT), "imagenet", "sr64", "--trainer.accumulate_grad_batches", "4"]
    assert subprocess.run(command, env=environment, cwd=ROOT).returncode == left
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "77"]
    words = (tmp_path / "srun.txt").read_text().split()
    arguments = words[words.index("fit") :]
    assert arguments[arguments.index("--trainer.num_nodes") + 1] == "4"
    assert arguments[arguments.index("--trainer.devices") + 1] == "8"


def test_the_arguments_of_the_slurm_script_are_understood(capsys):
    line = re.search(r"cdm (fit .*?)\"\$@\"", SCRIPT.read_text().replace("\\\n", " "), re.S).group(1)
    for name, value in {
        '"$SLURM_NNODES"': "1", '"${SLURM_NTASKS_PER_NODE%%(*}"': "1", "$experiment": "imagenet", "$stage": "sr64",
        "accelerator gpu": "accelerator cpu", '"': "",
    }.items():  # fmt: skip
        line = line.replace(name, value)
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["batch_size"] == 2048 and printed["trainer"]["strategy"] == "ddp"


def test_the_pages_batches_are_the_files(tmp_path):
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "docs/cluster.md").read_text(), re.M
    )
    stated = {}
    for name in ("base32", "sr64", "sr128", "sr256"):
        stated[name] = yaml.safe_load((ROOT / f"experiments/imagenet/{name}.yaml").read_text())["data"]["batch_size"]
    assert stated == {"base32": 2048, "sr64": 2048, "sr128": 1024, "sr256": 1024} and len(rows) == 5
    for machines, *pairs in (map(int, row) for row in rows):
        assert [machines * 8 * pairs[0] * pairs[1], machines * 8 * pairs[2] * pairs[3]] == [2048, 1024]


def test_a_static_graph_does_not_accumulate(tmp_path, capsys):
    strategy = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.static_graph=true", "--trainer.devices=1"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs(ROOT / "experiments/fashion/base8.yaml"), *QUICK, *strategy, "--trainer.accelerator=cpu",
              "--trainer.accumulate_grad_batches=2", f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert stop.value.code == 2 and "static_graph exclude each other" in capsys.readouterr().err
