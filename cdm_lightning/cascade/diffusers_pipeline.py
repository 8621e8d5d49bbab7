"""A cascade as a pipeline of diffusers.

`DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)`, where FOLDER is a bundle.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin

from cdm_lightning.cascade.cascade import CascadeModule, advancing, plain
from cdm_lightning.diffusion import Diffusion, Predict
from cdm_lightning.diffusion.process import schedule_settings
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import output_images, quantize
from cdm_lightning.foundation.randomness import TorchStreams


class CascadeModel(ModelMixin):
    """A CascadeModule as the one component of the pipeline."""

    config_name = "bundle.json"

    def __init__(self, module: CascadeModule) -> None:
        super().__init__()
        self.module = module

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> CascadeModel:  # type: ignore[override]  # fewer options
        """The cascade of a bundle, float32. diffusers passes more options, for ways of loading that it lacks."""
        return cls(CascadeModule(bundle=Path(folder)))


class CascadePipeline(DiffusionPipeline):
    """Draws images of a cascade, stage after stage, non-truncated.

    scheduler: None for each stage's own sampler. A scheduler of diffusers with one network call a step takes the place
    of all of them; each stage gives it its own noise schedule and kind of prediction, and one that does not take them
    is refused.
    """

    cascade: Any  # the parts that register_modules sets
    scheduler: Any
    register_modules: Any  # of diffusers' class, which is not typed
    progress_bar: Any
    _execution_device: Any
    _optional_components = ["scheduler"]  # noqa: RUF012, read only

    def __init__(self, cascade: CascadeModel, scheduler: Any = None) -> None:
        super().__init__()
        self.register_modules(cascade=cascade, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_images: int | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images of the last resolution.

        class_labels: numbers or names, one per image; a cascade without classes takes num_images instead.
        num_inference_steps: network calls of every stage, or of each; None for the stages' own. levels: s of each
        super-resolution stage, None for the bundle's. generator: one for all images, or one per image. output_type:
        "pil", "np" for float (B, H, W, C) in [0, 1], or "pt" for (B, C, H, W). Raises InputError for what the cascade
        cannot do.
        """
        cascade = self.cascade.module
        label = cascade.labels(class_labels, num_images).to(self._execution_device)
        steps = plain(num_inference_steps)
        steps = steps if steps is None or isinstance(steps, Sequence) else [steps] * len(cascade.stages)
        if generator is not None:
            generator = list(generator) if isinstance(generator, Sequence) else [generator] * len(label)
        if generator is not None and [isinstance(g, torch.Generator) for g in generator] != [True] * len(label):
            raise InputError(f"generator must be a torch.Generator, or a list of {len(label)}, one for each image")
        streams, image = TorchStreams(len(label), label.device, generator), None
        with cascade.changed(levels, False, steps), advancing(cascade.stages, self.progress_bar):
            for stage, level in zip(cascade.stages, [0, *cascade.levels], strict=True):
                low_res = None if image is None else stage.augment(image, level, streams)
                strength = torch.full((len(label),), float(level), device=label.device)
                bound = (label,) if low_res is None else (label, low_res, strength)
                predict = (stage.predictor if low_res is None else stage.conditioned_predictor)(*bound)
                image = quantize(self.draw(stage.diffusion, predict, stage.noise(streams), streams))
        assert image is not None
        images = output_images(image, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def draw(self, diffusion: Diffusion, predict: Predict, noise: torch.Tensor, streams: TorchStreams) -> torch.Tensor:
        """x_0 from x_T = noise, float32 (B, C, H, W), by the stage's own sampler or by the pipeline's scheduler."""
        if self.scheduler is None:
            return diffusion.sample(predict, noise, 0, streams)
        scheduler = following(self.scheduler, diffusion)
        try:
            scheduler.set_timesteps(diffusion.sampling_steps or diffusion.timesteps, device=noise.device)
        except ValueError as error:
            raise InputError(f"{type(scheduler).__name__}: {' '.join(str(error).split())}") from error
        if scheduler.timesteps[0] < scheduler.timesteps[-1]:
            raise InputError(f"{type(scheduler).__name__} goes from images to noise, and draws no images")
        takes = inspect.signature(scheduler.step).parameters
        options = {"generator": streams.generators} if "generator" in takes else {}
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            output = predict(scaled, (t + 1).expand(len(x)).to(x))  # diffusers counts time from 0
            if not str(scheduler.config.get("variance_type")).startswith("learned"):
                output = output[:, : x.shape[1]]
            x = scheduler.step(output, t, x, **options).prev_sample
        return x

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Save the cascade as a bundle, which this pipeline is loaded from."""
        self.cascade.module.save_pretrained(save_directory)


def following(scheduler: Any, diffusion: Diffusion) -> Any:
    """A scheduler of the same class and options, on the noise schedule and with the prediction of a stage.

    Raises InputError for one that does not take them, or that needs more than the output of one network call a step.
    """
    options = getattr(scheduler, "config", {})
    if (
        getattr(scheduler, "order", 1) != 1
        or not {"beta_schedule", "trained_betas", "prediction_type"} <= set(options)
        or needs(scheduler.step) != {"model_output", "timestep", "sample"}
    ):
        raise InputError(
            f"{type(scheduler).__name__} is no scheduler of one network call a step that takes a noise schedule and a "
            "kind of prediction: such are DDIM, DDPM, Euler, PNDM, UniPC, DEIS and DPM-Solver++"
        )
    settings = schedule_settings(diffusion.schedule, diffusion.timesteps)
    settings["prediction_type"] = diffusion.prediction
    # Other options that replace the noise schedule or the network's clock.
    settings |= {"trained_betas": None, "rescale_betas_zero_snr": False, "use_flow_sigmas": False}
    settings["timestep_type"] = "discrete"
    if isinstance(scheduler, DDPMScheduler):  # the others have no use for a learned variance
        settings["variance_type"] = "learned_range" if diffusion.variance == "learned" else diffusion.variance
    made = type(scheduler).from_config(options, **settings)
    own = diffusion.table("abar", made.alphas_cumprod.device)[1:].float()
    if not torch.allclose(made.alphas_cumprod, own, atol=1e-5):
        raise InputError(f"{type(scheduler).__name__} changes the noise schedule that it is given, so it is not taken")
    return made


def needs(call: Any) -> set[str]:
    """The names of the arguments that a call cannot do without."""
    parameters = inspect.signature(call).parameters.values()
    return {each.name for each in parameters if each.default is each.empty and each.kind != each.VAR_KEYWORD}
