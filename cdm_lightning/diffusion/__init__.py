"""The diffusion process: q(x_t|x_0) with its losses, and the samplers that run it backwards. No network lives here."""

from cdm_lightning.diffusion.process import Diffusion, Predict, Prediction, Sampler, Schedule, Variance

__all__ = ["Diffusion", "Predict", "Prediction", "Sampler", "Schedule", "Variance"]
