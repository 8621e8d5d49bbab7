"""A cascade in six lines of Python, as a folder that travels, and as a pipeline of diffusers."""

import numpy as np
import pytest
import torch
from commands import ROOT
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LCMScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
)
from refusals import sentence_of_error
from small_models import smallest_stages

from cdm_lightning import CascadeModule
from cdm_lightning.__main__ import main
from cdm_lightning.cascade import hub
from cdm_lightning.data.shards import read_shard
from cdm_lightning.foundation.images import decode_png, quantize, to_uint8
from cdm_lightning.foundation.randomness import TorchStreams

SHIPPED = ROOT / "data" / "fashion-cascade"


@pytest.fixture
def folder(tmp_path):
    """A bundle of a small cascade, 8x8 to 16x16, in ten classes, at s = 7."""
    cascade = CascadeModule.from_stages(smallest_stages(image_channels=3))
    cascade.origin["classes"] = [f"kind {number}" for number in range(10)]
    cascade.set_levels([7], False)
    cascade.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("truncated", [False, True])
def test_a_call_draws_the_images_of_the_command(tmp_path, folder, truncated):
    command = [
        "sample",
        f"--bundle={folder}",
        f"--out={tmp_path / 'samples'}",
        "--count=5",
        "--classes=[3,9]",
        "--seed=4",
    ]
    command += ["--levels=[5]", f"--truncated={str(truncated).lower()}", "--block_size=5", "--accelerator=cpu"]
    main([*command, "--sampling_steps=[2,3]"])
    stored = [decode_png(s["png"]) for s in read_shard(tmp_path / "samples/train/16/000000.tar")]
    cascade = CascadeModule.from_pretrained(folder, truncated=truncated)
    steps = [stage.diffusion.sampling_steps for stage in cascade.stages]
    assert steps != [2, 3]
    images = cascade(classes=[3, 9, 3, 9, 3], levels=[5], seed=4, sampling_steps=[2, 3])
    assert [image.size for image in images] == [(16, 16)] * 5 and images[0].mode == "RGB"
    assert all(np.array_equal(np.array(image), expected) for image, expected in zip(images, stored, strict=True))
    assert cascade.levels == [7] and cascade.seed == 0  # a call changes nothing
    assert [stage.diffusion.sampling_steps for stage in cascade.stages] == steps


def test_classes_are_numbers_or_names_in_any_form_and_results_too(folder):
    cascade = CascadeModule.from_pretrained(str(folder))
    assert not cascade.training
    expected = cascade(classes=[2, 4], output_type="pt")
    assert expected.shape == (2, 3, 16, 16) and 0 <= float(expected.min()) < float(expected.max()) <= 1
    for classes in (("kind 2", 4), torch.tensor([2, 4]), np.array([2, 4]), ["2", "kind 4"]):
        assert torch.equal(cascade(classes=classes, output_type="pt", progress=False), expected)
    assert torch.equal(cascade(count=3, output_type="pt")[1:2], cascade(classes=[0, 1], output_type="pt")[1:])
    small, large = cascade(classes="kind 5", output_type="np", all_resolutions=True)
    assert small.shape == (1, 8, 8, 3) and large.shape == (1, 16, 16, 3)
    together = cascade(classes=[1, 2, 3], output_type="pt", batch_size=2)
    torch.testing.assert_close(together, cascade(classes=[1, 2, 3], output_type="pt"), rtol=0, atol=1.01 / 255)


def test_what_a_call_cannot_do_is_refused(folder):
    cascade = CascadeModule.from_pretrained(folder)
    sentence_of_error(lambda: cascade(), "classes", "count")
    sentence_of_error(lambda: cascade(classes=["kind 55"]), "did you mean 'kind 5'?")
    sentence_of_error(lambda: cascade(classes=[10]), "class 10 lies outside 0 ... 9")
    sentence_of_error(lambda: cascade(classes=[1], levels=[1, 2]), "levels [1, 2] has 2 entries")
    sentence_of_error(lambda: cascade(classes=[1], output_type="jpg"), "output_type 'jpg' is none of pil, np and pt")
    sentence_of_error(lambda: cascade(classes=[]), "classes [] names no class")
    for wrong in ({"count": 0}, {"count": -1}, {"classes": [1], "batch_size": 0}, {"classes": [1], "seed": "a"}):
        sentence_of_error(lambda wrong=wrong: cascade(**wrong))
    for levels in (5, [0.5], ["5"]):
        sentence_of_error(lambda levels=levels: cascade(classes=[1], levels=levels), "level")
    sentence_of_error(lambda: CascadeModule.from_pretrained(folder, sampler="ddmp"), "sampler 'ddmp' is none of")
    assert cascade.levels == [7] and CascadeModule.from_pretrained(folder / "bundle.json").levels == [7]


def test_whole_numbers_are_taken_from_anything_that_holds_them_and_nothing_else(folder):
    cascade = CascadeModule.from_pretrained(folder)
    steps, refused = [2, 2], [True, 1.5, "1", torch.tensor(1.5), np.array(True), [1], torch.zeros(99, 99)]
    expected = cascade(classes=[0, 1, 2], levels=[5], seed=4, sampling_steps=steps, output_type="pt")
    for classes in (range(3), [torch.tensor(n) for n in range(3)], tuple(np.arange(3))):
        drawn = cascade(
            classes=classes, levels=torch.tensor([5]), seed=np.int64(4), batch_size=torch.tensor(64),
            sampling_steps=np.array(steps), output_type="pt",
        )  # fmt: skip
        assert torch.equal(drawn, expected)
    assert len(cascade(count=np.int64(2), levels=[np.int32(5)], sampling_steps=(2, 2))) == 2
    for wrong in [*refused, None]:
        sentence_of_error(lambda wrong=wrong: cascade(classes=[1], batch_size=wrong), "batch_size", "whole number")
    for wrong in refused:
        for arguments in ({"seed": wrong}, {"levels": [wrong]}, {"sampling_steps": [wrong, 1]}):
            name = next(iter(arguments))
            sentence_of_error(lambda arguments=arguments: cascade(classes=[1], **arguments), name, "no whole number")
        sentence_of_error(lambda wrong=wrong: cascade(count=wrong), "count", "no whole number")
        sentence_of_error(lambda wrong=wrong: cascade.set_batch_sizes([wrong, 1]), "batch_sizes", "no whole number")
    for wrong in (5, "33", {1: 2}):
        sentence_of_error(lambda wrong=wrong: cascade(classes=[1], sampling_steps=wrong), "sampling_steps", "no list")
    sentence_of_error(lambda: CascadeModule.from_pretrained(folder, levels=[]), "levels [] has 0 entries")
    sentence_of_error(lambda: CascadeModule.from_pretrained(folder, seed=True), "seed True is no whole number")


def test_the_pipeline_refuses_other_generators_and_steps(folder):
    pipe, one = pipeline(folder), torch.Generator()
    for wrong in ([], [one], [one] * 3, [1, 2], 5):
        sentence_of_error(lambda wrong=wrong: pipe(class_labels=[1, 2], generator=wrong), "generator", "list of 2")
    for wrong in (2.5, True, "33", [2.5, 1], [1]):
        sentence_of_error(lambda wrong=wrong: pipe(class_labels=[1], num_inference_steps=wrong), "steps")
    for steps in (np.int64(2), torch.tensor(2), (2, 2)):
        assert len(pipe(class_labels=range(2), num_inference_steps=steps, generator=(one, one)).images) == 2


def test_an_upload_that_fails_is_one_sentence(folder, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **options):
            raise OSError("Token is required, but no token found.\nLog in.")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    sentence_of_error(
        lambda: CascadeModule.from_pretrained(folder).push_to_hub("user/name"), "user/name", "no token found"
    )


def test_a_stage_samples_without_generators():
    base, sr = smallest_stages()
    torch.manual_seed(5)
    first = base.sample(torch.tensor([0, 1]))
    image = sr.sample(torch.tensor([0, 1]), first, 0)
    torch.manual_seed(5)
    assert torch.equal(base.sample(torch.tensor([0, 1])), first) and image.shape == (2, 1, 16, 16)


def test_a_saved_cascade_is_the_same_and_is_read_from_the_hub(tmp_path, folder, monkeypatch):
    """The hub is a folder here: what would be uploaded is what would be downloaded."""
    cascade = CascadeModule.from_pretrained(folder)
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **options):
            sent["repo"] = repo

        def file_exists(self, repo, name):
            return False

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            folder_path.rename(tmp_path / "uploaded")
            return "address"

    def snapshot(repo, revision, cache_dir, allow_patterns):
        if repo != "user/name":
            raise OSError("no such repository")
        assert (revision, allow_patterns) == ("v1", ["bundle.json", "*.safetensors", "README.md"])
        return str(tmp_path / "uploaded")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert cascade.push_to_hub("user/name") == "address" and sent["repo"] == "user/name"
    fetched = CascadeModule.from_pretrained("user/name", revision="v1")
    images = (one(classes=[1, 2], output_type="pt") for one in (cascade, fetched))
    assert torch.equal(*images) and fetched.origin["classes"] == cascade.origin["classes"]
    sentence_of_error(
        lambda: CascadeModule.from_pretrained("user/nome"), "user/nome is no folder", "no such repository"
    )


def pipeline(folder) -> DiffusionPipeline:
    made = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    made.set_progress_bar_config(disable=True)
    return made


def test_diffusers_draws_the_same_images_from_the_same_noise(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cascade, pipe = CascadeModule.from_pretrained(folder), pipeline(folder)
    label = torch.tensor([3, 8])

    def draws():
        return [torch.Generator().manual_seed(seed) for seed in (11, 12)]

    base, sr = cascade.stages
    streams = TorchStreams(2, "cpu", draws())
    low_res = quantize(base.sample(label, 0, streams))
    expected = to_uint8(sr.sample(label, sr.augment(low_res, 5, streams), 5, 0, streams))
    images = pipe(class_labels=["kind 3", 8], levels=[5], generator=draws()).images
    assert np.array_equal(np.stack([np.array(image) for image in images]), expected.permute(0, 2, 3, 1).numpy())
    assert len(pipe(class_labels=[1]).images) == 1  # by torch's own generator

    with pytest.raises(Exception, match="custom code"):  # nothing of a folder is run unasked
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder))
    pipe.save_pretrained(tmp_path / "again")
    again = pipeline(tmp_path / "again")(class_labels=[3, 8], levels=[5], generator=draws()).images
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(again, images, strict=True))


def test_a_scheduler_of_diffusers_takes_the_place_of_the_samplers():
    """DDIM as this project configures it gives the images of sampler ddim; Euler's are near them, as both are exact."""
    cascade, pipe = CascadeModule.from_pretrained(SHIPPED, levels=[0, 0]), pipeline(SHIPPED)
    cascade.set_sampler("ddim", [10, 10, 10])
    arguments = {"class_labels": [0, 7, 9], "num_inference_steps": 10, "levels": [0, 0], "output_type": "pt"}

    def images(scheduler):
        pipe.scheduler = scheduler
        return pipe(**arguments, generator=[torch.Generator().manual_seed(seed) for seed in range(3)]).images

    ddim = images(DDIMScheduler(timestep_spacing="trailing"))
    other = images(EulerDiscreteScheduler())
    streams = TorchStreams(3, "cpu", [torch.Generator().manual_seed(seed) for seed in range(3)])
    label, image = torch.tensor([0, 7, 9]), None
    for stage in cascade.stages:
        given = (label,) if image is None else (label, stage.augment(image, 0, streams), 0)
        image = quantize(stage.sample(*given, 0, streams))
    torch.testing.assert_close(ddim, (image + 1) / 2, rtol=0, atol=0.05)
    assert float((ddim - (image + 1) / 2).abs().mean()) < 0.01  # ours clips more
    images(DPMSolverMultistepScheduler())
    sentence_of_error(
        lambda: images(HeunDiscreteScheduler()), "HeunDiscreteScheduler is no scheduler of one network call"
    )
    sentence_of_error(lambda: pipe(class_labels=[99]), "class 99 lies outside 0 ... 9")
    assert float((other - ddim).abs().mean()) < 0.05 < float((other - ddim.flip(0)).abs().mean())


def test_schedulers_that_cannot_follow_a_stage_are_refused(folder):
    """By what they take: no list of names would hold those of the next release."""
    pipe = pipeline(folder)
    for kind in (
        EDMEulerScheduler, IPNDMScheduler, RePaintScheduler, ScoreSdeVeScheduler, CMStochasticIterativeScheduler,
        FlowMatchEulerDiscreteScheduler, CogVideoXDPMScheduler, HeunDiscreteScheduler,
    ):  # fmt: skip
        pipe.scheduler = kind()
        sentence_of_error(lambda: pipe(class_labels=[1]), f"{kind.__name__} is no scheduler of one network call a step")
    for scheduler, steps, part in (
        (CogVideoXDDIMScheduler(), 4, "changes the noise schedule"),
        (DDIMInverseScheduler(), 4, "goes from images to noise"),
        (LCMScheduler(original_inference_steps=2), 4, "original"),
    ):
        pipe.scheduler = scheduler
        sentence_of_error(lambda steps=steps: pipe(class_labels=[1], num_inference_steps=steps), part)


def test_a_scheduler_forgets_its_own_noise_schedule_and_pndm_converges():
    """On the base of the shipped cascade: near the stage's own sampler, whatever the scheduler was made with."""
    pipe = pipeline(SHIPPED)
    stage = pipe.cascade.module.stages[0]
    stage.diffusion.sampling_steps = 25
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    predict, streams = stage.predictor(torch.tensor([0, 7])), TorchStreams(2, "cpu", draws)
    noise = stage.noise(streams)
    with torch.no_grad():
        own = pipe.draw(stage.diffusion, predict, noise, streams)
        for scheduler in (
            DDIMScheduler(trained_betas=[0.02] * 1000, rescale_betas_zero_snr=True),
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            PNDMScheduler(),
        ):
            pipe.scheduler = scheduler
            drawn = pipe.draw(stage.diffusion, predict, noise, streams).clamp(-1, 1)
            assert float((drawn - own).square().mean().sqrt()) < 0.05


def test_a_model_card_tells_what_the_bundle_knows_and_keeps_what_a_person_wrote(folder):
    card = (folder / "README.md").read_text()
    assert "8 → 16" in card and "kind 9" in card and "None were measured" in card and "levels=[7]" in card
    shipped = hub.card(hub.json.loads((SHIPPED / "bundle.json").read_text()))
    assert "0.917" in shipped or ("0.9169" in shipped and "fashion-cnn-64" in shipped and "2,000 samples" in shipped)
    (folder / "README.md").write_text("Mine.\n")
    CascadeModule.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "Mine.\n"
