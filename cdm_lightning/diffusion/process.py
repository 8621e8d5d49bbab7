"""The diffusion process: q(x_t|x_0), the training losses, and the reverse process from x_T down to any x_s.

Time t runs over (0, T] as in the paper, and t = 0 is the clean image. diffusers counts time from 0 to T - 1: its index
is t - 1, and is used in this file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from cdm_lightning.diffusion.samplers import ancestral_step, check_ddim_grid, make_scheduler
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.randomness import Streams, TorchStreams

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t) -> (B, C or 2C, H, W)
Schedule = Literal["cosine", "linear"]
Variance = Literal["learned", "fixed_small", "fixed_large"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Sampler = Literal["ddpm", "ddim", "dpm++"]


def schedule_settings(schedule: Schedule, timesteps: int) -> dict[str, Any]:
    """The arguments of a diffusers scheduler: Improved DDPM's cosine, or DDPM's linear betas scaled by 1000 / T."""
    settings = {"num_train_timesteps": timesteps}
    if schedule == "cosine":
        return {**settings, "beta_schedule": "squaredcos_cap_v2"}
    scale = 1000 / timesteps
    return {**settings, "beta_schedule": "linear", "beta_start": 1e-4 * scale, "beta_end": 2e-2 * scale}


class Diffusion:
    """q(x_t|x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), its training loss, and its reverse process.

    timesteps: T.
    variance: "learned" trains with the hybrid loss of Improved DDPM, and the network returns 2C channels; "fixed_small"
    and "fixed_large" train with the simple loss.
    continuous: t is any real number in (0, T], with abar linear between grid points, so that the sampling schedule can
    be chosen after training (as in SR3 and WaveGrad).
    sampler, sampling_steps (None: T), sampling_schedule (None: the training schedule) and clip (the predicted x_0 to
    [-1, 1] at each step) affect sampling only, and may be assigned at any time.
    """

    def __init__(
        self,
        timesteps: int = 4000,
        schedule: Schedule = "cosine",
        variance: Variance = "learned",
        prediction: Prediction = "epsilon",
        continuous: bool = False,
        sampler: Sampler = "ddpm",
        sampling_steps: int | None = None,
        sampling_schedule: Schedule | None = None,
        clip: bool = True,
    ) -> None:
        if continuous and variance == "learned":
            raise InputError("continuous time takes a fixed variance: the hybrid loss needs the grid's neighbours of t")
        for name, value, kind in (
            ("schedule", schedule, Schedule),
            ("sampling_schedule", sampling_schedule or schedule, Schedule),
            ("variance", variance, Variance),
            ("prediction", prediction, Prediction),
        ):
            if value not in get_args(kind):
                raise InputError(f"{name} {value!r} is none of {', '.join(get_args(kind))}")
        if "linear" in (schedule, sampling_schedule) and timesteps <= 20:
            raise InputError(f"timesteps {timesteps} are too few for the linear schedule, whose last beta is 20 / T")
        self.timesteps, self.schedule, self.variance = timesteps, schedule, variance
        self.prediction, self.continuous, self.clip = prediction, continuous, clip
        self.sampler, self.sampling_steps, self.sampling_schedule = sampler, sampling_steps, sampling_schedule
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}

    # -- the forward process

    def table(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """`abar`, `log_beta` or `log_posterior` (of beta~, the posterior variance), float64 (T + 1,), indexed by t.

        Entry 0 of the logarithms is unused.
        """
        device = torch.device(device)
        if (name, device) not in self._tables:
            from diffusers import DDPMScheduler

            scheduler: Any = DDPMScheduler(**schedule_settings(self.schedule, self.timesteps))
            beta = scheduler.betas.double()
            abar = torch.cat([beta.new_ones(1), torch.cumprod(1 - beta, 0)])
            posterior = beta * (1 - abar[:-1]) / (1 - abar[1:])
            posterior[0] = posterior[1] if self.timesteps > 1 else beta[0]  # at t = 1 it is 0, which has no logarithm
            tables = {
                "abar": abar,
                "log_beta": _prepend_time_zero(beta.log()),
                "log_posterior": _prepend_time_zero(posterior.log()),
            }
            self._tables |= {(key, device): value.to(device) for key, value in tables.items()}
        return self._tables[name, device]

    def alpha_bar(self, t: torch.Tensor) -> torch.Tensor:
        """abar at real t in [0, T], float64, linear between grid points."""
        abar = self.table("abar", t.device)
        below = t.double().floor().long().clamp(max=self.timesteps - 1)
        return torch.lerp(abar[below], abar[below + 1], t.double() - below)

    def time_from_alpha_bar(self, alpha_bar: torch.Tensor) -> torch.Tensor:
        """The real t with abar(t) = alpha_bar, float64. An alpha_bar below abar(T) maps to T."""
        abar = self.table("abar", alpha_bar.device)
        value = alpha_bar.double().clamp(float(abar[-1]), 1.0)
        above = torch.searchsorted(-abar, -value).clamp(1, self.timesteps)
        return above - 1 + (abar[above - 1] - value) / (abar[above - 1] - abar[above])

    def time_from_uniform(self, u: torch.Tensor) -> torch.Tensor:
        """The training time t for u ~ U[0, 1), float32 (B,): uniform on 1 ... T, or on (0, T] in continuous time."""
        t = (1 - u) * self.timesteps if self.continuous else (u * self.timesteps).floor() + 1
        return t.float()

    def diffuse(self, x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (DDPM, eq. 4). t: (B,); t = 0 returns x."""
        abar = _per_image(self.alpha_bar(t), x)
        return abar.sqrt().to(x.dtype) * x + (1 - abar).sqrt().to(x.dtype) * eps

    # -- training

    def loss(self, predict: Predict, x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Per image, (B,): `simple` = mean (target - prediction)^2, `vlb` = L_{t-1} in bits/dim, `loss` to minimise.

        With a learned variance, loss = simple + (T / 1000) vlb. As t is uniform, this is the hybrid loss with
        lambda = 0.001 on the sum of all T terms (Improved DDPM, section 3.1). Else loss = simple.
        x, eps: float32 (B, C, H, W), x in [-1, 1].
        """
        x_t = self.diffuse(x, t, eps)
        output = predict(x_t, t).float()  # (B, C or 2C, H, W)
        prediction, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
        abar = _per_image(self.alpha_bar(t), x).float()
        velocity = abar.sqrt() * eps - (1 - abar).sqrt() * x
        target = {"epsilon": eps, "sample": x, "v_prediction": velocity}[self.prediction]
        simple = (prediction - target).square().flatten(1).mean(1)
        if self.variance != "learned":
            return {"loss": simple, "simple": simple}
        vlb = self.vlb(self.epsilon_from_prediction(prediction.detach(), x_t, t), v, x, x_t, t)
        return {"loss": simple + self.timesteps / 1000 * vlb, "simple": simple, "vlb": vlb}

    def epsilon_from_prediction(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's prediction, whether epsilon, x_0 or v, converted to epsilon. (B, C, H, W)."""
        abar = _per_image(self.alpha_bar(t), x_t)
        signal, noise = abar.sqrt().to(x_t.dtype), (1 - abar).sqrt().to(x_t.dtype)
        if self.prediction == "epsilon":
            return prediction
        if self.prediction == "sample":
            return (x_t - signal * prediction) / noise
        return signal * prediction + noise * x_t

    def vlb(
        self, eps: torch.Tensor, v: torch.Tensor, x: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """L_{t-1} of the variational bound in bits per dimension, (B,): a KL for t > 1, at t = 1 the likelihood of x.

        log Sigma = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2 (Improved DDPM, eq. 15). The caller detaches
        eps, so that this loss trains the variance and not the mean.
        """
        step = t.long()
        abar, previous = (self.table("abar", t.device)[i] for i in (step, step - 1))
        beta = 1 - abar / previous
        log_beta, log_posterior = (
            _per_image(self.table(name, t.device)[step], x).to(x.dtype) for name in ("log_beta", "log_posterior")
        )
        coef_x = _per_image(previous.sqrt() * beta / (1 - abar), x).to(x.dtype)
        coef_x_t = _per_image((1 - previous) * (1 - beta).sqrt() / (1 - abar), x).to(x.dtype)
        signal, noise = (_per_image(a, x).to(x.dtype) for a in (abar.sqrt(), (1 - abar).sqrt()))
        log_variance = (v + 1) / 2 * log_beta + (1 - v) / 2 * log_posterior
        mean = coef_x * (x_t - noise * eps) / signal + coef_x_t * x_t
        true_mean = coef_x * x + coef_x_t * x_t
        difference = log_posterior - log_variance
        kl = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = discretized_gaussian_log_likelihood(x, mean, 0.5 * log_variance)
        nats = torch.where(t <= 1, -likelihood.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2)

    # -- sampling

    @torch.no_grad()
    def sample(
        self,
        predict: Predict,
        noise: torch.Tensor,
        stop_at: int = 0,
        streams: Streams | None = None,
    ) -> torch.Tensor:
        """Run the reverse process from x_T = noise down to x_s, s = stop_at; 0 gives the image.

        noise: float32 (B, C, H, W). streams: one per image, for the noise of the ddpm sampler; None for torch's default
        generator. Calls predict(x_t, t) once per step, with t of shape (B,). Raises InputError where `sampling_grid`
        does.
        """
        scheduler, indices = self.sampling_grid(stop_at)
        clock = Diffusion(self.timesteps, self.sampling_schedule or self.schedule, "fixed_small")
        abar = clock.table("abar").tolist()
        x = noise.contiguous(memory_format=torch.channels_last)  # the layout of the network's activations
        streams = TorchStreams(len(x), x.device) if streams is None else streams
        if len(streams) != len(x):
            raise ValueError(f"{len(streams)} streams for {len(x)} images")
        for index, after in zip(indices, [*indices[1:], stop_at - 1], strict=True):
            t = torch.tensor(float(index + 1), dtype=torch.float64)
            if clock.schedule != self.schedule:
                t = self.time_from_alpha_bar(clock.alpha_bar(t))
            output = predict(x, torch.full((len(x),), float(t), device=x.device)).to(x.dtype)
            if self.sampler == "ddpm":
                z = streams.randn(x.shape[1:])
                settings = (self.prediction, self.variance, self.clip)
                x = ancestral_step(output, x, z, abar[index + 1], abar[after + 1], *settings)
                continue
            output = output[:, : x.shape[1]]  # only the ancestral sampler uses a learned variance
            # By default, DDIM would combine the clipped x_0 with the epsilon of the unclipped one.
            options = {"use_clipped_model_output": True} if self.sampler == "ddim" else {}
            x = scheduler.step(output, index, x, **options).prev_sample
        # The strides of stored images: the next stage's bits depend on them.
        return x.clone(memory_format=torch.contiguous_format)

    def sampling_grid(self, stop_at: int = 0) -> tuple[Any, list[int]]:
        """The scheduler, and the descending indices t - 1 at which the network is called on the way from T to s.

        s is added to the grid, so that the last call ends at x_s exactly. Raises InputError for a number of steps or an
        s that the sampler cannot use.
        """
        if not 0 <= stop_at < self.timesteps:
            raise InputError(f"stop_at {stop_at} lies outside 0 <= s < T = {self.timesteps}")
        if stop_at and self.sampling_schedule not in (None, self.schedule):
            raise InputError(
                f"stop_at {stop_at} has no place on the other clock of sampling_schedule {self.sampling_schedule!r}"
            )
        if self.sampling_schedule not in (None, self.schedule) and not self.continuous:
            raise InputError(
                f"sampling_schedule {self.sampling_schedule!r} differs from schedule {self.schedule!r}, "
                "which only a stage trained in continuous time can follow"
            )
        steps = self.timesteps if self.sampling_steps is None else self.sampling_steps
        if not 1 <= steps <= self.timesteps:
            raise InputError(f"sampling_steps {steps} lies outside 1 ... T = {self.timesteps}")
        settings = schedule_settings(self.sampling_schedule or self.schedule, self.timesteps)
        scheduler = make_scheduler(self.sampler, settings, self.prediction, self.clip)
        if self.sampler == "ddim":
            check_ddim_grid(self.timesteps, steps, stop_at)
        scheduler.set_timesteps(steps)
        grid = [int(i) for i in scheduler.timesteps]
        if steps == 1 and self.sampler == "ddpm":
            grid = [self.timesteps - 1]  # a linspace of one point is t = 1, the wrong end
        indices = sorted({*grid, stop_at - 1} if stop_at else set(grid), reverse=True)
        if indices != [
            int(i) for i in scheduler.timesteps
        ]:  # not for DDIM; the grid of DPM-Solver can repeat a time near T
            scheduler.set_timesteps(timesteps=indices)
        remaining = [i for i in indices if i >= stop_at]
        if not remaining:
            raise InputError(f"stop_at {stop_at} leaves {self.sampler} no step: its first is at t = {indices[0] + 1}")
        return scheduler, remaining


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """log of the mass of N(mean, scale^2) on the 8-bit bin around x, in nats, of x's shape (DDPM, eq. 13).

    The bins at -1 and 1 extend to infinity. The distribution function is taken as its logarithm and in the lower tail,
    where it is exact in float32 however far x is from the mean.
    """
    scale = (-log_scale).exp()
    distance = -(x - mean).abs()
    upper = torch.special.log_ndtr((distance + 1 / 255) * scale)
    lower = torch.special.log_ndtr((distance - 1 / 255) * scale)
    inside = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-7)))
    at_most = torch.special.log_ndtr((x - mean + 1 / 255) * scale)
    at_least = torch.special.log_ndtr((mean - x + 1 / 255) * scale)
    return torch.where(x < -0.999, at_most, torch.where(x > 0.999, at_least, inside))


def _per_image(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) to (B, 1, 1, 1), with as many dimensions as `like`."""
    return value.view(-1, *[1] * (like.ndim - 1))


def _prepend_time_zero(table: torch.Tensor) -> torch.Tensor:
    """Prepend an entry for t = 0, so that a table over t = 1 ... T can be indexed by t."""
    return torch.cat([table[:1], table])
