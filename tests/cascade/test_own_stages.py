"""A stage class of the user's: it trains, is bundled and loads where it is imported, and is refused where it is not."""

import subprocess
import sys

import pytest
from commands import ENVIRONMENT
from refusals import sentence_of_error
from small_models import SMALLEST

from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.stages import BaseStage
from cdm_lightning.stages.loading import stage_class


class WarmStage(BaseStage):
    """A base stage with an argument of its own."""

    def __init__(self, warmth: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters({"warmth": warmth})
        self.warmth = warmth


def test_a_class_of_the_user_goes_the_whole_way(tmp_path):
    stage = WarmStage(warmth=2.5, resolution=8, **SMALLEST)
    write_bundle(tmp_path / "b", [stage], {"levels": [], "truncated": False})
    (read,), about = read_bundle(tmp_path / "b")
    assert type(read) is WarmStage and read.warmth == 2.5
    assert about["stages"][0]["kind"] == f"{__name__}.WarmStage"
    program = "import sys; from cdm_lightning.cascade.bundle import read_bundle; read_bundle(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "b")], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert f"is of the class {__name__}.WarmStage, which is not imported: if you trust it" in done.stderr
    assert f"cdm --import {__name__} " in done.stderr


@pytest.mark.parametrize("kind", ["os.system", "os", 3, None, ["BaseStage"], "..", "cdm_lightning.stages.UNet"])
def test_what_is_no_stage_is_refused_and_not_imported(kind):
    sentence_of_error(lambda: stage_class(kind, "a file"), "a file", "known are BaseStage")
    assert "antigravity" not in sys.modules
    sentence_of_error(lambda: stage_class("antigravity.Stage", "a file"), "antigravity.Stage, which is not imported")
    assert "antigravity" not in sys.modules
