"""`cdm plan`: FLOPs against torch's counter, memory against a process's own, accumulation, refusals."""

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT
from refusals import sentence_of_refusal
from torch.utils.flop_counter import FlopCounterMode

from cdm_lightning.__main__ import main
from cdm_lightning.network import UNet, layers
from cdm_lightning.planning.devices import DATA_SHEETS, duration, measure_rates
from cdm_lightning.planning.estimate import MicroBatchSearch
from cdm_lightning.planning.flops import forward_flops, training_flops
from cdm_lightning.planning.memory import SimulatedStep
from cdm_lightning.planning.recipe import configurations, read_recipe
from cdm_lightning.planning.step_time import StepTime, measure_step
from cdm_lightning.stages import BaseStage, SuperResolutionStage
from cdm_lightning.stages.training_log import TrainingLog

BASE = dict(image_channels=1, num_classes=10, channels=32, channel_mult=[1, 2], num_res_blocks=1, norm_groups=16,
            attention_resolutions=[16], num_heads=2)  # fmt: skip


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_flops_are_those_that_torch_counts_in_a_forward_pass(monkeypatch):
    plain = lambda x, conv: conv(torch.nn.functional.interpolate(x, scale_factor=2))  # noqa: E731
    monkeypatch.setattr("cdm_lightning.network.unet.conv_of_upsampled", plain)  # the architecture's count
    unet = UNet(16, 6, 6, 32, (1, 2, 3), 2, (8, 4), 4, num_classes=10, level_embedding=True)
    x, t = torch.randn(2, 6, 16, 16), torch.tensor([1.0, 2.0])
    with FlopCounterMode(display=False) as counter:
        unet(x, t, torch.tensor([0, 1]), None, t)
    # torch has no entry for the CPU's flash attention: q k^T and the product with v, 2 FLOPs each, by hand
    missing = 0
    if not any("attention" in str(op) for op in counter.get_flop_counts()["Global"]):
        missing = sum(4 * tokens**2 * width * number for tokens, width, number in ((64, 64, 5), (16, 96, 6)))
    assert 2 * forward_flops(unet) == counter.get_total_flops() + 2 * missing
    assert training_flops(unet) == 3 * forward_flops(unet) and training_flops(unet, True) == 4 * forward_flops(unet)


@pytest.mark.parametrize(
    "name, parameters, gflop",  # sums over the layers by hand would be as long as the code: torch's counter gave these
    [("base32", 825_505_542, 151.319), ("sr64", 751_690_758, 504.208), ("sr256", 634_046_467, 1759.157)],
)
def test_the_papers_networks_have_these_sizes(name, parameters, gflop):
    unet = read_recipe(configurations(name, "imagenet")).stage("meta").unet
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert forward_flops(unet) / 1e9 == pytest.approx(gflop, abs=1e-3)


def on_paper(options, precision="32-true", average=True, gpu=False) -> SimulatedStep:
    with torch.device("meta"):
        stage = BaseStage(**options)
    return SimulatedStep(stage, precision, average, gpu)


MEASURE = """
import copy, json, os, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from cdm_lightning.stages.base_and_super_resolution import BaseStage
torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
def highest():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
class Between(TorchDispatchMode):
    most = 0
    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        self.most = max(self.most, resident())
        return result
def train(precision, batch, options):
    stage = BaseStage(**options)
    averaged = copy.deepcopy(stage)
    optimizer = torch.optim.Adam(stage.unet.parameters(), fused=True)
    size = (stage.image_channels, stage.resolution, stage.resolution)
    for images in (1, batch):  # the first step makes the moments
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        data = torch.rand(images, *size), torch.zeros(images, dtype=torch.int64), torch.arange(images)
        with Between() as between:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = stage.losses(data, "train", by_quarters=True)["loss"].mean()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return between.most, highest()
options = json.loads(sys.argv[1])
for precision in sys.argv[3:]:
    train(precision, 1, {**options, "channels": 16})  # libraries load what they need
    before = resident()
    print(*(most - before for most in train(precision, int(sys.argv[2]), options)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak is read from Linux's /proc")
def test_memory_on_paper_is_that_of_a_real_step(monkeypatch):
    """Between operations it is the same on every processor; what a library takes within one is that library's choice.

    Where a processor lacks instructions for bfloat16, one convolution at a time is computed on float32 copies.
    """
    options, batch, precisions = {"resolution": 32, **BASE}, 24, ["32-true", "bf16-mixed"]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps(options), str(batch), *precisions]
    done = subprocess.run(command, env={**os.environ, **given_back}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = {precision: on_paper(options, precision).memory(batch) for precision in precisions}
    monkeypatch.setattr("cdm_lightning.planning.memory.CONVOLUTIONS", ())  # without what libraries take within one
    for precision, line in zip(precisions, done.stdout.splitlines(), strict=True):
        between, highest = map(int, line.split())
        bare, memory = on_paper(options, precision).memory(batch), whole[precision]
        print(precision, *(round(size / 1e6, 1) for size in (bare.total, between, memory.total, highest)))
        assert bare.workspace == 0 and memory.activations > 0.7 * memory.total  # else the test says nothing of them
        assert bare.total == pytest.approx(between, rel=0.1)
        most = memory if precision == "32-true" else whole["32-true"]
        assert 0.85 * memory.total < highest < 1.15 * most.total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_on_paper_is_that_of_a_real_step_on_a_gpu(precision):
    options, batch, device = {"resolution": 64, **BASE, "channels": 64}, 64, torch.device("cuda")
    memory = on_paper(options, precision, gpu=True).memory(batch)
    measure_step(BaseStage(**options), 1, precision, device, seconds=0)
    gc.collect()  # what the first step left in cycles is not of the second
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    measure_step(BaseStage(**options), batch, precision, device, seconds=0)
    assert memory.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_paper_a_gpu_has_its_own_forms(precision):
    """Its norms take no scratch memory in float32, its convolutions no workspace, and upsampled images are kept."""
    options, made = {"resolution": 32, **BASE}, []
    on_gpu, on_cpu = (on_paper(options, precision, gpu=gpu) for gpu in (True, False))
    norm = next(m for m in on_gpu.stage.unet.modules() if isinstance(m, layers.ModulatedNorm))
    norm.register_forward_hook(lambda *called: made.append(called[-1].grad_fn.name()))
    one, other = (paper.memory(24) for paper in (on_gpu, on_cpu))
    assert set(made) == {"KernelNormBackward"} and one.workspace == 0
    assert other.activations < one.activations < 1.1 * other.activations
    scratch = other.temporary + other.workspace  # in bf16, temporary float32; in float32, a convolution's
    assert one.temporary < 0.3 * scratch and one.total < other.total
    assert not layers.uses_kernels(torch.zeros(1)) and layers.form(torch.zeros(1)) == "cpu"  # as before


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_and_the_gradients_of_before_are_counted_once(precision):
    paper = on_paper({"resolution": 8, **BASE, "channels": 64, "attention_resolutions": [8, 4]}, precision)
    one, later = (paper.memory(1, accumulate) for accumulate in (False, True))
    assert one.total < 5.05 * one.parameters  # weights, gradients, two moments, the average, and hardly any image
    assert later.temporary < 0.2 * later.gradients  # a new gradient at a time, beside the sum


def test_what_memory_is_made_of():
    options = {"resolution": 16, **BASE, "channel_mult": [1]}
    paper = on_paper(options)
    one, two, many = (paper.memory(n) for n in (64, 128, 192))
    assert many.activations - two.activations == two.activations - one.activations  # linear in the batch
    size = 4 * sum(p.numel() for p in paper.stage.unet.parameters())
    assert (one.parameters, one.moments, one.average, one.buckets) == (size, 2 * size, size, 0)
    assert on_paper(options, average=False).memory(64).average == 0 and paper.memory(64, devices=2).buckets == size
    assert paper.memory(64, accumulate=True).gradients == size
    assert paper.memory(64, checkpointing=True).total < 0.7 * one.total
    assert paper.memory(64) == one  # the network is as it was
    assert on_paper(options, "bf16-mixed").memory(64).activations < 0.6 * one.activations
    # beside a scaler Adam is not fused, and its step is the peak of so small a batch
    few = on_paper({**options, "resolution": 4}, "16-mixed").memory(1)
    assert few.temporary == few.gradients == few.parameters and few.activations == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_tell_the_memory_of_every_batch(checkpointing):
    """Exactly what a step of that batch takes, and without running it."""
    steps = []
    with torch.device("meta"):
        stage = BaseStage(resolution=32, **{**BASE, "channel_mult": [1]})
    paper = SimulatedStep(stage, "bf16-mixed", finished_step=lambda: steps.append(1))
    batches = (paper.steady, 3 * paper.steady, 200)
    found = [paper.memory(batch, True, 2, checkpointing) for batch in batches]
    assert len(steps) == 2 and paper.steady > 2
    paper.steady = 10**9  # each batch is simulated
    assert found == [paper.memory(batch, True, 2, checkpointing) for batch in batches]
    assert len(steps) == 4


@pytest.mark.parametrize(
    "days, text",
    [
        (1e-5, "0.864 seconds"),
        (0.01678, "24.2 minutes"),
        (0.5, "12 hours"),
        (79.03, "79 days"),
        (12_345, "12,345 days"),
    ],
)
def test_a_time_is_in_the_unit_that_people_use(days, text):
    assert duration(days) == text


def plan(tmp_path, *arguments) -> dict:
    main(["plan", *arguments, "--out", str(tmp_path / "plan.json")])
    return json.loads((tmp_path / "plan.json").read_text())


def test_the_plan_of_sr256_on_eight_gpus(tmp_path, capsys):
    eight = ["--device", "h100", "--devices", "8", "--utilisation", "0.5", "--micro_batch", "8"]
    fewer = "--model.num_res_blocks=1 --model.channel_mult=[1,2]"  # to be quick
    found = plan(tmp_path, "sr256", *eight, f"--arguments={fewer}")
    assert found["micro_batch"] * found["accumulate"] * 8 == found["batch"] == 1024 and found["fits"]
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k != "total")
    assert found["memory"]["total"] <= 0.9 * found["capacity"] == 0.9 * 80e9
    assert found["memory_checkpointing"] < found["memory_plain"]
    factor = 4 if found["checkpointing"] else 3
    assert found["training_flops"] == factor * found["forward_flops"]
    assert found["images_a_second"] == pytest.approx(8 * 0.5 * 989.4e12 / found["training_flops"])
    days = 1024 * 500_000 / found["images_a_second"] / 86400
    assert found["days"] == pytest.approx(days) and found["device_days"] == pytest.approx(8 * days)
    said = capsys.readouterr().out
    accumulate = f"--trainer.accumulate_grad_batches {found['accumulate']}"
    assert f'make train-stage STAGE=sr256 ARGS="{fewer} --trainer.devices 8 {accumulate}' in said
    assert "assumed" in said and "measured" in said
    first = said.splitlines()[0]  # before the memory is known
    assert first.startswith("sr256: ") and "GFLOP an image; 500,000 steps of 1,024 images in" in first
    assert f"{duration(found['days'])} on 8 x H100 at 50% of its data sheet, or" in first
    assert f"500,000 steps in {duration(found['days'])}, {duration(found['device_days'])} of one device" in said


def test_a_share_that_a_recipe_reached_on_a_device_is_taken_there(tmp_path, capsys):
    table = yaml.safe_load((ROOT / "experiments/gpu/shares.yaml").read_text())
    assert set(table) <= set(DATA_SHEETS) and all(0 < share < 1 for row in table.values() for share in row.values())
    for recipe in {name for row in table.values() for name in row}:
        experiment, stage = recipe.split("/")
        assert configurations(stage, experiment)[-1].is_file()
    fewer = "--arguments=--model.num_res_blocks=1 --model.channel_mult=[1] --model.channels=32"
    small = ["sr256", "--micro_batch", "8", fewer]
    for precision, share, basis in (
        (
            "bf16-mixed",
            table["H100"]["imagenet/sr256"],
            "as with the micro-batch in experiments/gpu/shares.yaml",
        ),
        ("32-true", 0.4, "nothing was measured"),
    ):
        found = plan(tmp_path, *small, "--device", "H100", "--precision", precision)
        rate = DATA_SHEETS["H100"].rate(precision)
        assert found["images_a_second"] == pytest.approx(share * rate / found["training_flops"]), precision
        assert basis in found["speed"] and f"at {share:.0%} of its data sheet" in capsys.readouterr().out


def test_a_micro_batch_that_was_asked_for_and_fits_needs_no_checkpointing(tmp_path):
    found = plan(tmp_path, "base8", "--experiment", "fashion", "--device", "H100", "--micro_batch", "2")
    assert not found["checkpointing"] and found["training_flops"] == 3 * found["forward_flops"]


def test_a_command_that_make_would_misread_is_given_as_one_of_cdm(tmp_path):
    options = '--model.attention_resolutions "[8, 4]"'
    about = ["base8", "--experiment", "fashion", "--device", "H100", "--micro_batch", "2"]
    found = plan(tmp_path, *about, f"--arguments={options}")
    assert found["command"].startswith("cdm fit --config experiments/defaults.yaml") and options in found["command"]


@pytest.mark.long
@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "imagenet").glob("*[0-9].yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("device", DATA_SHEETS)
def test_every_stage_of_imagenet_can_be_planned(path, device, tmp_path):
    found = plan(tmp_path, path.stem, "--device", device, "--devices", "4")
    assert found["fits"] and found["micro_batch"] * found["accumulate"] * 4 == found["batch"]


def test_a_plan_for_the_device_at_hand_is_timed(tmp_path, capsys):
    options = "--model.channels 16 --model.norm_groups 4 --data.batch_size 8 --trainer.max_steps 1000"
    configs = json.dumps([str(path) for path in configurations("base8", "fashion")])
    found = plan(tmp_path, "--configs", configs, f"--arguments={options}", "--micro_batch", "4")
    assert found["speed"].startswith("timed at 4 images") and found["accumulate"] == 2
    assert found["days"] == pytest.approx(8000 / found["images_a_second"] / 86400)
    assert found["matmul_rate"] > 0 and found["convolution_rate"] > 0
    assert found["command"].startswith("cdm fit --config experiments/defaults.yaml") and options in found["command"]
    assert read_recipe(configurations("base8", "fashion"), options).batch == 8


def test_a_recipe_that_compiles_is_timed_so(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr("cdm_lightning.network.unet.UNet.compile", lambda self, mode: modes.append(mode))
    options = "--model.channels 16 --model.norm_groups 4 --data.batch_size 4 --model.compile default"
    configs = json.dumps([str(path) for path in configurations("base8", "fashion")])
    found = plan(tmp_path, "--configs", configs, f"--arguments={options}")
    assert modes == ["default"] and found["speed"].startswith("timed compiled as default at 4 images")


@pytest.mark.long
@pytest.mark.parametrize("name", ["base8", "sr16", "sr32"])
def test_the_rate_of_a_timed_step_is_that_of_fit(name, tmp_path, monkeypatch):
    """Both in processor time of this process, which other people's work on the machine does not change."""
    ends: list[float] = []
    monkeypatch.setattr("cdm_lightning.planning.step_time.time.perf_counter", time.process_time)
    monkeypatch.setattr(TrainingLog, "on_train_batch_end", lambda *arguments: ends.append(time.process_time()))
    recipe = read_recipe(configurations(name, "fashion"))
    took = measure_step(recipe.stage("cpu"), recipe.batch, recipe.precision, torch.device("cpu"), recipe.average)
    configs = [word for path in configurations(name, "fashion") for word in ("--config", str(path))]
    short = ["--trainer.max_steps=20", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    main(["fit", *configs, *short, f"--trainer.default_root_dir={tmp_path}"])
    rate = recipe.batch * 15 / (ends[-1] - ends[4])
    print(name, took.images_a_second(recipe.batch, 1), rate)
    assert took.images_a_second(recipe.batch, 1) == pytest.approx(rate, rel=0.2)


def test_images_a_second_count_one_update_for_all_accumulated_batches():
    took = StepTime(batch=4, forward_backward=2.0, update=1.0)
    assert took.images_a_second(4, 1) == 4 / 3 and took.images_a_second(8, 2) == 16 / 9


def test_the_largest_micro_batch_that_fits_is_a_divisor():
    with torch.device("meta"):
        stage = SuperResolutionStage(
            resolution=16, low_resolution=8, augmentation="blur", **{**BASE, "channel_mult": [1]}
        )
    paper = SimulatedStep(stage, "32-true")
    whole = MicroBatchSearch(paper, 24, 1, 1e12)
    assert whole.largest(False) == 24
    assert MicroBatchSearch(paper, 24, 1, whole.memory(12, False).total + paper.size).largest(False) == 12
    assert MicroBatchSearch(paper, 24, 1, 1).largest(False) == 1 and not MicroBatchSearch(paper, 24, 1, 1).fits(
        1, False
    )


def test_measured_rates_are_those_of_this_machine():
    rates = measure_rates(torch.device("cpu"), torch.float32, seconds=0.05)
    assert all(1e8 < rate < 1e14 for rate in asdict(rates).values())


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["sr65"], "stage 'sr65' is none of experiments/imagenet: known are base16, base32"),
        (["defaults"], "stage 'defaults' is none of"),
        (["sr64", "--experiment", "nowhere"], "experiment 'nowhere' is no folder of"),
        (["sr64", "--device", "H300"], "device 'H300' is none of H100, H200, B200, A100"),
        (["sr64", "--devices", "3"], "batch_size 2048 cannot be shared by 3 devices"),
        (["sr64", "--devices", "0"], "devices 0 is less than 1"),
        (["sr64", "--micro_batch", "5"], "micro_batch 5 does not divide the 2048 images"),
        (["sr64", "--micro_batch", "0"], "micro_batch 0 does not divide"),
        (["sr64", "--precision", "64-true"], "precision '64-true' is none that a plan knows"),
        pytest.param(
            ["sr64", "--precision", "16-mixed"],
            "precision 16-mixed needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
        (["sr64", "--utilisation", "1.5"], "utilisation 1.5 lies outside"),
        (["sr64", "--arguments=--trainer.max_steps=-1"], "max_steps -1 says no length"),
        (["--configs", '["nowhere.yaml"]'], "configuration nowhere.yaml does not exist"),
        ([], "give one of a stage and configs"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, sentence):
    assert sentence in sentence_of_refusal(capsys, ["plan", *arguments])
