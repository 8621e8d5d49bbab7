"""The model card and the bundle beside it: what they say is so, and what a person wrote stays."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from small_models import smallest_stages

from cdm_lightning import CascadeModule
from cdm_lightning.cascade import hub
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.cascade.metadata import read_bundle_metadata

SHA256 = "0123456789abcdef" * 4
FIGURE = {"name": "distance", "value": 1.5, "spread": None, "n_reference": 9, "against": "val"}
SEARCH = {
    "n": 10, "seeds": [0], "sampler": "dpm++", "steps": 10, "date": "2026-01-01T00:00", "figures": [FIGURE],
    "kind": "non-truncated", "rows": [], "conclusion": None,
}  # fmt: skip


def front_matter(card: str) -> dict:
    """As the hub reads it."""
    return ModelCard(card).data.to_dict()


@pytest.fixture
def folder(tmp_path):
    write_bundle(tmp_path / "bundle", smallest_stages(), {"levels": [3], "truncated": False})
    return tmp_path / "bundle"


def test_the_card_of_an_imported_cascade_says_what_it_is_and_whence(tmp_path):
    stages = smallest_stages(num_classes=1000)
    record = {"file": "b.pt", "sha256": SHA256, "flags": ["--image_size 8", "--class_cond True"]}
    stages[0].trained = {"averaged": True, "steps": None, "images": None, "imported": record}
    stages[1].trained = {"averaged": True, "imported": {"file": "u.pt", "sha256": SHA256[::-1]}}  # without its flags
    write_bundle(tmp_path / "b", stages, {"levels": [0]})
    card = (tmp_path / "b" / "README.md").read_text()
    assert "A class-conditional cascade" in card and "classes=[0] * 4" in card and "1000 classes" in card
    for part in ("b.pt", SHA256, "--image_size 8 --class_cond True", "u.pt", SHA256[::-1], "Dhariwal and Nichol"):
        assert part in card
    assert "guided-diffusion's model card" in card
    assert "pipeline_tag" not in front_matter(card)


def test_the_card_of_an_unconditional_cascade_asks_for_no_class(tmp_path):
    write_bundle(tmp_path / "b", smallest_stages(num_classes=None), {"levels": [0]})
    card = (tmp_path / "b" / "README.md").read_text()
    assert "A cascade (" in card and "count=4" in card and "guided-diffusion" not in card
    assert front_matter(card)["pipeline_tag"] == "unconditional-image-generation"


@pytest.mark.parametrize("by_option", [False, True])
def test_a_saved_cascade_keeps_the_sampler_in_force(tmp_path, folder, by_option):
    if by_option:
        cascade = CascadeModule.from_pretrained(folder, sampler="ddim", sampling_steps=[4, 5])
    else:
        cascade = CascadeModule.from_pretrained(folder)
        cascade.set_sampler("ddim", [4, 5])
    cascade.save_pretrained(tmp_path / "again")
    again = CascadeModule.from_pretrained(tmp_path / "again")
    assert [(s.diffusion.sampler, s.diffusion.sampling_steps) for s in again.stages] == [("ddim", 4), ("ddim", 5)]
    assert "ddim, 5" in (tmp_path / "again" / "README.md").read_text()


def test_figures_stay_beside_the_levels_that_they_were_measured_at(tmp_path, folder):
    """Also when a cascade is saved twice, and by bundles whose search does not name its levels."""
    stored = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**stored, "search": SEARCH}))
    cascade = CascadeModule.from_pretrained(folder, levels=[4])
    cascade.set_levels([7], True)
    cascade.save_pretrained(tmp_path / "again")
    CascadeModule.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "thrice")
    for name in ("again", "thrice"):
        card = (tmp_path / name / "README.md").read_text()
        before, figures = card.split("## Figures")
        assert "s = [7] by default" in before and "\ntruncated." in before
        assert "at s = [3], non-truncated" in figures and "[7]" not in figures
    assert "at s = [3], non-truncated" in hub.card(read_bundle_metadata(folder))


@pytest.mark.parametrize("text", [b"Mine.\n", b"\xff not UTF-8\n"])
def test_what_a_person_wrote_goes_where_the_cascade_goes(tmp_path, folder, monkeypatch, text, capsys):
    hub_files = tmp_path / "hub"  # a folder for each repository

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **options):
            (hub_files / repo).mkdir(parents=True, exist_ok=True)

        def file_exists(self, repo, name):
            return (hub_files / repo / name).is_file()

        def hf_hub_download(self, repo, name):
            return str(hub_files / repo / name)

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            ignore = shutil.ignore_patterns(*ignore_patterns)
            shutil.copytree(folder_path, hub_files / repo_id, ignore=ignore, dirs_exist_ok=True)

    def there(repo):
        return (hub_files / repo / "README.md").read_bytes()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    for _ in range(2):
        CascadeModule.from_pretrained(folder).push_to_hub("user/ours")
        assert hub.MARK.encode() in there("user/ours") and len(there("user/ours")) > 500
        (hub_files / "user/ours/README.md").write_bytes(hub.MARK.encode())  # an older card
    (hub_files / "user/ours/README.md").write_text("Changed on the hub.\n")
    (hub_files / "user/ours/bundle.json").unlink()
    assert capsys.readouterr().err == ""
    CascadeModule.from_pretrained(folder).push_to_hub("user/ours")
    assert capsys.readouterr().err.startswith("user/ours: its README.md is a person's and stays")
    assert there("user/ours") == b"Changed on the hub.\n" and (hub_files / "user/ours/bundle.json").is_file()
    (folder / "README.md").write_bytes(text)
    for number, source in enumerate((folder, folder / "bundle.json")):
        cascade = CascadeModule.from_pretrained(source)
        cascade.push_to_hub("user/mine")
        other = tmp_path / str(number)
        cascade.save_pretrained(other)
        assert there("user/mine") == (other / "README.md").read_bytes() == text
    (other / "README.md").write_text("Of this folder.\n")
    cascade.save_pretrained(other)
    assert (other / "README.md").read_text() == "Of this folder.\n"
    assert "README.md" in hub.DOWNLOADED


@pytest.mark.parametrize("license", ["mit", "mit\nlibrary_name: evil", "not a: licence", "no", "\n---\n", "ÿ\x7f"])
def test_a_licence_is_one_value_of_the_front_matter(folder, license):
    about = front_matter(hub.card({**read_bundle_metadata(folder), "license": license}))
    assert about["license"] == license and about["library_name"] == "cdm_lightning"
    assert set(about) == {"library_name", "tags", "license"}
