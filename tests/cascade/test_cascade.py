"""The cascade and its bundle: both of the paper's ways of sampling, any s, and every refusal."""

import json

import pytest
import torch
from small_models import SMALL, randomise_weights, record_calls, smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.cascade.hub import HUB_FILES
from cdm_lightning.cascade.metadata import digest, origin, read_bundle_metadata
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import quantize, to_uint8
from cdm_lightning.stages import BaseStage, SuperResolutionStage

LABEL, INDEX = torch.tensor([0, 3, 9]), torch.tensor([0, 1, 2])


def test_the_papers_clocks_build_and_sample_both_ways(stages):
    cascade = CascadeModule.from_stages(stages)
    assert [s.diffusion.timesteps for s in stages] == [4000, 4000, 2000]
    for levels, truncated in (([0, 0], False), ([501, 0], False), ([501, 0], True), ([1001, 0], True)):
        cascade.set_levels(levels, truncated)
        images = cascade.sample(LABEL, INDEX)
        assert [tuple(i.shape) for i in images] == [(3, 1, 8, 8), (3, 1, 16, 16), (3, 1, 32, 32)]
        assert all(torch.isfinite(i).all() for i in images)
        for image, stop in zip(images, [*levels, 0] if truncated else [0, 0, 0], strict=True):
            assert torch.equal(image, quantize(image)) == (stop == 0)


def test_at_s_0_both_ways_are_the_same_bits(stages):
    cascade = CascadeModule.from_stages(stages)
    first = cascade.sample(LABEL, INDEX)
    cascade.set_levels([0, 0], True)
    assert all(torch.equal(a, b) for a, b in zip(first, cascade.sample(LABEL, INDEX), strict=True))


def test_the_chosen_s_reaches_corruption_and_embedding_alike(stages):
    cascade = CascadeModule.from_stages(stages)
    seen = record_calls(stages[1])
    cascade.set_levels([501, 0], False)
    z_0 = cascade.sample(LABEL, INDEX)[0]
    streams = cascade.streams(INDEX, 1)
    z_s = stages[1].augmentation(z_0, torch.full((3,), 501.0), streams)
    expected = torch.nn.functional.interpolate(z_s, (16, 16), mode="bilinear")
    assert torch.equal(seen[0].low_res, expected) and seen[0].level.tolist() == [501.0] * 3
    seen.clear()
    cascade.set_levels([501, 0], True)
    z_s = cascade.sample(LABEL, INDEX)[0]
    assert torch.equal(seen[0].low_res, torch.nn.functional.interpolate(z_s, (16, 16), mode="bilinear"))


def test_going_on_from_stored_images_is_the_run_in_one_go(stages):
    cascade = CascadeModule.from_stages(stages, seed=3)
    cascade.set_levels([251, 0], False)
    whole = cascade.sample(LABEL, INDEX)
    assert torch.equal(cascade.sample(LABEL, INDEX, image=whole[0])[-1], whole[-1])
    after = cascade.sample(LABEL, INDEX, image=whole[1])
    assert len(after) == 1 and torch.equal(after[0], whole[-1])


def test_an_image_depends_on_seed_index_and_class_alone(stages):
    cascade = CascadeModule.from_stages(stages)
    whole = cascade.sample(LABEL, INDEX)[-1]
    alone = cascade.sample(LABEL[1:2], INDEX[1:2])[-1]
    assert int((to_uint8(whole[1]).int() - to_uint8(alone[0]).int()).abs().max()) <= 1
    assert not torch.equal(cascade.sample(LABEL, INDEX + 1)[-1], whole)
    cascade.seed = 1
    assert not torch.equal(cascade.sample(LABEL, INDEX)[-1], whole)


@pytest.mark.parametrize("levels, truncated", [([251, 0], False), ([251, 0], True)])
def test_every_stage_works_on_its_own_number_of_images(stages, levels, truncated):
    cascade = CascadeModule.from_stages(stages)
    cascade.set_levels(levels, truncated)
    whole = cascade.sample(LABEL, INDEX)
    cascade.set_batch_sizes([5, 2, 1])
    seen = [[], [], []]
    hooks = [
        stage.unet.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        for stage, sizes in zip(stages, seen, strict=True)
    ]
    parts = cascade.sample(LABEL, INDEX)
    for hook in hooks:
        hook.remove()
    assert [sorted(set(sizes)) for sizes in seen] == [[3], [1, 2], [1]]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2 / 255 + 1e-6)


@pytest.mark.parametrize("sizes", [[4, 4], [4, 0, 4], [1, 1, 1, 1]])
def test_batch_sizes_that_are_not_one_a_stage_are_refused(stages, sizes):
    with pytest.raises(InputError, match="must have 3 entries, one a stage, of at least 1"):
        CascadeModule.from_stages(stages).set_batch_sizes(sizes)


def test_any_number_of_stages(stages):
    assert [i.shape[-1] for i in CascadeModule.from_stages(stages[:1]).sample(LABEL, INDEX)] == [8]
    again = SuperResolutionStage(
        resolution=64, low_resolution=32, augmentation="none", **{**SMALL, "num_classes": None}
    )
    four = CascadeModule.from_stages([*stages, randomise_weights(again)])
    assert [i.shape[-1] for i in four.sample(LABEL, INDEX)] == [8, 16, 32, 64]


def test_two_gaussian_stages_each_stop_at_their_own_level():
    torch.manual_seed(0)
    clock = dict(low_res_timesteps=4000, low_res_schedule="cosine")
    chain = [
        randomise_weights(BaseStage(resolution=8, **SMALL)),
        randomise_weights(SuperResolutionStage(resolution=16, low_resolution=8, **clock, **SMALL)),
        randomise_weights(SuperResolutionStage(resolution=32, low_resolution=16, **clock, **SMALL)),
    ]
    calls = [record_calls(stage) for stage in chain]
    cascade = CascadeModule.from_stages(chain)
    cascade.set_levels([1001, 251], True)
    z, y, x = cascade.sample(LABEL, INDEX)
    lowest = [float(seen[-1].t[0]) for seen in calls]
    assert lowest[0] == 1334 and lowest[1] == 1334 and lowest[2] == 1  # the last times above 1001, 251 and 0
    for seen, handed, level in ((calls[1], z, 1001.0), (calls[2], y, 251.0)):
        size = handed.shape[-1] * 2
        expected = torch.nn.functional.interpolate(handed, (size, size), mode="bilinear")
        assert all(torch.equal(call.low_res, expected) and call.level.tolist() == [level] * 3 for call in seen)
    assert not torch.equal(z, quantize(z)) and not torch.equal(y, quantize(y)) and torch.equal(x, quantize(x))


def test_samplers_and_steps_are_set_for_all_stages(stages):
    cascade = CascadeModule.from_stages(stages)
    for sampler, steps in (("ddim", [5, 10, 4]), ("dpm++", [6, 3, 5]), ("ddpm", [2, 2, 2])):
        cascade.set_sampler(sampler, steps)
        assert torch.isfinite(cascade.sample(LABEL, INDEX)[-1]).all()
    cascade.set_levels([800, 0], True)
    cascade.set_sampler("ddim", [5, 5, 5])
    cascade.set_levels([801, 0], True)
    with pytest.raises(InputError, match="the nearest are 800 and 1600"):
        cascade.set_sampler("ddim", [5, 5, 5])


def test_truncated_sampling_adds_noise_to_the_clean_images_that_it_goes_on_from(stages):
    """Given z_0 there is no reverse process to stop at s: z_s is drawn from q(z_s|z_0), as without truncation."""
    cascade = CascadeModule.from_stages(stages)
    z = quantize(torch.rand(3, 1, 8, 8) * 2 - 1)
    calls = record_calls(stages[1])
    for truncated in (True, False):
        cascade.set_levels([1001, 0], truncated)
        cascade.sample(LABEL, INDEX, z)
    noisy = stages[1].augment(z, 1001, cascade.streams(INDEX, 1))
    expected = torch.nn.functional.interpolate(noisy, (16, 16), mode="bilinear")
    assert not torch.equal(noisy, z) and len(calls) == 8
    assert all(torch.equal(call.low_res, expected) for call in calls)


# -- the bundle


def test_a_bundle_comes_back_to_the_bit(stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {"levels": [501, 0], "truncated": True, "classes": list("abcdefghij")})
    cascade = CascadeModule(bundle=tmp_path / "b")
    assert cascade.levels == [501, 0] and cascade.truncated
    direct = CascadeModule.from_stages(stages)
    direct.set_levels([501, 0], True)
    for a, b in zip(cascade.stages, stages, strict=True):
        assert type(a) is type(b) and dict(a.hparams) == dict(b.hparams)
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert torch.equal(cascade.sample(LABEL, INDEX)[-1], direct.sample(LABEL, INDEX)[-1])
    assert CascadeModule(bundle=tmp_path / "b", levels=[0, 0], truncated=False).levels == [0, 0]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "README.md", "base8.safetensors", "bundle.json", "model_index.json", "pipeline.py", "sr16.safetensors",
        "sr32.safetensors",
    ]  # fmt: skip


def test_a_cascade_knows_what_images_it_was_trained_on(stages, tmp_path):
    unknown = {"classes": None, "crop": None, "filter": None}
    write_bundle(tmp_path / "b", stages, {})
    assert CascadeModule(tmp_path / "b").origin == CascadeModule.from_stages(stages).origin == unknown
    stages[1].trained = {"classes": list("abcdefghij"), "crop": "adm", "filter": None}
    write_bundle(tmp_path / "b", stages, {})
    known = {"classes": list("abcdefghij"), "crop": "adm", "filter": None}
    assert CascadeModule(tmp_path / "b").origin == CascadeModule.from_stages(stages).origin == known
    write_bundle(tmp_path / "b", stages, {"classes": list("klmnopqrst")})
    assert CascadeModule(tmp_path / "b").origin == known | {"classes": list("klmnopqrst")}
    about = read_bundle_metadata(tmp_path / "b")
    for stage in about["stages"]:
        stage["arguments"]["num_classes"] = None
    assert origin(about) == known | {"classes": None}  # names of what no image of it has


def test_a_bundle_of_half_the_size_holds_rounded_weights(stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {}, torch.float16)
    for a, b in zip(read_bundle(tmp_path / "b")[0], stages, strict=True):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert x.dtype == torch.float32 and torch.equal(x, y.half().float())


def test_a_bundle_that_was_changed_is_refused(stages, tmp_path):
    bundle = tmp_path / "b"

    def refused(sentence):
        with pytest.raises(InputError, match=sentence):
            read_bundle(bundle)
        write_bundle(bundle, stages, {})
        read_bundle(bundle)

    write_bundle(bundle, stages, {})
    weights = bytearray((bundle / "sr16.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "sr16.safetensors").write_bytes(weights)
    refused("sr16.safetensors was changed after the bundle was written")
    (bundle / "base8.safetensors").unlink()
    refused("base8.safetensors is missing")
    (bundle / "bundle.json").write_text("{")
    refused("is not JSON")
    (bundle / "bundle.json").write_text("[]")
    refused("is not a bundle of format 1")
    (bundle / "bundle.json").unlink()
    for name in HUB_FILES:  # without a bundle beside them, they could be anybody's
        (bundle / name).unlink()
    refused("holds no bundle.json")
    for change in (
        {"weights": "../b/base8.safetensors"},
        {"kind": "os.system"},
        {"arguments": {"resolution": 16, **SMALL}},
    ):
        about = json.loads((bundle / "bundle.json").read_text())
        about["stages"][0] |= change
        (bundle / "bundle.json").write_text(json.dumps(about))
        with pytest.raises(InputError, match=r"bundle\.json was changed after it was written"):
            read_bundle(bundle)
        about["stages_sha256"] = digest(about["stages"])
        (bundle / "bundle.json").write_text(json.dumps(about))
        refused("is missing|known are BaseStage|does not fit BaseStage")


STAGE = {"kind": "BaseStage", "arguments": {}, "weights": "base8.safetensors"}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"format": 2}, "is not a bundle of format 1"),
        ({"stages": {"kind": "BaseStage"}}, "is not a bundle of format 1"),
        ({"stages": ["BaseStage"]}, "lists a stage that is not a table"),
        ({"stages": [{**STAGE, "trained": [1]}]}, "lists a stage that is not a table"),
        ({"levels": [True]}, r"has levels \[True\]: a list of int is expected"),
        ({"levels": 5}, "has levels 5: a list of int is expected"),
        ({"classes": ["a", 1]}, "a list of str is expected"),
        ({"truncated": 1}, "has truncated 1: true or false is expected"),
        ({"stages": [{**STAGE, "kind": ["BaseStage"]}]}, "its class is .'BaseStage'., and known are BaseStage"),
        ({"stages": [{**STAGE, "kind": "ResNet"}]}, "its class is 'ResNet', and known are BaseStage"),
        ({"stages": [{**STAGE, "arguments": [8]}]}, "lists a stage without arguments"),
        ({"stages": [{**STAGE, "weights": "a\nb"}]}, "a name that cannot be printed"),
        ({"stages": [{**STAGE, "weights": "../b/base8.safetensors"}]}, "is missing"),
        ({"stages": [{**STAGE, "weights": "none.safetensors"}]}, "is missing"),
    ],
)
def test_a_bundle_json_with_a_field_of_another_kind_is_refused(tmp_path, change, sentence):
    """By whoever changed it and wrote the hash of the stages anew."""
    write_bundle(tmp_path / "b", smallest_stages(()), {"levels": []})
    about = json.loads((tmp_path / "b/bundle.json").read_text()) | change
    (tmp_path / "b/bundle.json").write_text(json.dumps({**about, "stages_sha256": digest(about["stages"])}))
    with pytest.raises(InputError, match=sentence):
        read_bundle(tmp_path / "b")


def test_no_half_written_bundle_keeps_the_name(stages, tmp_path, monkeypatch):
    write_bundle(tmp_path / "b", stages, {"old": True})
    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(InputError, match="could not be written: No space left on device"):
        write_bundle(tmp_path / "b", stages, {"old": False})
    monkeypatch.undo()
    assert read_bundle(tmp_path / "b")[1]["old"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def full_disk(self, data):
    raise OSError(28, "No space left on device")


# -- what does not fit


def test_stages_that_do_not_fit_are_refused(stages):
    base, sr16, sr32 = stages
    other_clock = randomise_weights(BaseStage(resolution=8, timesteps=1000, **SMALL))
    more_classes = randomise_weights(BaseStage(resolution=8, **{**SMALL, "num_classes": 11}))
    colour = randomise_weights(BaseStage(resolution=8, **{**SMALL, "image_channels": 3}))
    for chain, sentence in (
        ([sr16, sr32], "starts with a base stage, and sr16 is given first: put the base stage first"),
        ([], "starts with a base stage, and no stage is given"),
        ([base, sr32], "starts from resolution 16, and base8 makes 8"),
        ([base, base], "is not a super-resolution stage"),
        ([other_clock, sr16], "the clocks disagree: stage sr16 was trained with s on 4000 steps"),
        ([more_classes, sr16], "disagree about the number of classes"),
        ([colour, sr16], "starts from image_channels 1, and base8 makes 3"),
    ):
        with pytest.raises(InputError, match=sentence):
            CascadeModule.from_stages(chain)


def test_stages_of_other_classes_are_refused_by_name(stages, tmp_path):
    names, other = list("abcdefghij"), list("abcdefghik")
    stages[0].trained, stages[2].trained = {"classes": names}, {"classes": other}  # nothing is known of sr16
    with pytest.raises(InputError, match="stage base8 calls class 9 'j', and stage sr32 'k'"):
        CascadeModule.from_stages(stages)
    stages[2].trained = {"classes": names[::-1]}
    write_bundle(tmp_path / "b", stages, {})
    with pytest.raises(InputError, match="the names are the same, in another order"):
        CascadeModule(tmp_path / "b")
    again = SuperResolutionStage(
        resolution=32, low_resolution=16, augmentation="none", **{**SMALL, "num_classes": None}
    )
    again.trained = {"classes": other}  # it never sees a class
    assert CascadeModule.from_stages([*stages[:2], again]).origin["classes"] == names


def test_names_that_are_not_as_many_as_the_classes_are_refused(stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {"classes": ["a", "b"]})
    with pytest.raises(InputError, match=r"bundle\.json names 2 classes, and its stages have 10"):
        CascadeModule(tmp_path / "b")
    stages[1].trained = {"classes": [1]}
    write_bundle(tmp_path / "c", stages, {})
    with pytest.raises(InputError, match=r"has classes \[1\]: a list of str is expected"):
        CascadeModule(tmp_path / "c")


def test_a_bundle_replaces_nothing_but_a_bundle(stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {})
    write_bundle(tmp_path / "b", stages[:1], {})
    assert len(list((tmp_path / "b").iterdir())) == 5
    (tmp_path / "b" / "notes.txt").write_text("kept")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "val.safetensors").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, sentence in (
        ("b", "b holds notes.txt, which is of no bundle and would be lost"),
        ("cards", "cards holds val.safetensors, which is of no bundle"),
        ("file", "file is a file: the results need a folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            write_bundle(tmp_path / name, stages, {})
    assert (tmp_path / "file").read_text() == (tmp_path / "cards" / "val.safetensors").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "cards", "file"]


@pytest.mark.parametrize(
    "levels, sentence",
    [
        ([4000, 0], "level 4000 of stage sr16 lies outside"),
        ([4001, 0], "level 4001 of stage sr16 lies outside"),
        ([-1, 0], "level -1 of stage sr16 lies outside"),
        ([0, 5], "level 5 given to stage sr32, whose augmentation has no level"),
        ([0], "has 1 entries for 2 super-resolution stages"),
    ],
)
def test_levels_that_no_stage_takes_are_refused(stages, levels, sentence):
    with pytest.raises(InputError, match=sentence):
        CascadeModule.from_stages(stages).set_levels(levels, False)


@pytest.mark.parametrize("labels, wrong", [([10], 10), ([-1], -1), ([0, 10], 10), ([3, -1], -1), ([9, 0, 12], 12)])
def test_classes_beyond_the_models_are_refused(stages, labels, wrong):
    with pytest.raises(InputError, match=f"class {wrong} lies outside 0 ... 9"):
        CascadeModule.from_stages(stages).sample(torch.tensor(labels), torch.arange(len(labels)))


def test_levels_at_the_ends_of_what_a_stage_was_trained_for():
    base, sr16 = smallest_stages(min_level=3, max_level=9)
    cascade = CascadeModule.from_stages([base, sr16])
    assert (cascade.levels, cascade.truncated, cascade.seed) == ([3], False, 0)
    for level, taken in ((2, False), (3, True), (9, True), (10, False)):
        if taken:
            cascade.set_levels([level], True)
            assert (cascade.levels, cascade.truncated) == ([level], True)
            continue
        with pytest.raises(InputError, match=f"level {level} of stage sr16 lies outside 3 <= s <= 9"):
            cascade.set_levels([level], False)
    with pytest.raises(InputError, match=r"sampling_steps \[2\] has 1 entries for 2 stages"):
        cascade.set_sampler(None, [2])
