"""Lightning's command line as a project of this size needs it: old class paths, and what they are called now."""

from pkgutil import resolve_name

import pytest

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.planning.recipe import read_recipe
from cdm_lightning.training.lightning_cli import MOVED_CLASSES, refuse_old_class_paths


@pytest.mark.parametrize("old, new", MOVED_CLASSES.items())
def test_an_old_class_path_is_refused_by_the_name_of_the_new_one(old, new, tmp_path):
    sentence = f"cdm_lightning.{old} is cdm_lightning.{new} now"
    for name in ("mine.yaml", "mine.conf"):
        file = tmp_path / name
        file.write_text(f"trainer:\n  callbacks:\n    - class_path: cdm_lightning.{old}\n")
        for words in (["fit", "--config", str(file)], [f"--config={file}"], [f"--trainer={file}"]):
            with pytest.raises(InputError, match=f"{name}: {sentence}"):
                refuse_old_class_paths(words)
        with pytest.raises(InputError, match=f"{name}: {sentence}"):
            read_recipe([file])
    with pytest.raises(InputError, match=sentence):
        refuse_old_class_paths([f"--model=cdm_lightning.{old}"])
    assert resolve_name(f"cdm_lightning.{new}").__name__ == new.rpartition(".")[2]


def test_class_paths_that_stayed_and_comments_are_taken(tmp_path):
    file = tmp_path / "mine.yaml"
    kept = ("stages.BaseStage", "stages.SuperResolutionStage", "cascade.CascadeModule")
    kept = (*kept, "evaluation.callback.CascadeFigures")
    lines = [f"model: cdm_lightning.{path}  # once cdm_lightning.callbacks.EMA\n" for path in kept]
    file.write_text("# was cdm_lightning.callbacks.EMA\n" + "".join(lines))
    refuse_old_class_paths(["--config", str(file), "--config", "no_such.yaml", f"--data.root={tmp_path}"])
    names = [resolve_name(f"cdm_lightning.{path}").__name__ for path in kept]
    assert names == [path.rpartition(".")[2] for path in kept]


def test_arguments_with_an_open_quotation_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match='arguments "it\'s" cannot be split into words: no closing quotation'):
        read_recipe([], "it's")
