"""The diffusion process, without a network: q(x_t|x_0), the training losses, and samplers of the reverse process."""

from cdm_lightning.diffusion.process import Diffusion, Predict, Prediction, Sampler, Schedule, Variance

__all__ = ["Diffusion", "Predict", "Prediction", "Sampler", "Schedule", "Variance"]
