"""What a stage says in validation and test, and the network that it builds where nothing is said."""

import lightning.pytorch as L
import pytest
import torch
from small_models import batch_of, smallest_stages
from torch.utils.data import DataLoader

from cdm_lightning.foundation.images import to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages import BaseStage

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("number", [0, 1])
def test_validation_and_test_log_the_mean_over_all_images(number):
    """Also where one batch is smaller than the others."""
    stage = smallest_stages()[number]
    whole = batch_of(stage, 7)
    batches = [tuple(part[first : first + 3] for part in whole) for first in (0, 3, 6)]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    expected = {name: float(value.mean()) for name, value in stage.losses(whole, "val").items()}
    for run, prefix in ((trainer.validate, "val/"), (trainer.test, "test/")):
        (logged,) = run(stage, DataLoader(batches, batch_size=None), verbose=False)
        assert logged == {prefix + name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_prediction_draws_one_image_for_each_of_a_batch():
    for stage in smallest_stages():
        batch = batch_of(stage, 3, first=5)
        images = stage.predict_step(batch, 0)
        drawn = stage.sample_like(batch, KeyedStreams([5, 6, 7], "cpu", 0, "predict"))
        assert images.dtype == torch.uint8 and torch.equal(images, to_uint8(drawn))


def test_the_defaults_build_the_network_that_the_documentation_names():
    """On no device, as it is large."""
    with torch.device("meta"):
        stage = BaseStage(resolution=32)
    assert (stage.image_channels, stage.num_classes, stage.diffusion.timesteps) == (3, 1000, 4000)
    widths = {p.shape[0] for name, p in stage.unet.named_parameters() if p.ndim == 4}
    assert {256, 512, 768, 1024, 6} <= widths  # 256 times 1, 2, 3 and 4, and twice the three channels
    assert {m.num_groups for m in stage.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    assert not [m for m in stage.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert (stage.lr, stage.warmup_steps, stage.decay_fraction, stage.seed) == (1e-4, 0, 0.0, 0)
