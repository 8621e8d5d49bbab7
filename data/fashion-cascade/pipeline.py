"""The pipeline of this cascade for diffusers; it needs the package cdm_lightning."""

from cdm_lightning.cascade.diffusers_pipeline import CascadePipeline as CascadePipeline
