"""Output folders: nothing is written where nothing can be, and settings bind a folder that holds results alone."""

import json
import os
from dataclasses import dataclass

import pytest
from refusals import sentence_of_error

from cdm_lightning.foundation.files import begin_folder, check_output_folder, write_atomically
from cdm_lightning.stages.checkpoints import write_checkpoint


@dataclass
class Settings:
    count: int


@pytest.mark.parametrize("inside", ["", "/below", "/far/below"])
def test_a_file_is_no_output_folder(tmp_path, inside):
    (tmp_path / "file").write_text("kept")
    out = tmp_path / f"file{inside}"
    words = ("lies below the file", "/file: ") if inside else ("is a file: the results need a folder",)
    sentence_of_error(lambda: check_output_folder(out), str(out), *words)
    sentence_of_error(lambda: write_atomically(out / "result", b""), str(out), *words)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_an_output_folder_may_exist_or_not_and_nothing_is_made(tmp_path, monkeypatch):
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)  # root may write everywhere
    sentence_of_error(lambda: check_output_folder(tmp_path / "a"), f"a cannot be written: {tmp_path} is not writable")


def test_a_folder_is_bound_by_its_settings_once_it_holds_results(tmp_path):
    begin_folder(tmp_path, Settings(1), begun=False)
    begin_folder(tmp_path, Settings(2), begun=False)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"count": 2}
    begin_folder(tmp_path, {"count": 2}, begun=True)
    sentence_of_error(
        lambda: begin_folder(tmp_path, Settings(1), begun=True), f"{tmp_path} was begun with count 2, not 1"
    )
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"count": 2}
    begin_folder(tmp_path, Settings(3), begun=True, name="other.json")  # none was written yet
    assert json.loads((tmp_path / "other.json").read_text()) == {"count": 3}


def test_a_device_is_no_output_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: write_atomically(path, b"new"), lambda path: write_checkpoint({}, path)):
        sentence_of_error(lambda write=write: write(tmp_path / "pipe"), str(tmp_path / "pipe"), "no plain file")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1
