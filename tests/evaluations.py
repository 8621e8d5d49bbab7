"""Samples of a small cascade with the cards that judge them, a figure to show, and a detector that fails."""

from types import SimpleNamespace

from small_models import smallest_stages

from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.evaluation.detectors import Detector
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.references.reference import reference
from cdm_lightning.sampling.sample import sample

CNN, CPU, N = "fashion-cnn-64", {"accelerator": "cpu"}, 20
OWN = "Fréchet distance (fashion-cnn-64)"


def prepare_evaluation(root, real):
    """Cards of real images at 16x16, a bundle, and three sets of its samples, in shards of 8, 8 and 4 images."""
    made = SimpleNamespace(root=root, real=real, bundle=root / "bundle", cards=[])
    for split, keep in (("val", 100), ("train", 50)):
        made.cards.append(root / f"{split}.safetensors")
        reference(real, made.cards[-1], 16, split, CNN, keep=keep, **CPU)
    classes = read_manifest(real / "val" / "32").classes
    write_bundle(made.bundle, smallest_stages(), {"levels": [5], "classes": classes})
    made.samples = [root / f"samples{seed}" for seed in range(3)]
    for seed, folder in enumerate(made.samples):
        sample(made.bundle, folder, count=N, seed=seed, block_size=8, **CPU)
    return made


def figure(value=7.05, spread=0.08, key="fd", name=OWN, **others):
    about = dict(spread_of="3 disjoint seeds", against="val", n=500, n_reference=3000, note="")
    return Figure(key, name, value, spread, **{**about, **others})


class LogOfMean(Detector):
    """Features that are no numbers for dark images."""

    name, sha256, num_features = "broken", "b", 2

    def forward(self, image):
        return image.flatten(1).float().mean(1, keepdim=True).log().expand(-1, 2)
