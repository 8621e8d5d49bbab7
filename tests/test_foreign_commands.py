"""What a stranger may give the command line, configurations and pickles: no code in them runs."""

import json
import sys
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from commands import QUICK, ROOT, fit_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import sentence_of_error, sentence_of_refusal
from strangers import JSON, examples, write_acting_pickle

from cdm_lightning.__main__ import main
from cdm_lightning.evaluation.detectors import load_detector, load_head
from cdm_lightning.evaluation.references.cards import read_card

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


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
    arguments = [a if not a.startswith("experiments") else str(ROOT / a) for a in fit_command()]
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


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_pickle_that_acts_is_refused_wherever_it_is_given(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    trace, path = tmp_path / "pwned", tmp_path / "evil.ckpt"
    write_acting_pickle(path, trace, kind)
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)  # it would act indeed
    assert trace.exists()
    trace.unlink()
    here = f"--trainer.default_root_dir={tmp_path}/run"
    files = [ROOT / "experiments/fashion" / name for name in ("defaults.yaml", "base8.yaml")]  # none says weights_only
    plain = [*(word for file in files for word in ("--config", str(file))), *QUICK, "--model.sampling_steps=2", here]
    for command in ("fit", "validate", "test", "predict"):
        assert "evil.ckpt is not a checkpoint that can be loaded safely" in sentence_of_refusal(
            capsys, [command, *plain, f"--ckpt_path={path}"]
        )
    assert "loaded safely" in sentence_of_refusal(
        capsys, ["bundle", "--checkpoints", f"[{path}]", "--out", str(tmp_path / "b")]
    )
    (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
    path.rename(tmp_path / "run/checkpoints/last.ckpt")  # passed over where it would be gone on from
    main(["fit", *plain, "--ckpt_path=last"])
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    write_acting_pickle(tmp_path / "run/checkpoints/last.ckpt", trace, kind)
    assert "holds no whole checkpoint" in sentence_of_refusal(capsys, ["validate", *plain, "--ckpt_path=last"])
    for name, read in {"x.pt": load_detector, "x.safetensors": load_detector, "y.pth": load_head, "x.npz": read_card,
                       "c.safetensors": read_card}.items():  # fmt: skip
        write_acting_pickle(tmp_path / name, trace, kind)
        sentence_of_error(lambda n=name, r=read: r(tmp_path / n), name)
    assert not trace.exists()


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
    arguments = [a if not a.startswith("experiments") else str(ROOT / a) for a in fit_command()]
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
        main([*fit_command(), "--trainer.callbacks+=handed.Anything"])
    assert (tmp_path / "imported").exists()
    assert "imports the modules" in (ROOT / "docs/security.md").read_text()
    sys.modules.pop("handed", None)


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
