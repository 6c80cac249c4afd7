"""The 2-D benchmarks: the published algorithm learns what it should, and finished cells are not run again."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from fewstep.denoiser import Pretrained
from fewstep.metrics import sliced_wasserstein
from fewstep.mixture import ring
from fewstep.path import VE
from fewstep.run import read_lines
from fewstep.sampler import Sampler
from fewstep.schedule import karras
from fewstep.training import make_denoiser

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gaussians8
import policy_gradient
import published
import toys

QUICK = gaussians8.QUICK


def untrained():
    torch.manual_seed(0)
    return gaussians8.five_steps(make_denoiser((2,), gaussians8.TRAIN))


@pytest.mark.parametrize("start", [untrained, lambda: gaussians8.papers(0, 1)[0]], ids=["fair", "paper's"])
def test_the_published_chain_starts_as_our_sampler(start):
    sampler, x = start(), torch.randn(16, 2)
    chain = published.Chain(sampler.denoiser, sampler.times, gaussians8.LAST_STD)
    i = torch.arange(16) % 5
    with torch.no_grad():
        assert torch.allclose(chain.mean(x, i), sampler.step(x, i).mean, atol=1e-5)
        assert torch.allclose(chain.mean(x, 2), sampler.step(x, 2).mean, atol=1e-5)
        assert torch.allclose(chain.log_stds().exp(), sampler.std())


def test_a_table_entered_with_standard_noise_starts_there():
    sampler, _ = gaussians8.papers(0, 1)
    start = sampler.start(50_000, (2,), torch.Generator().manual_seed(0))
    assert float(start.std()) == pytest.approx(1.0, abs=0.01)
    assert float(sampler.path.sigma(1.0)) < 0.3


def test_with_a_value_of_zero_the_published_noise_takes_the_velocity_for_its_own():
    """tau alone: -log std + (|m|^2 + std^2)/(2 s^2) per dimension is least at std = s, for a velocity that is held."""
    start = untrained()
    settings = published.Settings(tau=1.0, velocity_decay=1.0, lr=0.0, lr_std=0.05, lr_value=0.0, batch_size=32)
    run = published.Run.of(start.denoiser, start.times, settings)
    torch.nn.init.zeros_(run.value.mlp.leave.weight)
    torch.nn.init.zeros_(run.value.mlp.leave.bias)
    run.velocity *= 1.5**2
    aim = run.velocity[:-1].sqrt()
    data = ring().sample(32, torch.Generator().manual_seed(0))
    for _ in range(50):
        published.iterate(run, data)
    assert torch.allclose(run.chain.log_std.detach().exp() / aim, torch.ones(4), atol=0.15)


def test_the_published_value_is_the_cost_to_go():
    """With E held at its start, the value of a step whose next value is known is its running cost plus that."""
    start = untrained()
    run = published.Run.of(start.denoiser, start.times, published.Settings(tau=0.5))
    x, x_next = torch.randn(2, 6, 2)
    std = float(run.chain.log_std[1].detach())
    velocity = (x - x_next).square().sum(1) / 2 / (2 * math.exp(2 * std))
    cost = run.running_cost(1, x, x_next, run.chain.log_stds()[1])
    assert torch.allclose(cost, 0.5 * (velocity - std))
    with torch.no_grad():
        target = run.value(x_next, 2) + cost
        before = float((run.value(x, 1) - target).square().mean())
        generator_state = run.generator.get_state()
    published.value_step(run, 1, x, x_next)
    with torch.no_grad():
        assert float((run.value(x, 1) - target).square().mean()) < before
    assert torch.equal(run.generator.get_state(), generator_state)  # nothing is redrawn


def test_the_published_algorithm_brings_samples_closer():
    start, data = gaussians8.pretrain(0, 100)
    run = published.Run.of(start.denoiser, start.times, published.Settings(iterations=80, batch_size=64))
    g, n = torch.Generator().manual_seed(5), 4000
    reference = ring().sample(n, g)

    def distance() -> float:
        return sliced_wasserstein(run.chain.sample(run.chain.start(n, (2,), g), g), reference, 100, g)

    before = distance()
    for _ in published.learn(run, data):
        pass
    assert distance() < 0.85 * before


def test_modes_of_real_samples():
    found = gaussians8.modes(ring().sample(50_000, torch.Generator().manual_seed(0)))
    assert found["std_within"] == pytest.approx(0.5 / math.sqrt(2), rel=0.01)
    assert found["mass_error"] < 0.05
    assert sum(found["masses"]) == pytest.approx(1, abs=1e-3)


def test_finished_cells_are_not_run_again_unless_their_settings_change(tmp_path):
    calls = []

    def cell(seed, scale):
        calls.append(seed)
        return gaussians8.clock(1, 0.0) | {"sw": 0.1, "std_within": 0.3, "mass_error": 0.0}

    row = gaussians8.Row("a row, of its own", 3, {"tau": 0.1}, cell)
    gaussians8.run(tmp_path, [row], QUICK, 2)
    gaussians8.run(tmp_path, [row], QUICK, None)
    assert calls == [0, 1, 2]
    file = gaussians8.file_of(tmp_path, row)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # a kill in the middle of the last line
    gaussians8.run(tmp_path, [row], QUICK, None)
    assert calls == [0, 1, 2, 2]
    assert file.read_bytes() == whole
    changed = dataclasses.replace(row, settings={"tau": 0.2})
    gaussians8.run(tmp_path, [changed], QUICK, 1)
    assert calls[-1] == 0
    assert len(read_lines(file)) == 4
    assert set(gaussians8.finished(tmp_path, row, QUICK)) == {0, 1, 2}


def test_toys_are_of_one_size_and_centred():
    for name in toys.SETS:
        x = toys.draws(name, 20_000, torch.Generator().manual_seed(1))
        assert float(x.square().mean().sqrt()) == pytest.approx(2, rel=0.02)
        assert float(x.mean(0).abs().max()) < 0.1
        assert float(x.abs().max()) < toys.HALF + 2


def test_rows_have_names_of_their_own():
    known = gaussians8.rows()
    assert len({row.name for row in known}) == len({gaussians8.file_of(Path(), row) for row in known}) == len(known)


class Shrink(torch.nn.Module):
    """A network whose prediction is its input, scaled."""

    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(0.6))

    def forward(self, x, t):
        return self.by * x


def test_the_policy_gradient_is_that_of_the_expected_critic():
    """For a chain that is linear in x and a critic that is the samples' mean square: the slope of their second moment."""
    n, shape = 200_000, (2,)
    denoiser = Pretrained(Shrink(), VE(0.1, 2.0), predicts="x0", shape=shape)
    sampler = Sampler(denoiser, karras(0.1, 2.0).times(denoiser.path, 3), last_std=0.1)
    run = policy_gradient.Run(sampler, shape, policy_gradient.Settings(clip=math.inf, lr=0.0))
    run.critic = lambda x: x.square().mean(1)
    g = torch.Generator().manual_seed(0)
    states = sampler.rollout(sampler.start(n, shape, g), g)
    i = torch.arange(3).repeat_interleave(n)
    policy_gradient.policy_step(run, states[:-1].flatten(0, 1), i, states[1:].flatten(0, 1), states[-1].repeat(3, 1))
    by = denoiser.net.by.detach().clone().requires_grad_(True)
    moment = torch.tensor(2.0**2)
    for of_x, of_x0, std in zip(sampler.of_x, sampler.of_x0, sampler.std().detach(), strict=True):
        moment = (of_x + of_x0 * by) ** 2 * moment + std**2
    (expected,) = torch.autograd.grad(moment, by)
    found = 3 * 2 * float(denoiser.net.by.grad)  # a mean over the three steps and the two dimensions
    assert found == pytest.approx(float(expected), rel=0.03)


def test_the_policy_gradients_critic_is_high_on_samples_and_its_baseline_learns_it():
    denoiser = make_denoiser((2,), gaussians8.TRAIN)
    sampler = Sampler(denoiser, karras(0.1, 10).times(denoiser.path, 3), last_std=0.1)
    run = policy_gradient.Run(sampler, (2,), policy_gradient.Settings(lr_critic=1e-3))
    g = torch.Generator().manual_seed(0)
    data, states = ring().sample(256, g), sampler.rollout(sampler.start(256, (2,), g), g)
    for _ in range(100):
        policy_gradient.critic_step(run, data, states)
    with torch.no_grad():
        of_samples = run.critic(states[-1])
        assert float(of_samples.mean() - run.critic(data).mean()) > 1
        known = run.baseline(states[2], torch.full((256,), 2))
        assert float((known - of_samples).square().mean()) < 0.5 * float(of_samples.var())
