"""Fine-tuning: its gradients and closed forms, and one short seed of the 8-Gaussian benchmark."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from fewstep.config import FinetuneConfig
from fewstep.denoiser import OnPath
from fewstep.dxmi import FinetuneState, finetune, iterate, make_state, running_cost, sampler_step, value_step
from fewstep.energy import Value
from fewstep.metrics import auroc, sliced_wasserstein
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP, Cosine, Linear
from fewstep.sampler import Sampler
from fewstep.schedule import karras
from fewstep.training import make_denoiser

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gaussians8


def state_of(path=None, **settings) -> FinetuneState:
    """A small state; with a path, around the exact denoiser of N(0, 1) on it, where every step of the chain is known."""
    config = FinetuneConfig(**({"iterations": 10, "batch_size": 8} | settings))
    if path is None:
        denoiser = make_denoiser((2,), gaussians8.TRAIN)
    else:
        denoiser = OnPath(Mixture(torch.zeros(1, 2), 1.0), path)
        denoiser.stand_in = torch.nn.Parameter(torch.zeros(1))  # an optimiser wants a parameter
    return make_state(denoiser, karras(0.1, 10).times(denoiser.path, 3), config, (2,))


@pytest.mark.parametrize("path", [VE(0.1, 10), VP(), Cosine(), Linear()], ids=repr)
def test_the_backward_chain_is_the_paths_own_noising(path, generator):
    """x_i - k_i x_{i+1} has the variance that the state starts from, if x_i is x_{i+1} noised further along the path."""
    state = state_of(path)
    times = state.sampler.times
    x0, eps = torch.randn(2, 200_000, 2, generator=generator)
    for i in range(3):
        t, s = times[i], times[i + 1]
        x_s = path.noised(x0, eps, s)
        scale = path.alpha(t) / path.alpha(s)
        more = torch.sqrt(path.sigma(t) ** 2 - (scale * path.sigma(s)) ** 2)
        x_t = (scale * x_s + more * torch.randn(x_s.shape, generator=generator)).float()
        marginal = float(path.alpha(t) ** 2 + path.sigma(t) ** 2)
        assert float(x_t.var()) == pytest.approx(marginal, rel=0.02)
        residual = x_t - state.back_scale[i] * x_s.float()
        assert float((residual**2).mean()) == pytest.approx(float(state.back_variance[i]), rel=0.02)


def test_running_cost_is_entropy_and_velocity_per_dimension():
    state = state_of(tau=0.3, last_std=0.0)
    x, x_next = torch.randn(2, 6, 2)
    i = torch.tensor([0, 0, 1, 1, 2, 2])
    std = torch.tensor([0.5, 1.0, 2.0, 0.1, 0.0, 0.0])
    expected = []
    for k in range(6):
        squared = float(((x[k] - state.back_scale[i[k]] * x_next[k]) ** 2).mean())
        cost = 0.3 * (-math.log(max(float(std[k]), 1e-9)) + squared / (2 * float(state.back_variance[i[k]])))
        expected.append(cost if i[k] < 2 else 0.0)  # a step without noise is free
    assert torch.allclose(running_cost(state, i, x, x_next, std), torch.tensor(expected), atol=1e-5)


def test_the_sampler_step_moves_the_sampler_only_and_the_value_step_the_value_only():
    state = state_of()
    before = {k: v.clone() for k, v in state.state_dict()["sampler"].items()}
    value_before = {k: v.clone() for k, v in state.value.state_dict().items()}
    x, i = torch.randn(12, 2), torch.arange(3).repeat_interleave(4)
    sampler_step(state, i, x)
    assert all(torch.equal(v, value_before[k]) for k, v in state.value.state_dict().items())
    moved = {k: v.clone() for k, v in state.sampler.state_dict().items()}
    assert any(not torch.equal(v, before[k]) for k, v in moved.items())
    value_step(state, torch.randn(4, 2), i, x, torch.randn(12, 2))
    assert all(torch.equal(v, moved[k]) for k, v in state.sampler.state_dict().items())
    assert any(not torch.equal(v, value_before[k]) for k, v in state.value.state_dict().items())


def test_with_entropy_only_the_noise_finds_the_maximum_entropy_of_the_bound():
    """With V = 0, cost -log std + (|x - k m|^2 + k^2 std^2)/(2 s^2) per dimension is least at std = s/k."""
    state = state_of(tau=1.0, lr_std=0.05, velocity_decay=1.0, momentum=0.9)
    state.value.mlp.leave.weight.data.zero_()
    state.value.mlp.leave.bias.data.zero_()
    x, i = torch.randn(3000, 2), torch.arange(3).repeat_interleave(1000)
    state.sampler_optimiser.param_groups[0]["lr"] = 0.0
    for _ in range(300):
        state.sampler_optimiser.param_groups[1]["lr"] = 0.05
        sampler_step(state, i, x)
    best = state.back_variance.sqrt() / state.back_scale
    assert torch.allclose(state.sampler.std()[1:2], best[1:2], rtol=0.05)
    assert state.sampler.std()[2].item() == pytest.approx(state.config.last_std)


def test_the_energy_of_a_fixed_sampler_is_the_least_squares_critic():
    """With the sampler held, E tends to (pi - p)/(2 gamma (pi + p)): here 1-D normals, checked at several points."""
    gamma, g = 1.0, torch.Generator().manual_seed(0)
    value = Value((1,), torch.ones(2), width=64)
    sampler = Sampler(make_denoiser((1,), gaussians8.TRAIN), torch.tensor([0.5, 0.0], dtype=torch.float64), 0.1)
    state = FinetuneState(sampler, value, FinetuneConfig(gamma=gamma, lr_value=2e-3, momentum=0.9))
    i = torch.zeros(2000, dtype=torch.long)
    for step in range(600):
        state.value_optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
        data, generated = torch.randn(2, 2000, 1, generator=g)
        value_step(state, data, i, torch.zeros(2000, 1), generated + 1)
    x = torch.linspace(-1, 2, 7)[:, None]
    p, pi = torch.exp(-(x**2) / 2), torch.exp(-((x - 1) ** 2) / 2)
    with torch.no_grad():
        assert torch.allclose(value.energy(x), ((pi - p) / (2 * gamma * (pi + p)))[:, 0], atol=0.04)


def test_a_divergence_is_reported_with_the_metric_and_the_iteration():
    state = state_of(lr_value=1e30, warmup=0)
    with pytest.raises(ValueError, match=r"is not finite at iteration \d+: lower"):
        list(finetune(state, torch.randn(50, 2)))


def test_only_the_value_learns_in_the_warm_up():
    state = state_of(warmup=3)
    start = {k: v.clone() for k, v in state.sampler.state_dict().items()}
    for k in range(4):
        iterate(state, torch.randn(8, 2))
        same = all(torch.equal(v, start[name]) for name, v in state.sampler.state_dict().items())
        assert same == (k < 3)


@pytest.mark.timeout(280)
def test_fine_tuning_halves_the_excess_on_the_8_gaussians_and_its_energy_detects():
    """One short seed of benchmarks/gaussians8.py: same start, a third of the iterations, smaller estimators."""
    start, data = gaussians8.pretrain(seed=0, iterations=1500)
    config = dataclasses.replace(gaussians8.FINETUNE, iterations=1000)
    state = make_state(start.denoiser, start.times, config, (2,))
    for _ in finetune(state, data):
        pass
    g, n = torch.Generator().manual_seed(5), 10_000
    reference, other = ring().sample(n, g), ring().sample(n, g)
    floor = sliced_wasserstein(other, reference, 200, g)
    before, after = (
        sliced_wasserstein(s.sample(s.start(n, (2,), g), g), reference, 200, g) for s in (start, state.averaged.module)
    )
    assert before > 0.15
    assert after - floor < (before - floor) / 2, (before, after, floor)
    energy = state.averaged_value.module.energy
    with torch.no_grad():
        assert auroc(energy(reference), energy(torch.rand(n, 2, generator=g) * 8 - 4)) > 0.8
