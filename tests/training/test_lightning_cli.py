"""Lightning's command line as a project of this size needs it: old class paths, and what they are called now."""

from pkgutil import resolve_name

import pytest

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.planning.recipe import read_recipe
from cdm_lightning.training.lightning_cli import MOVED_CLASSES, refuse_old_class_paths


@pytest.mark.parametrize("old, new", MOVED_CLASSES.items())
def test_an_old_class_path_is_refused_by_the_name_of_the_new_one(old, new, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"trainer:\n  callbacks:\n    - class_path: cdm_lightning.{old}\n")
    sentence = f"cdm_lightning.{old} is cdm_lightning.{new} now"
    for words in (["fit", "--config", str(file)], ["fit", f"--config={file}"], [f"--model=cdm_lightning.{old}"]):
        with pytest.raises(InputError, match=sentence):
            refuse_old_class_paths(words)
    with pytest.raises(InputError, match=f"mine.yaml: {sentence}"):
        read_recipe([file])
    assert resolve_name(f"cdm_lightning.{new}").__name__ == old.rpartition(".")[2]


def test_class_paths_that_stayed_are_taken(tmp_path):
    file = tmp_path / "mine.yaml"
    kept = ("stages.BaseStage", "stages.SuperResolutionStage", "cascade.CascadeModule")
    file.write_text("".join(f"# cdm_lightning.{path}\n" for path in kept))
    refuse_old_class_paths(["--config", str(file), "--config", "no_such.yaml"])
    assert [resolve_name(f"cdm_lightning.{path}").__name__ for path in kept] == [path.split(".")[1] for path in kept]
