"""A cascade in six lines of Python, as a folder that travels, and as a pipeline of diffusers."""

import numpy as np
import pytest
import torch
from commands import ROOT
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from refusals import sentence_of_error
from small_models import smallest_stages

from cdm_lightning import CascadeModule
from cdm_lightning.__main__ import main
from cdm_lightning.cascade import hub
from cdm_lightning.data.shards import read_shard
from cdm_lightning.foundation.images import decode_png, quantize, to_uint8

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

        def upload_folder(self, repo_id, folder_path, commit_message):
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
    generator = draws()
    low_res = quantize(base.sample(label, 0, generator))
    expected = to_uint8(sr.sample(label, sr.augment(low_res, 5, generator), 5, 0, generator))
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
    generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
    label, image = torch.tensor([0, 7, 9]), None
    for stage in cascade.stages:
        given = (label,) if image is None else (label, stage.augment(image, 0, generator), 0)
        image = quantize(stage.sample(*given, 0, generator))
    torch.testing.assert_close(ddim, (image + 1) / 2, rtol=0, atol=0.05)
    assert float((ddim - (image + 1) / 2).abs().mean()) < 0.01  # ours clips more
    images(DPMSolverMultistepScheduler())
    sentence_of_error(
        lambda: images(HeunDiscreteScheduler()), "HeunDiscreteScheduler is no scheduler of one network call"
    )
    sentence_of_error(lambda: pipe(class_labels=[99]), "class 99 lies outside 0 ... 9")
    assert float((other - ddim).abs().mean()) < 0.05 < float((other - ddim.flip(0)).abs().mean())


def test_a_model_card_tells_what_the_bundle_knows_and_keeps_what_a_person_wrote(folder):
    card = (folder / "README.md").read_text()
    assert "8 → 16" in card and "kind 9" in card and "None were measured" in card and "levels=[7]" in card
    shipped = hub.card(hub.json.loads((SHIPPED / "bundle.json").read_text()))
    assert "0.917" in shipped or ("0.9169" in shipped and "fashion-cnn-64" in shipped and "2,000 samples" in shipped)
    (folder / "README.md").write_text("Mine.\n")
    CascadeModule.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "Mine.\n"
