"""`cdm search`: every row is the distance of the cascade it names, the choice is the least, a kill loses little."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.cascade.metadata import read_bundle_metadata
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.evaluation.detectors import SmallCNN, features_of, load_detector
from cdm_lightning.evaluation.metrics.distance import Moments, frechet_distance
from cdm_lightning.evaluation.real_images import read_images, real_images_for_labels
from cdm_lightning.evaluation.search import level_search as points
from cdm_lightning.evaluation.search.search import search
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_float, to_uint8

N, GREY = 20, {"n": 20, "block_size": 20, "detector": "fashion-cnn-64"}


def distance(root, resolution, generated):
    """From the real validation images, computed apart from the search."""
    judge = load_detector("fashion-cnn-64")
    real = torch.cat([image for image, _ in read_images(root, "val", resolution, 64)])
    return frechet_distance(
        Moments.from_features([features_of(judge, real)]), Moments.from_features([features_of(judge, generated)])
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory, few_real):
    """A search over s of a cascade 8 -> 16 -> 32 whose last stage has no level, and samplers at its choice."""
    root = tmp_path_factory.mktemp("search")
    write_bundle(root / "bundle", smallest_stages(["gaussian", "none"]), {"name": "tiny"})
    options = {"levels": [4, 9], "samplers": ["ddpm", "dpm++"], "steps": [2, 3], "seed": 3, "store": True}
    return root, search(root / "bundle", root / "out", few_real, **GREY, **options)


def test_there_is_a_row_for_every_level_and_kind_of_input(found):
    _, results = found
    searched = [(r["stage"], r["s"], r["kind"]) for r in results["rows"] if not r["compared"]]
    kinds = ("truncated", "non-truncated", "real low-res")
    sr16 = [("sr16", 0, "generated"), ("sr16", 0, "real low-res"), *(("sr16", s, k) for s in (4, 9) for k in kinds)]
    assert searched[: len(sr16)] == sr16 and {row[0] for row in searched[len(sr16) :]} == {"sr32"}
    for row in results["rows"]:
        assert [f["key"] for f in row["figures"]] == ["fd", "kd"] and all(f["n"] == N for f in row["figures"])
    calls = {(r["kind"], r["s"]): r["calls"] for r in results["rows"] if r["stage"] == "sr16"}
    assert calls["non-truncated", 4] == 4 and calls["real low-res", 4] == 2 and calls["truncated", 9] <= 4


def test_the_sentence_states_the_rows(found):
    """Of the last stage with a choice of s; tests/evaluation/test_finding.py has its cases."""
    _, results = found
    values = {(r["s"], r["kind"]): r["figures"][0]["value"] for r in results["rows"] if r["stage"] == "sr16"}
    said = results["conclusion"]
    assert " sr16: on generated input the " in said and "one seed of 20 images" in said
    assert f"{values[0, 'generated']:,.2f}" in said and f"{values[0, 'real low-res']:,.2f} at s = 0" in said


@pytest.mark.parametrize("kind", ["truncated", "non-truncated", "real low-res"])
def test_a_row_is_the_distance_of_the_cascade_it_names(found, few_real, kind):
    root, results = found
    row = next(r for r in results["rows"] if (r["stage"], r["s"], r["kind"]) == ("sr16", 9, kind))
    label, index = torch.arange(N) % 10, torch.arange(N)
    part = CascadeModule.from_stages(read_bundle(root / "bundle")[0][:2], seed=3)
    part.set_levels([9], kind == "truncated")
    image = to_float(real_images_for_labels(label, few_real, "train", 8)) if kind == "real low-res" else None
    expected = distance(few_real, 16, to_uint8(part.sample(label, index, image)[-1]))
    assert row["figures"][0]["value"] == pytest.approx(expected, rel=1e-3)


def test_the_choice_is_the_least_on_generated_input_and_is_stored_and_used(found, few_real):
    root, results = found
    last = [r for r in results["rows"] if r["stage"] == "sr32" and r["kind"] != "real low-res" and not r["compared"]]
    kind = min(last, key=lambda r: r["figures"][0]["value"])["kind"]
    mine = [r for r in results["rows"] if r["stage"] == "sr16" and r["kind"] in (kind, "generated")]
    best = min(mine, key=lambda r: r["figures"][0]["value"])
    assert results["levels"][1] == 0 and results["chosen"]["kind"] in (best["kind"], "generated")
    if kind != "generated":
        assert results["levels"][0] == best["s"]
    about = read_bundle_metadata(root / "bundle")
    assert (about["levels"], about["truncated"], about["name"]) == (results["levels"], results["truncated"], "tiny")
    stored = about["search"]
    assert (stored["levels"], stored["truncated"]) == (results["levels"], results["truncated"])
    assert (stored["n"], stored["seeds"], stored["detector"]["name"]) == (N, [3], "fashion-cnn-64") and stored["date"]
    cascade = CascadeModule(root / "bundle", seed=3)  # told no level
    assert cascade.levels == results["levels"] and cascade.truncated == results["truncated"]
    generated = to_uint8(cascade.sample(torch.arange(N) % 10, torch.arange(N))[-1])
    row = next(r for r in last if r["levels"] == results["levels"] and r["kind"] in (kind, "generated"))
    assert row["figures"][0]["value"] == pytest.approx(distance(few_real, 32, generated), rel=1e-3)


def test_one_set_of_low_resolution_samples_serves_every_level(found):
    root, _ = found
    assert [p.name for p in (root / "out" / "low_res").iterdir() if p.name.startswith("base8")] == ["base8-seed3"]
    manifests = [json.loads(p.read_text()) for p in (root / "out" / "points").glob("sr16-non*/manifest.json")]
    assert len(manifests) == 2 and len({m["start"] for m in manifests}) == 1


def test_samplers_and_steps_are_compared_at_the_choice(found):
    _, results = found
    rows = [r for r in results["rows"] if r["compared"]]
    assert [(r["sampler"], r["steps"]) for r in rows] == [("ddpm", 2), ("ddpm", 3), ("dpm++", 2), ("dpm++", 3)]
    assert all(r["levels"] == results["levels"] for r in rows) and len({r["figures"][0]["value"] for r in rows}) > 2
    assert "Samplers and steps" in (found[0] / "out" / "report.html").read_text()


def test_a_stopped_search_goes_on_where_it_was(tmp_path, few_real, monkeypatch):
    write_bundle(tmp_path / "bundle", smallest_stages(), {})
    whole = search(tmp_path / "bundle", tmp_path / "whole", few_real, levels=[4], **GREY)
    real, calls = points.measure, []

    def killed(*given, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(points, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "bundle", tmp_path / "parts", few_real, levels=[4], **GREY)
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "results.json").exists()
    drawn = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*.tar")}
    parts = search(tmp_path / "bundle", tmp_path / "parts", few_real, levels=[4], **GREY)
    assert len(drawn) >= 4 and all(p.stat().st_mtime_ns == time for p, time in drawn.items())
    for ours, theirs in zip(parts["rows"], whole["rows"], strict=True):
        assert ours["figures"] == theirs["figures"]
    with pytest.raises(InputError, match="was begun with n 20, not 10"):
        search(tmp_path / "bundle", tmp_path / "parts", few_real, levels=[4], **{**GREY, "n": 10})


def test_two_stages_with_levels_are_searched_one_after_the_other(tmp_path, few_real):
    write_bundle(tmp_path / "bundle", smallest_stages(["gaussian", "gaussian"]), {})
    results = search(tmp_path / "bundle", tmp_path / "out", few_real, levels=[9], truncated=False, **GREY)
    first = min((r for r in results["rows"] if r["stage"] == "sr16" and r["kind"] != "real low-res"),
                key=lambda r: r["figures"][0]["value"])  # fmt: skip
    second = [r for r in results["rows"] if r["stage"] == "sr32" and r["kind"] != "real low-res"]
    assert all(r["levels"][0] == first["s"] for r in second) and len(second) == 2
    assert results["levels"] == min(second, key=lambda r: r["figures"][0]["value"])["levels"]


def test_one_stage_alone_is_searched_at_the_levels_that_the_bundle_stores(tmp_path, few_real):
    write_bundle(tmp_path / "bundle", smallest_stages(["gaussian", "gaussian"]), {"levels": [7, 0]})
    options = {"levels": [9], "stages": ["sr32"], "truncated": False, "real": False}
    results = search(tmp_path / "bundle", tmp_path / "out", few_real, **options, **GREY)
    rows = [(r["stage"], r["levels"], r["kind"]) for r in results["rows"]]
    assert rows == [
        ("sr16", [7], "non-truncated"),
        ("sr32", [7, 0], "non-truncated"),
        ("sr32", [7, 9], "non-truncated"),
    ]
    assert results["levels"][0] == 7
    with pytest.raises(
        InputError, match="stages sr64 is no super-resolution stage of this cascade, which has sr16, sr32"
    ):
        search(tmp_path / "bundle", tmp_path / "out", few_real, stages=["sr64"], **GREY)


@pytest.mark.parametrize("augmentation, level", [("blur", 0), ("gaussian", 9)])
def test_a_stage_without_a_choice_of_s_is_measured(augmentation, level, tmp_path, few_real):
    write_bundle(tmp_path / "bundle", smallest_stages([augmentation], min_level=level, max_level=level or None), {})
    results = search(tmp_path / "bundle", tmp_path / "out", few_real, truncated=False, **GREY)
    kind = "non-truncated" if level else "generated"
    assert [(r["s"], r["kind"]) for r in results["rows"]] == [(level, kind), (level, "real low-res")]
    generated, real = (r["figures"][0]["value"] for r in results["rows"])
    name, gap = results["rows"][0]["figures"][0]["name"], f"{generated - real:.2f}".replace("-", "−")
    given = " (non-truncated)" if level else ""
    assert results["conclusion"].startswith(
        f"The {name} of sr16 at s = {level} is {generated:.2f} on generated input{given} and {real:.2f} on real input, "
        f"a cascade gap of {gap}; one seed"
    )
    assert (tmp_path / "out" / "levels.png").is_file() and not (tmp_path / "out" / "curve.png").exists()


def test_a_stage_trained_between_two_levels_is_searched_there(tmp_path, few_real):
    write_bundle(tmp_path / "bundle", smallest_stages(min_level=6, max_level=15), {})
    results = search(tmp_path / "bundle", tmp_path / "out", few_real, truncated=False, real=False, **GREY)
    assert [r["s"] for r in results["rows"]] == [6, 10, 15]  # of 1, 2, 5, 10, 15 and 18 of T = 20
    with pytest.raises(InputError, match="level 5 of stage sr16 lies outside 6 <= s <= 15"):
        search(tmp_path / "bundle", tmp_path / "out", few_real, levels=[5], **GREY)


def test_a_cascade_without_classes_is_searched_on_images_of_ten(tmp_path, few_real):
    """On real input too: the first images of the split, whatever their classes."""
    write_bundle(tmp_path / "bundle", smallest_stages(num_classes=None), {"classes": list("abcdefghij")})
    options = {"levels": [9], "truncated": False, "input_split": "train", "n": 20}
    results = search(tmp_path / "bundle", tmp_path / "out", few_real, **{**GREY, **options})
    label, index = torch.zeros(20).long(), torch.arange(20)
    cascade = CascadeModule(tmp_path / "bundle")
    real = torch.cat([image for image, _ in read_images(few_real, "train", 8, 64)])[:20]
    for kind, image in (("non-truncated", None), ("real low-res", to_float(real))):
        cascade.set_levels([9], False)
        expected = distance(few_real, 16, to_uint8(cascade.sample(label, index, image)[-1]))
        row = next(r for r in results["rows"] if (r["s"], r["kind"]) == (9, kind))
        assert row["figures"][0]["value"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(InputError, match=r"n = 61 asks for 61 real images of class 0, and .*/train/32 has 60"):
        search(tmp_path / "bundle", tmp_path / "more", few_real, **{**GREY, **options, "n": 61})


@pytest.mark.parametrize(
    "augmentations, options, arguments, sentence",
    [
        (["gaussian"], {}, {"n": 1}, "n = 1, repeats = 1: a point takes 4 images or more"),
        (["gaussian"], {}, {"n": 300}, "n = 300 asks for 30 real images of class"),
        (["gaussian"], {}, {"detector": "vgg"}, "detector 'vgg' is unknown"),
        (["gaussian"], {}, {"levels": [20]}, "level 20 of stage sr16 lies outside 0 <= s <= 19: s stays below"),
        (["gaussian"], {}, {"levels": [5], "sampler": "ddim"}, "stop_at 5 is not on DDIM's grid"),
        (["gaussian"], {}, {"sampling_steps": [5]}, "has 1 entries for 2 stages"),
        (["gaussian"], {}, {"shards": Path("nowhere")}, "nowhere/val does not exist"),
        (["gaussian"], {"image_channels": 3}, {}, "holds images of 1 channels, and the cascade makes 3"),
        (["gaussian"], {}, {"accelerator": "tpu"}, "accelerator tpu with devices 1 cannot be used here"),
        ([], {}, {"levels": None}, "a cascade of one stage takes no low-resolution input"),
        (
            ["gaussian"],
            {},
            {"detector": "colour"},
            "takes images of 3 channels, not of 1: give another by --detector",
        ),
        (["blur"], {}, {}, r"levels \[5\] are for stages with Gaussian augmentation"),
    ],
)
def test_what_a_search_refuses(augmentations, options, arguments, sentence, tmp_path, few_real):
    write_bundle(tmp_path / "bundle", smallest_stages(augmentations, **options), {})
    if arguments.get("detector") == "colour":
        arguments = {"detector": str(tmp_path / "colour.safetensors")}
        save_file(SmallCNN(channels=3).state_dict(), arguments["detector"])
    with pytest.raises(InputError, match=sentence):
        search(tmp_path / "bundle", tmp_path / "out", **{"shards": few_real, "levels": [5], **GREY, **arguments})
    assert not (tmp_path / "out").exists()


def test_real_images_of_other_classes_are_refused_by_name(tmp_path, few_real):
    names = read_manifest(few_real / "val" / "32").classes
    for number, (classes, sentence) in enumerate(
        [(["pyjamas", *names[1:]], "the cascade calls class 0 'pyjamas'"), (names[::-1], "in another order")]
    ):
        write_bundle(tmp_path / f"{number}", smallest_stages(), {"classes": classes})
        with pytest.raises(InputError, match=sentence):
            search(tmp_path / f"{number}", tmp_path / "out", few_real, levels=[5], **GREY)
    assert not (tmp_path / "out").exists()


def test_a_search_without_a_result_binds_nobody(tmp_path, few_real, monkeypatch):
    write_bundle(tmp_path / "bundle", smallest_stages(), {})
    monkeypatch.setattr(points.LevelSearch, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    few = {"levels": [5], "real": False, "truncated": False}
    for n in (10, 20):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "bundle", tmp_path / "out", few_real, **{**GREY, **few, "n": n})
    assert json.loads((tmp_path / "out" / "search.json").read_text())["n"] == 20
    (tmp_path / "out" / "references").mkdir()
    (tmp_path / "out" / "references" / "val-16.safetensors").touch()
    with pytest.raises(InputError, match="out was begun with n 20, not 10: choose another"):
        search(tmp_path / "bundle", tmp_path / "out", few_real, **{**GREY, **few, "n": 10})
