"""The diffusion against closed forms: for Gaussian data the optimal denoiser, and every sampler's law, are known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm

from cdm_lightning.diffusion import Diffusion
from cdm_lightning.diffusion.process import discretized_gaussian_log_likelihood, schedule_settings
from cdm_lightning.diffusion.samplers import ancestral_step
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.randomness import KeyedStreams

MEAN, STD = 0.3, 0.2  # of the data, pixel by pixel


def reference_alpha_bar(schedule: str, timesteps: int) -> np.ndarray:
    """abar_0 ... abar_T in float64, straight from the formulas."""
    i = np.arange(timesteps, dtype=np.float64)
    if schedule == "cosine":

        def f(u):
            return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

        beta = np.minimum(1 - f((i + 1) / timesteps) / f(i / timesteps), 0.999)
    else:
        beta = np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)
    return np.concatenate([[1.0], np.cumprod(1 - beta)])


def optimal_eps(diffusion: Diffusion):
    """E[eps | x_t] for data N(MEAN, STD^2): sqrt(1-abar) (x_t - sqrt(abar) MEAN) / (abar STD^2 + 1 - abar)."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = float(diffusion.alpha_bar(t[:1].double()))
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * MEAN) / (abar * STD**2 + 1 - abar)
        return eps

    return predict


def with_optimal_variance(diffusion: Diffusion, stop_at: int = 0):
    """The optimal eps beside the v at which Sigma is the true Var[x_prev | x_t] of Gaussian data."""
    _, indices = diffusion.sampling_grid(stop_at)
    following = dict(zip(indices, [*indices[1:], stop_at - 1], strict=True))
    eps = optimal_eps(diffusion)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        index = int(t[0]) - 1
        abar = diffusion.table("abar")
        a, b = float(abar[index + 1]), float(abar[following[index] + 1])
        beta = 1 - a / b
        posterior = beta * (1 - b) / (1 - a)
        share = math.sqrt(b) * beta / (1 - a)  # of x_0 in the posterior's mean
        variance_of_x = STD**2 * (1 - a) / (a * STD**2 + 1 - a)  # Var[x_0 | x_t]
        true = posterior + share**2 * variance_of_x
        low = math.log(max(posterior, 1e-20))
        v = 2 * (math.log(true) - low) / (math.log(beta) - low) - 1
        return torch.cat([eps(x, t), torch.full_like(x, v)], dim=1)

    return predict


def run(diffusion: Diffusion, stop_at: int = 0, seed: int = 0, predict=None) -> torch.Tensor:
    streams = KeyedStreams([seed], "cpu", "test")
    return diffusion.sample(predict or optimal_eps(diffusion), streams.randn((1, 256, 256)), stop_at, streams)


def assert_law(x: torch.Tensor, mean: float, std: float, sigmas: float = 5, slack: float = 0.0) -> None:
    n = x.numel()
    assert abs(float(x.mean()) - mean) < sigmas * std / math.sqrt(n) + slack
    assert abs(float(x.std()) - std) < sigmas * std / math.sqrt(2 * n) + slack


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("timesteps", [1000, 4000])
def test_schedules_equal_the_float64_formulas(schedule, timesteps):
    ours = Diffusion(timesteps, schedule).table("abar").numpy()
    np.testing.assert_allclose(ours, reference_alpha_bar(schedule, timesteps), rtol=2e-5, atol=1e-12)


def test_diffuse_has_the_moments_of_q():
    diffusion = Diffusion(1000)
    x = torch.full((3, 1, 256, 256), MEAN)
    t = torch.tensor([0.0, 300.0, 1000.0])
    x_t = diffusion.diffuse(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(x_t[0], x[0])
    abar = reference_alpha_bar("cosine", 1000)[[300, 1000]]
    for got, a in zip(x_t[1:], abar, strict=True):
        assert_law(got, math.sqrt(a) * MEAN, math.sqrt(1 - a))


# -- (a) learned variance with the optimal v: the exact law at every number of steps


@pytest.mark.parametrize("steps", [2, 5, 10, 25, 100, 400])
def test_learned_variance_returns_the_data_at_every_number_of_steps(steps):
    diffusion = Diffusion(1000, "cosine", "learned", sampling_steps=steps, clip=False)
    x = run(diffusion, predict=with_optimal_variance(diffusion))
    # The last step adds no noise, as in every DDPM sampler: it returns E[x_0 | x_1], whose spread is slightly less.
    last = float(diffusion.table("abar")[1])
    shrink = math.sqrt(last) * STD / math.sqrt(last * STD**2 + 1 - last)
    assert_law(x, MEAN, STD * shrink, slack=3e-4)


# -- (b) fixed variances and ODE samplers: mean and variance propagated through the sampler's own recursion


def propagate(kind: str, schedule: str, timesteps: int, indices: list[int], stop_at: int = 0) -> tuple[float, float]:
    """Mean and std of the end state in float64: every step of every sampler is affine in x, plus independent noise."""
    abar = reference_alpha_bar(schedule, timesteps)
    mean, variance, previous_lambda, previous = 0.0, 1.0, None, None
    ends = [*[i + 1 for i in indices[1:]], stop_at]
    slope, offset = 1.0, 0.0  # of the end state of an ODE sampler as a function of the noise it began with
    for n, (t, s) in enumerate(zip([i + 1 for i in indices], ends, strict=True)):
        a, b = abar[t], abar[s]
        gain = math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)  # x_0 = MEAN + gain (x - sqrt(a) MEAN)
        constant = MEAN - gain * math.sqrt(a) * MEAN
        if kind in ("fixed_small", "fixed_large"):
            beta = 1 - a / b
            of_x0, of_x = math.sqrt(b) * beta / (1 - a), (1 - b) * math.sqrt(1 - beta) / (1 - a)
            noise = 0.0 if t == 1 else (beta * (1 - b) / (1 - a) if kind == "fixed_small" else beta)
            mean = (of_x + of_x0 * gain) * mean + of_x0 * constant
            variance = (of_x + of_x0 * gain) ** 2 * variance + noise
            continue
        if kind == "ddim":
            ratio = math.sqrt((1 - b) / (1 - a))
            of_x, of_x0 = ratio, math.sqrt(b) - ratio * math.sqrt(a)
            slope, offset = (of_x + of_x0 * gain) * slope, (of_x + of_x0 * gain) * offset + of_x0 * constant
            continue
        # DPM-Solver++(2M), eq. of its algorithm 2; first and last steps are of first order
        lam = 0.5 * math.log(a / (1 - a))
        target = 0.5 * math.log(b / (1 - b)) if b < 1 else math.inf
        now = (gain * slope, gain * offset + constant)
        x0 = now
        first_order = n == 0 or (n == len(indices) - 1 and (s == 0 or len(indices) < 15))
        if not first_order:
            r = (lam - previous_lambda) / (target - lam)
            x0 = tuple((1 + 1 / (2 * r)) * p - 1 / (2 * r) * q for p, q in zip(now, previous, strict=True))
        of_x = math.sqrt((1 - b) / (1 - a))
        of_x0 = math.sqrt(b) * (1 - math.exp(lam - target))
        slope, offset = of_x * slope + of_x0 * x0[0], of_x * offset + of_x0 * x0[1]
        previous_lambda, previous = lam, now
    if kind in ("ddim", "dpm++"):
        return offset, abs(slope)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 25, 100])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_fixed_variances_follow_their_recursion(kind, steps, schedule):
    diffusion = Diffusion(1000, schedule, kind, sampling_steps=steps, clip=False)
    mean, std = propagate(kind, schedule, 1000, diffusion.sampling_grid()[1])
    assert_law(run(diffusion), mean, std, slack=3e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("steps", [10, 25, 100])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ode_samplers_follow_their_recursion(sampler, steps, schedule):
    diffusion = Diffusion(1000, schedule, "fixed_small", sampler=sampler, sampling_steps=steps, clip=False)
    mean, std = propagate(sampler, schedule, 1000, diffusion.sampling_grid()[1])
    assert_law(run(diffusion), mean, std, slack=1e-3)


@pytest.mark.parametrize("clip", [False, True])
def test_dpm_solver_clips_as_diffusers_does_and_sorts_nothing(clip, monkeypatch):
    ours = Diffusion(1000, "cosine", "fixed_small", sampler="dpm++", sampling_steps=10, clip=clip).sampling_grid()[0]
    theirs = type(ours).from_config(ours.config)
    theirs.set_timesteps(10)
    g = torch.Generator().manual_seed(0)
    x, outputs = torch.randn(4, 3, 8, 8, generator=g), 3 * torch.randn(10, 4, 3, 8, 8, generator=g)
    images = [x, x]
    for t, output in zip(theirs.timesteps, outputs, strict=True):
        images[0] = theirs.step(output, t, images[0]).prev_sample
    monkeypatch.delattr(torch, "quantile")
    for t, output in zip(theirs.timesteps, outputs, strict=True):
        images[1] = ours.step(output, t, images[1]).prev_sample
    assert torch.equal(*images) and (images[0].abs().max() <= 1) == clip


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "ddim", "dpm++"])
def test_more_steps_approach_the_data(kind):
    sampler = kind if kind in ("ddim", "dpm++") else "ddpm"
    variance = kind if sampler == "ddpm" else "fixed_small"
    errors = []
    for steps in (10, 100, 1000):
        diffusion = Diffusion(1000, "linear", variance, sampler=sampler, sampling_steps=steps, clip=False)
        errors.append(abs(float(run(diffusion).std()) - STD))
    assert errors[-1] < 0.007 and errors[-1] < errors[0]


# -- (c) stopping at s leaves q(x_s)


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_an_error_of_the_network_near_t_is_mended_for_v_and_ruins_the_image_for_epsilon(sampler):
    """Why a base stage that few deterministic steps sample predicts v.

    The network is right but for 0.05 of noise, the same at every call, above t = 0.9 T. From epsilon, x_0 is there
    guessed by a division by sqrt(abar), almost 0: the guess is noise of full contrast, and no later step adds noise
    that could hide it. From v, the guess keeps an error of 0.05.
    """
    wrong = 0.05 * torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    errors = {}
    for prediction in ("epsilon", "v_prediction"):
        diffusion = Diffusion(4000, "cosine", "fixed_small", prediction, sampler=sampler, sampling_steps=10)
        eps = optimal_eps(diffusion)

        def right(x, t, diffusion=diffusion, eps=eps, prediction=prediction):
            abar = float(diffusion.alpha_bar(t[:1].double()))
            x_0 = (x - math.sqrt(1 - abar) * eps(x, t)) / math.sqrt(abar)
            return eps(x, t) if prediction == "epsilon" else math.sqrt(abar) * eps(x, t) - math.sqrt(1 - abar) * x_0

        def poor(x, t, right=right):
            return right(x, t) + wrong * (t[0] > 3600)

        difference = diffusion.sample(poor, noise.double()) - diffusion.sample(right, noise.double())
        errors[prediction] = float(difference.abs().mean())
    assert errors["v_prediction"] < 0.02 and errors["epsilon"] > 5 * errors["v_prediction"], errors


@pytest.mark.parametrize("stop_at", [1, 17, 101, 500, 501, 999])  # on and off the grid of 25 steps
def test_stopping_leaves_the_law_of_x_s(stop_at):
    diffusion = Diffusion(1000, "cosine", "learned", sampling_steps=25, clip=False)
    x = run(diffusion, stop_at, predict=with_optimal_variance(diffusion, stop_at))
    abar = reference_alpha_bar("cosine", 1000)[stop_at]
    assert_law(x, math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar), slack=4e-4)


def test_every_s_is_exact_at_full_steps_and_calls_no_step_below_it():
    diffusion = Diffusion(200, "cosine", "learned", clip=False)
    for stop_at in range(0, 200, 7):
        assert diffusion.sampling_grid(stop_at)[1] == list(range(199, stop_at - 1, -1))
    diffusion.sampling_steps = 10
    for stop_at in range(200):
        assert all(index >= stop_at for index in diffusion.sampling_grid(stop_at)[1])


@pytest.mark.parametrize("stop_at", [100, 400])
def test_ddim_stops_on_its_grid_with_the_ode_law(stop_at):
    diffusion = Diffusion(1000, "linear", "fixed_small", sampler="ddim", sampling_steps=50, clip=False)
    mean, std = propagate("ddim", "linear", 1000, diffusion.sampling_grid(stop_at)[1], stop_at)
    assert_law(run(diffusion, stop_at), mean, std, slack=1e-3)
    abar = reference_alpha_bar("linear", 1000)[stop_at]
    assert abs(std - math.sqrt(abar * STD**2 + 1 - abar)) < 0.02


@pytest.mark.parametrize("stop_at", [101, 501])
def test_dpm_solver_stops_at_any_s(stop_at):
    diffusion = Diffusion(1000, "linear", "fixed_small", sampler="dpm++", sampling_steps=50, clip=False)
    abar = reference_alpha_bar("linear", 1000)[stop_at]
    assert_law(run(diffusion, stop_at), math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar), slack=4e-3)


# -- (d) truncated and non-truncated agree in law, and a wrong clock does not


def test_truncated_and_non_truncated_agree_in_law():
    stop_at = 301
    diffusion = Diffusion(1000, "cosine", "learned", sampling_steps=25, clip=False)
    truncated = run(diffusion, stop_at, predict=with_optimal_variance(diffusion, stop_at))
    z_0 = run(diffusion, seed=1, predict=with_optimal_variance(diffusion))
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(2))
    again = diffusion.diffuse(z_0, torch.tensor([float(stop_at)]), noise)
    assert abs(float(truncated.mean() - again.mean())) < 7 * float(again.std()) / math.sqrt(again.numel())
    assert abs(float(truncated.std() - again.std())) < 7 * float(again.std()) / math.sqrt(2 * again.numel()) + 3e-4
    wrong_clock = Diffusion(4000, "cosine").diffuse(z_0, torch.tensor([float(stop_at)]), noise)
    assert abs(float(truncated.std() - wrong_clock.std())) > 0.05


# -- continuous time


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("timesteps", [1000, 2000, 4000])
def test_time_goes_through_alpha_bar_and_back(schedule, timesteps):
    diffusion = Diffusion(timesteps, schedule, "fixed_small", continuous=True)
    t = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (timesteps - 1)
    t = torch.cat([t, torch.arange(timesteps, dtype=torch.float64)])
    assert float((diffusion.time_from_alpha_bar(diffusion.alpha_bar(t)) - t).abs().max()) < 1e-9


def test_continuous_time_follows_another_schedule_by_mapping_its_noise():
    diffusion = Diffusion(
        2000, "linear", "fixed_small", continuous=True, sampling_schedule="cosine", sampling_steps=100
    )
    diffusion.clip = False
    times = []
    denoise = optimal_eps(diffusion)

    def predict(x, t):
        times.append(float(t[0]))
        return denoise(x, t)

    x = run(diffusion, predict=predict)
    mean, std = propagate("fixed_small", "cosine", 2000, diffusion.sampling_grid()[1])
    assert_law(x, mean, std, slack=2e-3)  # the cosine schedule ends in more noise than the linear one knows
    cosine, linear = reference_alpha_bar("cosine", 2000), reference_alpha_bar("linear", 2000)
    for index, t in zip(diffusion.sampling_grid()[1], times, strict=True):
        expected = np.interp(-cosine[index + 1], -linear, np.arange(2001))
        assert abs(t - expected) < 1e-2
    assert any(t != round(t) for t in times)


def test_times_of_training_cover_the_grid_and_the_gaps():
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    discrete = Diffusion(1000).time_from_uniform(u)
    assert sorted(set(discrete.tolist())) == [float(t) for t in range(1, 1001)]
    real = Diffusion(1000, variance="fixed_small", continuous=True).time_from_uniform(u)
    assert 0 < float(real.min()) < 0.02 and float(real.max()) == 1000


# -- losses and posterior in float64


def reference_vlb(abar, x, x_t, eps, v, t):
    """L_{t-1} per image in bits per dimension: textbook formulas in float64, one image at a time."""
    from scipy.stats import norm

    out = []
    for n, step in enumerate(t):
        a, b = abar[step], abar[step - 1]
        beta = 1 - a / b
        tilde = beta * (1 - b) / (1 - a) if step > 1 else (1 - abar[2] / abar[1]) * (1 - abar[1]) / (1 - abar[2])
        q_mean = np.sqrt(b) * beta / (1 - a) * x[n] + np.sqrt(1 - beta) * (1 - b) / (1 - a) * x_t[n]
        p_mean = (x_t[n] - beta / np.sqrt(1 - a) * eps[n]) / np.sqrt(1 - beta)  # DDPM, eq. 11
        f = (v[n] + 1) / 2
        log_variance = f * np.log(beta) + (1 - f) * np.log(tilde)
        if step > 1:
            kl = 0.5 * (log_variance - np.log(tilde) + (tilde + (q_mean - p_mean) ** 2) / np.exp(log_variance) - 1)
            out.append(kl.mean() / np.log(2))
        else:
            std = np.exp(0.5 * log_variance)
            upper = np.where(x[n] > 0.999, 1, norm.cdf((x[n] + 1 / 255 - p_mean) / std))
            lower = np.where(x[n] < -0.999, 0, norm.cdf((x[n] - 1 / 255 - p_mean) / std))
            out.append(-np.log(np.maximum(upper - lower, 1e-12)).mean() / np.log(2))
    return np.array(out)


@pytest.mark.parametrize("timesteps", [1000, 4000])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-4), (torch.float32, 2e-2)])
def test_hybrid_loss_equals_the_float64_reference(timesteps, dtype, rtol):
    g = torch.Generator().manual_seed(3)
    t = torch.tensor([1, 2, 3, 20, timesteps // 2, timesteps - 1, 1, timesteps])
    x = (torch.rand(8, 2, 4, 4, generator=g, dtype=torch.float64) * 255).round() / 127.5 - 1
    x[6] = x[6].sign()  # saturated pixels
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    error = 0.01 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    v = torch.rand(x.shape, generator=g, dtype=torch.float64) * 2 - 1
    diffusion = Diffusion(timesteps)
    output = torch.cat([eps + error, v], 1)
    x_t = diffusion.diffuse(x, t.double(), eps)
    got = diffusion.vlb((eps + error).to(dtype), v.to(dtype), x.to(dtype), x_t.to(dtype), t.double())
    expected = reference_vlb(
        reference_alpha_bar("cosine", timesteps), x.numpy(), x_t.numpy(), (eps + error).numpy(), v.numpy(), t.tolist()
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=1e-6 if dtype == torch.float64 else 1e-4)
    losses = diffusion.loss(lambda *_: output.float(), x.float(), t.float(), eps.float())
    simple = error.square().flatten(1).mean(1).numpy()
    np.testing.assert_allclose(losses["simple"].numpy(), simple, rtol=1e-3)
    # the weight of the bound is T / 1000 and nothing else
    np.testing.assert_allclose(
        losses["loss"].numpy(), losses["simple"].numpy() + timesteps / 1000 * losses["vlb"].numpy(), rtol=1e-6
    )
    np.testing.assert_allclose(losses["vlb"].numpy(), expected, rtol=2e-2, atol=1e-3)


def test_the_bound_trains_the_variance_and_leaves_the_mean_alone():
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(4, 1, 4, 4, generator=g).clamp(-1, 1), torch.randn(4, 1, 4, 4, generator=g)
    output = torch.randn(4, 2, 4, 4, generator=g, requires_grad=True)
    losses = Diffusion(1000).loss(lambda *_: output, x, torch.tensor([1.0, 5.0, 500.0, 1000.0]), eps)
    (of_vlb,) = torch.autograd.grad(losses["vlb"].sum(), output, retain_graph=True)
    assert float(of_vlb[:, :1].abs().max()) == 0 and float(of_vlb[:, 1:].abs().min()) > 0
    (of_simple,) = torch.autograd.grad(losses["simple"].sum(), output)
    assert float(of_simple[:, 1:].abs().max()) == 0 and float(of_simple[:, :1].abs().min()) > 0


def test_likelihood_bins_sum_to_one():
    x = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    for mean, scale in ((0.1, -2.0), (-1.0, -3.0), (0.9, 0.0)):
        mass = discretized_gaussian_log_likelihood(x, torch.tensor(mean), torch.tensor(scale, dtype=torch.float64))
        assert abs(float(mass.exp().sum()) - 1) < 1e-6


@pytest.mark.parametrize("log_scale", [-5.0, -3.0, 0.0])
def test_the_likelihood_is_exact_far_from_the_mean(log_scale):
    """In float32, against scipy's logarithm of the normal distribution in float64, out to 30 standard deviations."""
    scale = np.exp(log_scale)
    mean = np.linspace(-30, 30, 241) * scale
    for x in (-1.0, 1 / 255, 1.0):
        a, b = ((x - mean - x + side / 255) / scale for side in (-1, 1))  # the mean lies around x
        a, b = np.where(a > 0, -b, a), np.where(a > 0, -a, b)  # the same mass in the lower tail
        inside = norm.logcdf(b) + np.log(-np.expm1(norm.logcdf(a) - norm.logcdf(b)))
        tails = {-1.0: norm.logcdf((-mean + 1 / 255) / scale), 1.0: norm.logcdf((mean + 1 / 255) / scale)}
        expected = torch.from_numpy(tails.get(x, inside)).float()
        given = (torch.tensor(v, dtype=torch.float32) for v in (np.full_like(mean, x), x + mean, log_scale))
        got = discretized_gaussian_log_likelihood(*given)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    mean = torch.tensor([0.0, 0.5, 3.0], requires_grad=True)
    discretized_gaussian_log_likelihood(torch.zeros(3), mean, torch.full((3,), log_scale)).sum().backward()
    assert mean.grad.isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_trains_and_samples_to_the_same_law(prediction):
    diffusion = Diffusion(1000, "linear", "fixed_large", prediction, sampling_steps=100, clip=False)
    x, eps, t = torch.full((2, 1, 4, 4), MEAN), torch.randn(2, 1, 4, 4), torch.tensor([100.0, 700.0])
    abar = diffusion.alpha_bar(t).float().view(-1, 1, 1, 1)
    target = {"epsilon": eps, "sample": x, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x}[prediction]
    assert float(diffusion.loss(lambda *_: target, x, t, eps)["loss"].max()) < 1e-12
    x_t = diffusion.diffuse(x, t, eps)
    torch.testing.assert_close(diffusion.epsilon_from_prediction(target, x_t, t), eps, rtol=1e-3, atol=1e-4)
    denoise = optimal_eps(diffusion)

    def predict(x, t):
        a = diffusion.alpha_bar(t[:1]).float()
        e = denoise(x, t)
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        return {"epsilon": e, "sample": x0, "v_prediction": a.sqrt() * e - (1 - a).sqrt() * x0}[prediction]

    mean, std = propagate("fixed_large", "linear", 1000, diffusion.sampling_grid()[1])
    assert_law(run(diffusion, predict=predict), mean, std, slack=5e-4)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["learned", "fixed_small", "fixed_large"])
def test_the_ancestral_step_is_that_of_diffusers(variance, prediction, clip):
    diffusion = Diffusion(1000, "cosine", variance, prediction, clip=clip, sampling_steps=7)
    names = {"learned": "learned_range"}
    peer = DDPMScheduler(**schedule_settings("cosine", 1000), variance_type=names.get(variance, variance),
                         prediction_type=prediction, clip_sample=clip, timestep_spacing="linspace")  # fmt: skip
    abar = diffusion.table("abar")
    peer.alphas_cumprod, peer.one = abar[1:], abar[:1][0]  # its own are rounded to float32
    grid = diffusion.sampling_grid(100)[1]
    peer.set_timesteps(timesteps=[*grid, 99, 0])
    for index, after in pairwise([*grid, 99, 0, -1]):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        output = torch.randn(2, 6 if variance == "learned" else 3, 8, 8, dtype=torch.float64)
        expected = peer.step(output, index, x, generator=torch.Generator().manual_seed(index)).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(index), dtype=x.dtype)
        found = ancestral_step(output, x, z, float(abar[index + 1]), float(abar[after + 1]), prediction, variance, clip)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "sampler, first, stop_at",
    [("ddpm", 1000, 0), ("ddpm", 1000, 500), ("ddim", 1000, 0), ("dpm++", 996, 0), ("dpm++", 996, 500)],
)
def test_one_step_begins_at_the_noise(sampler, first, stop_at):
    times = []
    diffusion = Diffusion(1000, "cosine", "fixed_small", sampler=sampler, sampling_steps=1)
    diffusion.sample(lambda x, t: times.append(float(t[0])) or torch.zeros_like(x), torch.randn(2, 1, 4, 4), stop_at)
    assert times[0] == first and all(t > stop_at for t in times)


@pytest.mark.parametrize("variance", ["learned", "fixed_small"])
def test_a_network_in_bfloat16_is_taken_at_its_word(variance):
    diffusion = Diffusion(1000, "cosine", variance, sampling_steps=5)
    outputs = [torch.randn(2, 6 if variance == "learned" else 3, 8, 8).bfloat16() for _ in range(5)]

    def drawn(given):
        following = iter(given)
        return diffusion.sample(lambda x, t: next(following), torch.zeros(2, 3, 8, 8), 0, KeyedStreams([1, 2], "cpu"))

    half, whole = drawn(outputs), drawn([output.float() for output in outputs])
    assert half.dtype == torch.float32 and torch.equal(half, whole)


def test_every_image_has_a_stream_of_its_own():
    with pytest.raises(ValueError, match="1 streams for 2 images"):
        run_of = Diffusion(1000, "cosine", "fixed_small", sampling_steps=5)
        run_of.sample(optimal_eps(run_of), torch.zeros(2, 1, 4, 4), 0, KeyedStreams([1], "cpu"))


def test_clipping_keeps_the_predicted_image_in_range():
    for sampler in ("ddpm", "ddim", "dpm++"):
        diffusion = Diffusion(1000, "linear", "fixed_small", sampler=sampler, sampling_steps=10)
        x = run(diffusion, predict=lambda x, t: torch.zeros_like(x))
        assert float(x.abs().max()) <= 1 + 1e-5


@pytest.mark.parametrize(
    "options, stop_at, sentence",
    [
        (dict(timesteps=20, schedule="linear"), 0, "timesteps 20 are too few for the linear schedule"),
        (dict(variance="learned", continuous=True), 0, "continuous time takes a fixed variance"),
        (dict(variance="fixed_small", sampling_schedule="linear"), 0, "which only a stage trained in continuous time"),
        (dict(sampling_steps=0), 0, "sampling_steps 0 lies outside"),
        (dict(sampling_steps=1001), 0, "sampling_steps 1001 lies outside"),
        (dict(sampler="ddim", sampling_steps=7), 0, "does not divide T = 1000"),
        (dict(sampler="ddim", sampling_steps=50), 101, "the nearest are 100 and 120"),
        (dict(sampler="dpm++", sampling_steps=20), 998, "stop_at 998 leaves dpm.. no step: its first is at t = "),
        (dict(), 1000, "stop_at 1000 lies outside 0 <= s < T = 1000"),
        (dict(), -1, "stop_at -1 lies outside"),
        (
            dict(variance="fixed_small", continuous=True, sampling_schedule="linear"),
            5,
            "has no place on the other clock",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options, stop_at, sentence):
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        Diffusion(**{"timesteps": 1000, **options}).sampling_grid(stop_at)
