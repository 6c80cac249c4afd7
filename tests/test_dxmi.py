"""Fine-tuning: its gradients, closed forms and fixed point, its guard, and one short seed of the 8-Gaussian benchmark."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep import dxmi, finetuning
from fewstep.config import FinetuneConfig, TrainConfig
from fewstep.data import load_data
from fewstep.denoiser import Denoiser, OnPath, to_score
from fewstep.dxmi import FinetuneState, Rollouts, make_state, running_cost, sampler_step, value_step, with_density
from fewstep.energy import Value, density_loss, make_value
from fewstep.finetuning import doubt, finetune, keep_best
from fewstep.goal import Goal, make_goal
from fewstep.metrics import auroc, sliced_wasserstein
from fewstep.mixture import Mixture, ring
from fewstep.networks import Reconstruction
from fewstep.path import VE, VP, Cosine, Linear, Tabulated
from fewstep.run import load_tree, record
from fewstep.sampler import Sampler, in_steps, posterior_std
from fewstep.schedule import karras
from fewstep.solvers import ancestral_std
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


GOAL = Goal(torch.zeros(1, 2))


def a_step_of_each(states: torch.Tensor, value: Value | None = None) -> tuple[Rollouts, torch.Tensor]:
    """Rollouts of states (N+1, b, *d) and a step of each, as `value_step` takes them, every step as often."""
    rollouts = Rollouts(states, None, None) if value is None else with_density(value, states, None)
    return rollouts, torch.arange(states.shape[1]) % (len(states) - 1)


def learn(state: FinetuneState, i: torch.Tensor, x: torch.Tensor) -> None:
    """A step of the sampler on transitions from x in steps i."""
    sampler_step(state, GOAL, i, x, state.sampler.step(x, i), torch.randn(x.shape))


def test_the_sampler_step_moves_the_sampler_only_and_the_value_step_the_value_only():
    state = state_of(density_iterations=0)
    before = {k: v.clone() for k, v in state.state_dict()["sampler"].items()}
    value_before = {k: v.clone() for k, v in state.value.state_dict().items()}
    states = torch.randn(4, 6, 2)
    learn(state, torch.arange(6) % 3, states[0])
    assert all(torch.equal(v, value_before[k]) for k, v in state.value.state_dict().items())
    moved = {k: v.clone() for k, v in state.sampler.state_dict().items()}
    assert any(not torch.equal(v, before[k]) for k, v in moved.items())
    value_step(state, GOAL, [(torch.randn(6, 2), None)], *a_step_of_each(states))
    assert all(torch.equal(v, moved[k]) for k, v in state.sampler.state_dict().items())
    assert any(not torch.equal(v, value_before[k]) for k, v in state.value.state_dict().items())


def test_step_noises_without_a_rate_stay_where_they_start():
    for lr_std, still in ((0.0, True), (3e-4, False)):
        state = state_of(density_iterations=0, lr_std=lr_std)
        weights = [p.detach().clone() for p in state.sampler.denoiser.parameters()]
        for _ in finetune(state, torch.randn(50, 2)):
            pass
        assert torch.equal(state.sampler.std()[:-1], state.first_std) == still
        assert not all(torch.equal(a, b) for a, b in zip(weights, state.sampler.denoiser.parameters(), strict=True))


def test_a_rollout_is_the_samplers_steps():
    state = state_of(density_iterations=0)
    start, noise = torch.randn(6, 2), torch.randn(3, 6, 2)
    states, x = dxmi.roll_out(state.sampler, start, noise, None), start
    for k in range(3):
        torch.testing.assert_close(states[k], x)
        x = state.sampler.step(x, k).at(noise[k]).detach()
    torch.testing.assert_close(states[3], x)
    assert not states.requires_grad


def test_all_transitions_of_each_rollout_are_taken_in_turn_then_it_is_rolled_out_anew(monkeypatch: pytest.MonkeyPatch):
    """In N iterations each place of the batch has had each step, with the state of its own rollout before that step."""
    state = state_of(density_iterations=0, batch_size=8, iterations=52)
    seen: list[tuple] = []

    def value_sees(state, goal, batches, rollouts, i, *rest):
        seen.append((rollouts.states, i))
        return value_step(state, goal, batches, rollouts, i, *rest)

    def sampler_sees(state, goal, i, x, law, noise, *rest):
        seen[-1] += (i, x, noise)
        return sampler_step(state, goal, i, x, law, noise, *rest)

    monkeypatch.setattr(dxmi, "value_step", value_sees)
    monkeypatch.setattr(dxmi, "sampler_step", sampler_sees)
    for _ in finetune(state, torch.randn(50, 2)):
        pass
    for states, of_value, i, x, noise in seen:
        assert torch.equal(of_value, i)
        assert torch.equal(x, torch.stack([states[int(k), row] for row, k in enumerate(i)]))
        assert noise.shape == x.shape
    assert torch.stack([i for *_, i, _, _ in seen[:3]]).sort(0).values.tolist() == [[k] * 8 for k in range(3)]
    anew = [k for k in range(52) if k == 0 or not torch.equal(seen[k][0], seen[k - 1][0])]
    assert anew == [*range(0, 50, 3), 50, 51]  # and at 50, where a run is looked at, for it may have been taken back


@pytest.mark.parametrize(("critic_steps", "served"), [(1, 3), (2, 1), (7, 1)])
def test_a_rollout_is_seen_by_as_many_steps_of_the_critic_as_it_has(critic_steps, served):
    state, data = state_of(density_iterations=0, batch_size=8, critic_steps=critic_steps), torch.randn(50, 2)
    seen = []
    for _ in range(6):
        dxmi.iterate(state, Goal(data))
        state.step += 1
        seen.append(state.rollouts.states)
    anew = [k for k in range(6) if k == 0 or not torch.equal(seen[k], seen[k - 1])]
    assert anew == list(range(0, 6, served))


def test_a_run_that_is_taken_back_rolls_out_anew():
    state = state_of(density_iterations=0, batch_size=8)
    good = copy.deepcopy(state.learned())
    dxmi.iterate(state, Goal(torch.randn(50, 2)))
    assert state.rollouts is not None
    state.restore(good)
    assert state.rollouts is None


@pytest.mark.parametrize("density_iterations", [0, 1])
def test_the_value_of_some_transitions_learns_what_it_would_alone(density_iterations):
    """Its gradient on one transition of each rollout is that of the loss written down for these: V = tau A + C."""
    state = state_of(density_iterations=density_iterations, lr_value=1.0)
    g = torch.Generator().manual_seed(2)
    states, i, data = torch.randn(4, 6, 2, generator=g), torch.tensor([0, 1, 2, 2, 0, 1]), torch.randn(6, 2, generator=g)
    value, rows = state.value, torch.arange(6)
    torch.nn.init.normal_(value.critic.last.weight, generator=g)  # with a density it begins at 0
    with torch.no_grad():
        cost = running_cost(state, i, states[i, rows], states[i + 1, rows], state.sampler.std()[i])
        target = value(states[i + 1, rows], i + 1) + cost
        if density_iterations:
            target -= value.tau * value.density(states[i, rows], i)
        for k in range(3):
            target[i == k] -= target[i == k].mean()
    real, made = value.correction(data, 3), value.correction(states[-1], 3)
    loss = real.mean() - made.mean() + state.config.gamma * ((real**2).mean() + (made**2).mean())
    loss = loss + 3 * ((target - value.correction(states[i, rows], i)) ** 2).mean()
    wanted = torch.autograd.grad(loss, value.critic_parameters())
    value_step(state, GOAL, [(data, None)], with_density(value, states, None), i)
    for parameter, gradient in zip(value.critic_parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_rollouts_know_the_density_of_their_states():
    state = state_of(density_iterations=1)
    states = torch.randn(4, 6, 2)
    known = with_density(state.value, states, None).density
    assert known.shape == (4, 6)
    for k in range(4):
        torch.testing.assert_close(known[k], state.value.density(states[k], k))
    assert with_density(state_of(density_iterations=0).value, states, None).density is None
    told, labels = Value((2,), torch.ones(4), density=True, classes=3), torch.arange(6) % 3
    known = with_density(told, states, {"class_labels": labels}).density
    for k in range(4):
        torch.testing.assert_close(known[k], told.density(states[k], k, {"class_labels": labels}))
        assert not torch.allclose(known[k], told.density(states[k], k))


def test_with_entropy_only_the_noise_finds_the_maximum_entropy_of_the_bound():
    """With V = 0, cost -log std + (|x - k m|^2 + k^2 std^2)/(2 s^2) per dimension is least at std = s/k."""
    state = state_of(tau=1.0, lr_std=0.05, momentum=0.9, density_iterations=0)
    state.value.critic.last.weight.data.zero_()
    state.value.critic.last.bias.data.zero_()
    state.sampler_optimiser.param_groups[0]["lr"] = 0.0
    state.sampler_optimiser.param_groups[1]["lr"] = 0.05
    i, x = torch.arange(3000) % 3, torch.randn(3000, 2)
    for _ in range(300):
        learn(state, i, x)
    best = state.back_variance.sqrt() / state.back_scale
    assert torch.allclose(state.sampler.std()[1:2], best[1:2], rtol=0.05)
    assert state.sampler.std()[2].item() == pytest.approx(state.config.last_std)


def test_the_correction_for_a_fixed_sampler_is_the_least_squares_critic():
    """With the sampler held, C tends to (pi - p)/(2 gamma (pi + p)): here 1-D normals, checked at several points."""
    g = torch.Generator().manual_seed(0)
    value = Value((1,), torch.ones(2))
    sampler = Sampler(make_denoiser((1,), gaussians8.TRAIN), torch.tensor([0.5, 0.0], dtype=torch.float64), 0.1)
    state = FinetuneState(sampler, value, FinetuneConfig(lr_value=2e-3, momentum=0.9, density_iterations=0))
    for step in range(600):
        state.value_optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
        data, generated = torch.randn(2, 2000, 1, generator=g)
        value_step(state, GOAL, [(data, None)], *a_step_of_each(torch.stack([torch.zeros(2000, 1), generated + 1])))
    x = torch.linspace(-1, 2, 7)[:, None]
    p, pi = torch.exp(-(x**2) / 2), torch.exp(-((x - 1) ** 2) / 2)
    with torch.no_grad():
        assert torch.allclose(value.energy(x), ((pi - p) / (2 * (pi + p)))[:, 0], atol=0.04)


class Radial(torch.nn.Module):
    """a |x|^2 + 0 b, an energy whose b is frozen."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        return self.a * (x**2).sum(1) + self.b


def test_an_energy_of_a_given_structure_is_the_best_of_its_kind():
    """With e = a f the loss is least at a = (E_pi f - E_p f)/(2 gamma (E_p f^2 + E_pi f^2))."""
    sampler = state_of(density_iterations=0).sampler
    config = FinetuneConfig(density_iterations=0, momentum=0.9, gamma=2.0)
    value = make_value(sampler, (2,), config, Radial())
    state, g = FinetuneState(sampler, value, config), torch.Generator().manual_seed(0)
    data, generated = torch.randn(2, 4000, 2, generator=g) * torch.tensor([1.0, 1.5])[:, None, None]
    states = torch.cat([torch.randn(3, 4000, 2, generator=g), generated[None]])
    for step in range(400):
        state.value_optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        value_step(state, GOAL, [(data, None)], *a_step_of_each(states))
    f, of_generated = (data**2).sum(1), (generated**2).sum(1)
    best = (of_generated.mean() - f.mean()) / (2 * 2.0 * ((f**2).mean() + (of_generated**2).mean()))
    assert float(value.structured.a.detach()) == pytest.approx(float(best), rel=0.02)
    x = torch.randn(5, 2)
    assert torch.equal(value(x, 3), value.structured(x))
    assert torch.equal(value(x, torch.tensor([3, 0, 3, 1, 3]))[::2], value.structured(x[::2]))
    assert torch.equal(value(x, 1), value.critic(x / value.radius[1], value.of_step(torch.full((5,), 1))))


def test_with_a_density_a_structured_energy_starts_from_it_and_frozen_parts_stay_frozen():
    state = make_state(make_denoiser((2,), gaussians8.TRAIN), karras().times(Cosine(), 3), FinetuneConfig(), (2,), Radial())
    energy, x = state.value.structured, torch.randn(5, 2)
    energy.a.data.fill_(3.0)
    assert torch.equal(state.value.energy(x), state.value.tau * state.value.density(x, 3))
    for _ in range(2):
        value_step(state, GOAL, [(torch.randn(6, 2), None)], *a_step_of_each(torch.randn(4, 6, 2), state.value))
        learn(state, torch.arange(6) % 3, torch.randn(6, 2))
    assert float(energy.b) == 0
    assert not energy.b.requires_grad
    assert float(energy.a.detach()) != 3
    assert float(state.value.gain.detach()) != 0


class Flat(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)[:, 0]


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (torch.nn.Linear(2, 1), r"returns \(3, 1\) for 3"),
        (torch.nn.Linear(5, 1), r"to \(b,\); Linear failed on 3"),
        (torch.nn.Flatten(0), "parameters to learn"),
        (abs, "nn.Module"),
        (torch.nn.Sequential(torch.nn.BatchNorm1d(2), Flat(2, 1)), "differs between training and use"),
    ],
    ids=["shape", "fails", "nothing to learn", "no module", "batch statistics"],
)
def test_what_is_no_energy_is_refused(energy, message):
    with pytest.raises(ValueError, match=message):
        make_value(state_of(density_iterations=0).sampler, (2,), FinetuneConfig(), energy)


def test_an_energy_does_not_go_with_a_shared_value():
    with pytest.raises(ValueError, match="--value per_step"):
        make_value(state_of(density_iterations=0).sampler, (2,), FinetuneConfig(value="shared"), Flat(2, 1))


def test_an_energy_that_is_not_told_the_class_needs_a_density_that_is():
    denoiser = make_denoiser((2,), gaussians8.TRAIN, 3)
    sampler = Sampler(denoiser, karras(0.1, 10).times(denoiser.path, 3))
    make_value(sampler, (2,), FinetuneConfig(), Flat(2, 1))
    with pytest.raises(ValueError, match="not told the class"):
        make_value(sampler, (2,), FinetuneConfig(density_iterations=0), Flat(2, 1))


def test_several_critic_steps_use_fresh_data_and_the_same_rollouts(monkeypatch):
    seen, step = [], dxmi.value_step

    def kept(state, goal, batches, *rest):
        seen.append([batch for batch, _ in batches])
        return step(state, goal, batches, *rest)

    monkeypatch.setattr(dxmi, "value_step", kept)
    data = torch.arange(2000.0).reshape(1000, 2) / 1000
    for n in (1, 3):
        state = state_of(density_iterations=0, critic_steps=n, last_std=0)
        dxmi.iterate(state, Goal(data))
        assert float(state.value_optimiser.state[state.value.critic.last.weight]["step"]) == n
    (one,), three = seen
    assert one.shape == three[0].shape == (8, 2)
    rows = torch.randint(1000, (24,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(three), data[rows])


def test_a_gradient_that_is_not_finite_is_told_of_whichever_step_it_was():
    state = state_of(density_iterations=0, critic_steps=2)
    broken = torch.full((6, 2), float("nan"))
    found = value_step(state, GOAL, [(broken, None), (torch.randn(6, 2), None)], *a_step_of_each(torch.randn(4, 6, 2)))
    assert not math.isfinite(found["value_gradient_norm"])
    found = value_step(state, GOAL, [(torch.randn(6, 2), None), (broken, None)], *a_step_of_each(torch.randn(4, 6, 2)))
    assert not math.isfinite(found["value_gradient_norm"])


def fitted_density(iterations: int, **settings) -> FinetuneState:
    """A state around the exact denoiser of N(0, 1) on VE, after the density's iterations."""
    settings |= {"iterations": 1, "density_iterations": iterations, "batch_size": 256, "lr_density": 5e-3}
    state = state_of(VE(0.1, 10), **settings)
    data = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(3))
    for _ in finetune(state, data):
        if state.step == iterations:
            break
    return state


@pytest.mark.parametrize("density", ["scalar", "reconstruction"])
def test_the_density_is_that_of_the_noised_data_at_every_step(density):
    """For N(0, 1) data, D A(x, i) = |x|^2/(2 (1 + sigma_i^2)) + const: gradients against the closed form."""
    state = fitted_density(400, density=density)
    assert isinstance(state.value.density_net, Reconstruction) == (density == "reconstruction")
    value, (_, sigma) = state.averaged_value.module, state.sampler.levels()
    assert float(sigma[-1]) == pytest.approx(state.config.last_std)
    for i, level in enumerate(sigma):
        scale = math.sqrt(1 + float(level) ** 2)
        x = (scale * torch.randn(500, 2, generator=torch.Generator().manual_seed(i))).requires_grad_(True)
        (gradient,) = torch.autograd.grad(2 * value.density(x, i).sum(), x)
        exact = x.detach() / scale**2
        assert float(((gradient - exact) ** 2).mean().sqrt()) < 0.08 / scale, i


@pytest.mark.parametrize(("shape", "reconstruction"), [((2,), False), ((16,), False), ((17,), True), ((1, 8, 8), True)])
def test_unless_told_a_density_of_many_numbers_is_an_autoencoders_error(shape, reconstruction):
    denoiser = make_denoiser(shape, TrainConfig())
    state = make_state(denoiser, karras(0.2, 2.0).times(denoiser.path, 4), FinetuneConfig(), shape)
    assert isinstance(state.value.density_net, Reconstruction) == reconstruction


@pytest.mark.parametrize("shape", [(3,), (1, 8, 8), (1, 28, 28), (3, 17, 22)], ids=str)
def test_a_reconstruction_is_half_the_squared_error_of_its_autoencoder_times_its_scale(shape):
    """Where the autoencoder says the same of everything it is a parabola around that; each sample's own in any case."""
    net, x, condition = Reconstruction(shape, 5), torch.randn(4, *shape), torch.randn(4, 5)
    torch.nn.init.normal_(net.log_scale.weight)
    alone = torch.cat([net(x[k : k + 1], condition[k : k + 1]) for k in range(4)])
    torch.testing.assert_close(net(x, condition), alone, rtol=1e-4, atol=1e-4)
    if not net.flat:  # each size sees what was there on the way: without the smallest maps something is left of the image
        torch.nn.init.zeros_(net.autoencoder.widen[1].weight)
        one, other = (net.autoencoder(each, condition[:1]) for each in (x[:1], x[1:2]))
        assert not torch.allclose(one, other)
    last = net.autoencoder.leave if net.flat else net.autoencoder.widen[0]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, 0.7)
    scale = torch.exp(condition @ net.log_scale.weight[0])
    torch.testing.assert_close(net(x, condition), scale * ((x - 0.7) ** 2).flatten(1).sum(1) / 2)


def test_of_images_a_reconstruction_learns_the_better_score():
    """8x8 digits, 150 iterations: the score loss on held-out ones is .44 for .51 (longer runs: docs/log.md)."""
    data, losses = load_data("digits"), {}
    denoiser, g = make_denoiser(data.shape, TrainConfig(sigma_min=0.2, sigma_max=10.0)), torch.Generator().manual_seed(0)
    eps, far = torch.randn(2, 5, len(data.test), *data.shape, generator=g)
    for kind in ("scalar", "reconstruction"):
        config = FinetuneConfig(iterations=1, density_iterations=150, density=kind)
        state = make_state(denoiser, karras(0.2, 2.0).times(denoiser.path, 4), config, data.shape)
        for _ in finetune(state, data.train):
            if state.step == 150:
                break
        found = density_loss(state.value, state.sampler, data.test, eps, far, torch.linspace(0, 1, len(data.test)))
        losses[kind] = float(found["score_loss"].detach())
    assert losses["reconstruction"] < 0.95 * losses["scalar"]


def test_the_density_losses_at_the_closed_form(generator):
    """With A exact for N(0, 1) data: |sigma D grad A - eps|^2 has the mean 1/(1 + sigma^2), averaged over the levels, and
    softplus(D A(x) - D A(x + s z)) with s -> 0 the mean log 2, with s large about 0.
    """
    state = state_of(VE(0.1, 10), density_iterations=1)
    value, (_, sigma) = state.value, state.sampler.levels()
    torch.nn.init.zeros_(value.density_net.last.weight)
    value.log_precision.data = torch.log(value.radius.double() ** 2 / (1 + sigma**2)).float()
    data, eps, far = (torch.randn(n, 50_000, 2, generator=generator) for n in (1, 4, 4))
    near, wide = (density_loss(value, state.sampler, data[0], eps, far, torch.full((50_000,), r)) for r in (-9.0, 2.0))
    assert float(near["score_loss"].detach()) == pytest.approx(float((1 / (1 + sigma**2)).mean()), rel=0.01)
    assert float(near["contrast_loss"].detach()) == pytest.approx(math.log(2), abs=1e-3)
    assert float(wide["contrast_loss"].detach()) < 0.01


def test_the_contrast_loss_finds_the_weights_of_separate_modes():
    """Two modes, 3 : 1, so far apart that score matching cannot compare them: log 3 between their energies."""
    mixture, g = Mixture([[-3.0, 0.0], [3.0, 0.0]], 0.3, weights=[3.0, 1.0]), torch.Generator().manual_seed(0)
    state = state_of(iterations=1, density_iterations=500, batch_size=128, lr_density=5e-3)
    for _ in finetune(state, mixture.sample(20_000, g)):
        if state.step == 500:
            break
    value, spread = state.averaged_value.module, 0.3 * torch.randn(2000, 2, generator=g)
    with torch.no_grad():
        left, right = (2 * value.density(spread + torch.tensor([m, 0.0]), 3).mean() for m in (-3.0, 3.0))
    assert float(right - left) == pytest.approx(math.log(3), abs=0.35)


@pytest.mark.parametrize("path", [VE(0.05, 20), VP(), Linear()], ids=repr)
def test_posterior_noise_keeps_a_gaussian_exactly_on_its_path(path):
    """For N(0, 1) data every step with posterior_std has the marginal variance of the path, which ancestral noise misses."""
    sampler = Sampler(OnPath(Mixture(torch.zeros(1, 2), 1.0), path), karras(0.1, 10).times(path, 4))
    g = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 100_000, 2, generator=g)
    sampler.set_noise(posterior_std(sampler, data, noise))
    start = path.noised(torch.randn(100_000, 2, generator=g), torch.randn(100_000, 2, generator=g), sampler.times[0])
    for i, x in enumerate(sampler.rollout(start, g)[:-1]):
        t = sampler.times[i]
        assert float(x.var()) == pytest.approx(float(path.alpha(t) ** 2 + path.sigma(t) ** 2), rel=0.02), i


@pytest.mark.parametrize("path", [VE(0.05, 20), VP(), Linear()], ids=repr)
def test_a_dimension_that_never_varies_gets_ancestral_noise_and_no_more(path):
    """Data N(0, 1) in one dimension, 0 in the other: with the posterior's noise the states of both have the path's variance."""

    class Half(Denoiser):
        def __init__(self):
            super().__init__()
            self.inner, self.path, self.shape = OnPath(Mixture(torch.zeros(1, 2), 1.0), path), path, (2,)

        def forward(self, x, t, cond=None):
            return self.inner(x, t) * torch.tensor([1.0, 0.0])

    sampler, g = Sampler(Half(), karras(0.1, 10).times(path, 4), last_std=0.1), torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 100_000, 2, generator=g)
    data[:, 1] = 0
    sampler.set_noise(posterior_std(sampler, data, noise))
    ancestral = ancestral_std(path, sampler.times[:-1], sampler.times[1:])[:-1].float()
    torch.testing.assert_close(sampler.noise()[:-1, 1], ancestral)
    assert bool((sampler.noise()[:-1, 0] > 1.02 * ancestral).all())
    torch.testing.assert_close(sampler.std()[:-1], sampler.noise()[:-1].prod(1).sqrt())
    start = path.noised(data, torch.randn(100_000, 2, generator=g), sampler.times[0])
    for i, x in enumerate(sampler.rollout(start, g)[:-1]):
        alpha, sigma = path.alpha(sampler.times[i]), path.sigma(sampler.times[i])
        wanted = torch.stack([alpha**2 + sigma**2, sigma**2]).float()
        torch.testing.assert_close(x.float().var(0), wanted, rtol=0.02, atol=0)
    again = Sampler(Half(), sampler.times, 0.1)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.noise(), sampler.noise())


@pytest.mark.parametrize("path", [VE(0.05, 20), VP(), Linear()], ids=repr)
def test_another_number_of_steps_takes_the_noises_along(path):
    """4 steps in 2: their levels are the 4 steps' own, and so is the noise that the posterior gives to that step."""
    sampler = Sampler(OnPath(Mixture(torch.zeros(1, 2), 1.0), path), karras(0.1, 10).times(path, 4), last_std=0.1)
    data, noise = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    sampler.set_noise(posterior_std(sampler, data, noise))
    same, half, one, twice = (in_steps(sampler, steps) for steps in (4, 2, 1, 8))
    assert torch.allclose(same.times, sampler.times, rtol=1e-9)
    assert torch.allclose(same.noise(), sampler.noise(), rtol=1e-4)
    assert torch.allclose(half.times, sampler.times[[0, 2, 4]], rtol=1e-9)
    assert torch.allclose(half.noise()[:-1], posterior_std(half, data, noise).float(), rtol=1e-3)
    assert one.times.tolist() == pytest.approx(sampler.times[[0, 4]].tolist())
    assert torch.allclose(twice.times[[0, 2, 4, 6, 8]], sampler.times, rtol=1e-9)
    assert torch.allclose(twice.noise()[:-1], posterior_std(twice, data, noise).float(), rtol=0.02)
    assert twice.std()[-1] == sampler.std()[-1]
    assert twice.denoiser is sampler.denoiser


@pytest.mark.parametrize("path", [VE(0.05, 20), VP(), Linear(0.05, 20)], ids=repr)
def test_more_steps_stay_in_the_models_range_and_interpolate_the_error(path):
    """Data that are not N(0, 1): between two levels the error, in units of the one of N(0, 1), lies between theirs."""
    data, noise = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(
        OnPath(Mixture(torch.zeros(1, 2), 0.3), path), karras(path.sigma_min, min(path.sigma_max, 20)).times(path, 4)
    )
    sampler.set_noise(posterior_std(sampler, 0.3 * data, noise))
    more = in_steps(sampler, 7)
    assert bool((path.ratio(more.times[:-1]) > 0.99 * path.sigma_min).all())
    assert torch.allclose(more.times[[0, 2, 4, 6]], sampler.times[:4], rtol=1e-6)
    exact = posterior_std(more, 0.3 * data, noise).float()
    assert torch.allclose(more.noise()[:-1][[0, 2, 4]], exact[[0, 2, 4]], rtol=1e-3)
    assert torch.allclose(more.noise()[:5], exact[:5], rtol=0.15)
    assert torch.allclose(more.noise()[5], exact[5], rtol=0.5)  # starts below the last level whose error is known


def test_where_the_samples_are_the_data_the_energy_stays_at_the_density():
    """p = pi = q is a fixed point: the correction then stays at 0, where the published energy would have to be 0 as well."""
    state, g = fitted_density(300), torch.Generator().manual_seed(1)
    state.value.load_state_dict(state.averaged_value.module.state_dict())
    state.value.tau.fill_(0.03)
    for _ in range(150):
        states = [torch.randn(500, 2, generator=g)]
        for variance in state.back_variance.flip(0):  # the data, noised along the path: what a perfect sampler's rollouts are
            states.insert(0, states[0] + variance.sqrt() * torch.randn(500, 2, generator=g))
        value_step(state, GOAL, [(torch.randn(500, 2, generator=g), None)], *a_step_of_each(torch.stack(states), state.value))
    with torch.no_grad():
        x = torch.randn(2000, 2, generator=g)
        assert float(state.value.correction(x, 3).abs().mean()) < 0.02
        assert torch.equal(state.value.energy(x), state.value.tau * state.value.density(x, 3) + state.value.correction(x, 3))


@pytest.mark.parametrize(("size", "shown"), [(1, False), (30, True)])
def test_the_velocitys_scale_follows_the_rollouts_where_they_start_far_from_the_path(size: float, shown: bool):
    """At level 10 data of size 1 do not show, and the scale is the path's; those of size 30 do: a hundredth of the way
    in an iteration, of which a rollout serves three."""
    state = state_of(VE(0.1, 10), iterations=6, density_iterations=10, batch_size=2000, lr=1e-9, lr_std=1e-9)
    data = size * torch.randn(3000, 2, generator=torch.Generator().manual_seed(4))
    of_the_path = state.back_variance.clone()
    for _ in finetune(state, data):
        pass
    assert (state.sampler.shown() > dxmi.SHOWN) == shown
    if not shown:
        assert torch.equal(state.back_variance, of_the_path)
        return
    states = state.sampler.rollout(state.sampler.start(20_000, (2,), torch.Generator().manual_seed(5)), torch.Generator())
    wanted = torch.stack([((states[i] - state.back_scale[i] * states[i + 1]) ** 2).mean() for i in range(3)])
    kept = 0.99**6
    torch.testing.assert_close(state.back_variance, kept * of_the_path + (1 - kept) * wanted, rtol=0.01, atol=0)
    assert not torch.allclose(state.back_variance, of_the_path, rtol=0.02)


def test_tau_makes_the_density_spread_by_a_fortieth_of_the_corrections_range():
    state = fitted_density(150)
    data = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(4))
    next(finetune(state, data))
    with torch.no_grad():
        smoothed = data + state.config.last_std * torch.randn(data.shape)
        assert float((state.value.tau * state.value.density(smoothed, 3)).std()) == pytest.approx(dxmi.SPREAD, rel=0.2)


# --- goals, guidance ----------------------------------------------------------------------------------------------------


def test_a_reward_tilts_the_data_and_the_energy():
    data = torch.linspace(-1, 1, 4000)[:, None].repeat(1, 2)
    goal = make_goal(data, reward=lambda x: x[:, 0], weight=2.0)
    drawn = data[goal.rows(40_000, torch.Generator().manual_seed(0)), 0]
    exact = 1 / math.tanh(2) - 0.5  # the mean of exp(2 x) on (-1, 1)
    assert float(drawn.mean()) == pytest.approx(exact, abs=0.01)
    state = state_of(tau=0.3, density_iterations=0)
    x = torch.randn(7, 2)
    assert torch.allclose(dxmi.reward_cost(state, goal, x), -0.3 * 2 / 2 * x[:, 0])


def test_a_reward_counts_where_a_rollout_ends_and_nowhere_else():
    """Sampler and value are told tau w/D r(x) less for finished samples: against the same step without a reward."""
    i, g = torch.tensor([0, 1, 2, 2]), torch.Generator().manual_seed(0)
    states, noise = torch.randn(4, 4, 2, generator=g), torch.randn(4, 2, generator=g)
    x, ends, found = states[i, torch.arange(4)], states[3, 2:, 0], []
    rewarded = make_goal(torch.rand(500, 2, generator=g), reward=lambda x: x[:, 0], weight=2.0)
    state = state_of(tau=0.3, density_iterations=0, value="shared", time_cost="none")
    with torch.no_grad():
        error = state.value(states[i + 1, torch.arange(4)], i + 1) - state.value(x, i)
        redrawn = state.sampler.step(x, i).at(noise)[2:, 0]
    for goal in (GOAL, rewarded):
        one, other = copy.deepcopy(state), copy.deepcopy(state)
        metrics = sampler_step(one, goal, i, x, one.sampler.step(x, i), noise)
        learned = value_step(other, goal, [(states[3], None)], Rollouts(states, None, None), i)
        found.append((metrics["value_next"], learned["value_loss"]))
    (plain, plain_loss), (told, told_loss) = found
    assert told - plain == pytest.approx(-0.3 * float(redrawn.sum()) / 4, abs=1e-5)
    assert plain_loss == pytest.approx(float((error**2).mean()), rel=1e-4)
    error[2:] -= 0.3 * ends
    assert told_loss == pytest.approx(float((error**2).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("reward", "weight", "message"),
    [
        (lambda x: x, 1.0, r"\(b,\); got shape"),
        (lambda x: x[:, 0] / 0, 1.0, "one finite number"),
        (torch.linalg.inv, 1.0, r"the reward linalg_inv failed on data \(b, 2\): .*square"),
        (lambda x: x[:, 0], 1e4, "leaves 1.0 of 500 data in effect; lower the weight"),
    ],
    ids=["shape", "not finite", "failing", "too heavy"],
)
def test_a_reward_that_cannot_be_used_is_refused(reward, weight, message):
    with pytest.raises(ValueError, match=message):
        make_goal(torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), reward=reward, weight=weight)


def test_value_guidance_moves_down_the_value():
    sampler = Sampler(OnPath(Mixture(torch.zeros(1, 2), 1.0), VE(0.1, 10)), karras(0.1, 10).times(VE(0.1, 10), 3), 0.1)
    start = sampler.start(500, (2,), torch.Generator().manual_seed(0))

    def value(x, i, cond):  # to the right is better
        return -x[:, 0]

    plain, guided = (
        sampler.sample(start, torch.Generator().manual_seed(1), value=value, guidance=weight) for weight in (0.0, 0.5)
    )
    last = 0.5 * float(sampler.last_std)
    assert bool((guided[:, 0] > plain[:, 0] + 0.99 * last).all())
    assert torch.allclose(guided[:, 1], plain[:, 1], atol=1e-5)


def test_value_guidance_moves_each_dimension_by_its_own_noise():
    """With x0 = x the state stays where it is but for noise and guidance, which then add up over the steps."""

    class Same(Denoiser):
        path, shape = VE(0.1, 10), (2,)

        def forward(self, x, t, cond=None):
            return x

    sampler = Sampler(Same(), karras(0.1, 10).times(Same.path, 3), 0.1)
    sampler.set_noise(torch.tensor([[1.0, 0.5], [0.1, 0.3]]))
    start = sampler.start(5, (2,), torch.Generator().manual_seed(0))
    plain, guided = (
        sampler.sample(start, torch.Generator().manual_seed(1), value=lambda x, i, cond: -x.sum(1), guidance=weight)
        for weight in (0.0, 0.5)
    )
    torch.testing.assert_close(guided - plain, 0.5 * sampler.noise().sum(0).expand(5, 2), rtol=1e-4, atol=1e-5)


# --- the guard ----------------------------------------------------------------------------------------------------------


def test_a_divergence_goes_back_halves_the_rates_and_at_last_says_what_is_wrong():
    state = state_of(lr_value=1e30, iterations=2000, density_iterations=0)
    seen: list[dict[str, float]] = []
    with pytest.raises(ValueError, match=r"is not finite at iteration \d+, after 5 roll-backs; lower --lr and --lr-value"):
        seen.extend(checked(state))
    assert state.rolled_back == 5
    assert state.rate == 1 / 32


def checked(state: FinetuneState):
    """Its loop; what it yields is finite, and so are the weights that it has just gone back to."""
    before = 0
    for metrics in finetune(state, torch.randn(50, 2)):
        assert all(abs(v) < float("inf") for v in metrics.values())
        if state.rolled_back > before:
            assert all(bool(torch.isfinite(v).all()) for v in state.value.state_dict().values())
        before = state.rolled_back
        yield metrics


@pytest.mark.parametrize("part", ["sampler", "value"])
def test_what_is_not_finite_never_reaches_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    """The step that spoils the weights is the one before a save, and its metrics, taken before it, are fine."""
    state = state_of(iterations=150, density_iterations=0)
    spoilt = []

    def spoil(state: FinetuneState, *rest) -> dict[str, float]:
        metrics = dxmi.iterate(state, *rest)
        if state.step == 99 and not spoilt:
            spoilt.append(metrics)
            list(getattr(state, part).parameters())[-1].data.fill_(math.inf)
        return metrics

    monkeypatch.setattr(finetuning, "iterate", spoil)
    saved = []
    for _ in record(tmp_path, state, finetune(state, torch.randn(50, 2))):
        if state.step == 100 and not saved:
            saved.append(load_tree(tmp_path / "checkpoint.safetensors"))
    assert all(math.isfinite(v) for v in spoilt[0].values())
    assert state.rolled_back == 1
    for tree in (*saved, load_tree(tmp_path / "checkpoint.safetensors")):
        numbers = [v for name in ("sampler", "value", "averaged", "averaged_value") for v in tree[name].values()]
        assert all(bool(torch.isfinite(v).all()) for v in numbers)


@pytest.mark.parametrize(
    ("metrics", "std", "first", "wrong"),
    [
        ({}, 1.0, 1.0, None),
        ({"sample_std": 0.3}, 1.0, 1.0, "standard deviation is 0.3 of"),
        ({"sample_std": 0.3}, 1.0, 0.3, None),
        ({"sample_std": 0.1}, 1.0, 0.3, "standard deviation is 0.1 of"),
        ({"sample_std": 3.0}, 1.0, 1.0, "standard deviation is 3 of"),
        ({"sample_std": 3.0}, 1.0, 3.0, None),
        ({"energy_gap": -0.97}, 1.0, 1.0, "the energy tells every sample"),
        ({"value_loss": math.nan}, 1.0, 1.0, "value_loss is not finite"),
        ({}, 0.01, 1.0, "the step noises are 0.01, 0.01 of"),
    ],
)
def test_collapse_and_divergence_are_seen(metrics, std, first, wrong):
    state = state_of()
    state.sampler.log_std.data += math.log(std)
    state.first_spread = first
    found = finetuning.complaint(state, [{"sample_std": 1.0, "energy_gap": 0.0, "value_loss": 1.0} | metrics] * 3, 1.0)
    assert found is None if wrong is None else wrong in found


@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_the_trust_region_finds_the_rate_at_which_an_iteration_moves_the_policy_by_trust(lr):
    moves = []
    for seed in range(3):  # each pace is an estimate from one iteration
        state = state_of(iterations=1000, batch_size=64, density_iterations=0, lr=lr, trust=1e-4, seed=seed)
        g = torch.Generator().manual_seed(seed)
        data = ring().sample(500, g)
        for _ in finetune(state, data):
            if state.step == 301:
                break
        i = torch.arange(3).repeat_interleave(64)
        for _ in range(9):  # none of which looks at the pace
            x = state.sampler.rollout(state.sampler.start(64, (2,), g), g)[:-1].flatten(0, 1)
            before = state.sampler.step(x, i)
            dxmi.iterate(state, Goal(data))
            moves.append(dxmi.divergence(state, before, x, i, None))
        assert state.rolled_back == 0
    assert 0.5e-4 < sum(moves) / len(moves) < 2e-4


def test_a_gradient_of_the_noises_that_is_not_finite_takes_no_step():
    state = state_of(density_iterations=0)
    before = [p.detach().clone() for p in state.sampler.parameters()]
    wild = state.sampler.log_std.sum() * math.inf + sum(p.sum() for p in state.sampler.denoiser.parameters())
    assert not math.isfinite(dxmi.take_step(state.sampler_optimiser, wild, dxmi.ALONE))
    assert all(torch.equal(a, b) for a, b in zip(before, state.sampler.parameters(), strict=True))


def test_the_pace_survives_an_iteration_that_failed_and_goes_back_with_the_weights():
    state = state_of(density_iterations=0)
    state.pace = 0.03
    for found in (0.0, math.nan, math.inf):
        dxmi.keep_pace(state, found)
        assert state.pace == 0.03
    good = state.learned()
    state.pace = 1.0
    state.restore(good)
    assert state.pace == 0.03


def test_a_deterministic_last_step_does_not_count_as_a_huge_move():
    """The divergence is over the steps that have noise, in closed form; with none of them it still is a finite number."""
    state, x, i = state_of(last_std=0.0), torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) // 2
    state.sampler.set_noise(torch.tensor([[1.0, 0.5], [0.1, 0.3]]))
    with torch.no_grad():
        before = state.sampler.step(x, i)
        for p in state.sampler.denoiser.parameters():
            p.add_(1e-3)
        moved = ((state.sampler.step(x, i).mean - before.mean) ** 2 / (2 * state.sampler.noise()[i] ** 2)).sum(1)[:4]
    assert dxmi.divergence(state, before, x, i, None) == pytest.approx(float(moved.mean()), rel=1e-5)
    assert 0 < dxmi.divergence(state, dxmi.Transition(before.mean[4:], before.std[4:]), x[4:], i[4:], None) < 1


def test_a_rate_that_moves_the_policy_little_is_left_alone():
    state = state_of(iterations=1000, density_iterations=0, lr=1e-6)
    for _ in finetune(state, ring().sample(500, torch.Generator().manual_seed(0))):
        if state.step == 50:
            break
    assert state.pace == 1.0


def test_the_best_state_is_the_one_closest_to_the_held_out_data():
    state = state_of(iterations=500, density_iterations=2, lr=3e-3, score="density")  # the model is untrained
    data = ring().sample(500, torch.Generator().manual_seed(0))
    seen = [m["held_out_sw"] for m in finetune(state, data, Goal(data)) if "held_out_sw" in m]
    assert len(seen) == 2
    assert state.best["held_out_sw"] == min(seen)
    assert state.best["step"] == (252, 502)[seen.index(min(seen))]


def test_a_run_whose_energy_tells_its_kept_samples_from_data_is_doubted():
    rows = [{"loss": 1.0}, {"held_out_sw": 0.2, "held_out_auroc": 0.5}, {"held_out_sw": 0.1, "held_out_auroc": 0.96}]
    said = doubt(rows)
    assert said is not None
    assert "AUROC 0.96" in said
    assert doubt([*rows, {"held_out_sw": 0.05, "held_out_auroc": 0.7}]) is None  # what is kept is another state
    assert doubt([{"held_out_sw": 0.1}, {"loss": 1.0}]) is None  # an older run
    assert doubt([]) is None


def test_a_sampler_that_falls_off_its_best_state_goes_back_to_it(monkeypatch: pytest.MonkeyPatch):
    """Nothing is infinite, collapsed or told apart beyond gamma; only the held-out measures see it."""
    state = state_of(iterations=750, density_iterations=0, velocity_decay=0.9)
    told = iter([0.5, 0.95, 0.5])

    def fall(state: FinetuneState, *rest) -> dict[str, float]:
        metrics = dxmi.iterate(state, *rest)
        if state.step == 400:
            list(state.averaged.module.denoiser.parameters())[-1].data.add_(20.0)
        return metrics

    monkeypatch.setattr(finetuning, "iterate", fall)
    monkeypatch.setattr(finetuning, "auroc", lambda *_: next(told))
    data = ring().sample(500, torch.Generator().manual_seed(0))
    for metrics in finetune(state, data, Goal(data)):
        if state.step == 500:
            assert metrics["held_out_sw"] > 1.5 * state.best["held_out_sw"]
            assert (state.fallen, state.rate, state.best["step"]) == (1, 0.5, 250)
            assert state.pace <= dxmi.FIRST_PACE
            assert torch.equal(state.back_variance, state.best["back_variance"])
            for name in ("sampler", "value"):
                for part in (getattr(state, name), getattr(state, {"sampler": "averaged"}.get(name, "averaged_value")).module):
                    assert all(torch.equal(v, state.best[name][k]) for k, v in part.state_dict().items())
            assert not state.sampler_optimiser.state
            assert not state.value_optimiser.state
    assert metrics["rolled_back"] == 1
    assert state.rolled_back == 0  # of the five that may end a run
    assert state.step == 750


@pytest.mark.parametrize(
    ("best", "found", "is_lost"),
    [
        ((0.5, 0.1), (0.95, 0.2), True),
        ((0.5, 0.1), (0.85, 0.2), False),  # the energy does not know
        ((0.5, 0.1), (0.95, 0.12), False),  # hardly farther from the data
        ((0.95, 0.1), (0.96, 0.2), False),  # it always knew
        (None, (0.95, 0.2), False),
        ((0.5, 0.1), None, False),  # not judged in this iteration
    ],
)
def test_a_sampler_is_lost_where_both_held_out_measures_say_so(best, found, is_lost):
    state = state_of()
    names = ("held_out_auroc", "held_out_sw")
    state.best = dict(zip(names, best, strict=True)) if best else {}
    assert finetuning.lost(state, dict(zip(names, found, strict=True)) if found else {}) == is_lost


@pytest.mark.parametrize("part", ["averaged", "averaged_value"])
def test_weights_that_are_no_numbers_are_not_judged_and_do_not_end_the_run(part: str):
    """The last iteration is judged even where nothing has looked at it, and the best state is still to be saved."""
    state = state_of(iterations=250, density_iterations=0)
    state.step, data = 250, Goal(torch.randn(60, 2))
    before = keep_best(state, data)
    for p in getattr(state, part).module.parameters():
        p.data.fill_(math.nan)
    assert keep_best(state, data) == {}
    assert state.best["held_out_sw"] == before["held_out_sw"]


def test_few_held_out_data_are_held_against_many_samples_of_their_classes():
    """Of 300 samples the distance is mostly noise, and chose states that were worse by half."""
    denoiser = make_denoiser((2,), gaussians8.TRAIN, 3)
    times = karras(0.1, 10).times(denoiser.path, 3)
    state = make_state(denoiser, times, FinetuneConfig(iterations=250, density_iterations=0), (2,))
    state.step, data, labels = 250, torch.randn(60, 2), torch.arange(60) % 3
    found = keep_best(state, Goal(data, labels))
    sampler, g = state.averaged.module, torch.Generator().manual_seed(0)
    x = sampler.sample(sampler.start(1020, (2,), g), g, {"class_labels": labels.repeat(17)})
    assert found["held_out_sw"] == sliced_wasserstein(x, data, 1000, g) == state.best["held_out_sw"]
    value, labels17 = state.averaged_value.module, {"class_labels": labels.repeat(17)}
    smooth = [each + float(sampler.last_std) * torch.randn(1020, 2, generator=g) for each in (data.repeat(17, 1), x)]
    of_data, of_samples = (value.energy(each, labels17).detach() for each in smooth)
    told = (of_samples[None] > of_data[:, None]).double().mean() + (of_samples[None] == of_data[:, None]).double().mean() / 2
    assert found["held_out_auroc"] == pytest.approx(float(told), abs=1e-6)
    assert found["held_out_auroc"] == state.best["held_out_auroc"]
    for n in (0, 1):
        with pytest.raises(ValueError, match="too few held-out"):
            next(finetune(state, data, Goal(data[:n], labels[:n])))


# --- several processes --------------------------------------------------------------------------------------------------

TWO = """
import atexit, os, sys, torch
own = open({out!r} + os.environ["RANK"], "w")  # what two processes print may come in one line


def last():
    print("open" if torch.distributed.is_initialized() else "closed", file=own, flush=True)
    os._exit(0)  # torch now and then aborts an interpreter that has closed everything


atexit.register(last)
from accelerate import Accelerator
sys.path.insert(0, {tests!r})
from fewstep.models import save_weights
from fewstep.processes import Processes
import test_dxmi
processes = Processes(Accelerator(cpu=True))
assert processes.count == 2
state = test_dxmi.short_run(processes)
print(state.best["held_out_sw"], file=own, flush=True)
if processes.index == 0:
    save_weights(state.sampler.state_dict(), {out!r})
"""


def short_run(processes=dxmi.ALONE, **changed) -> FinetuneState:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    state = state_of(iterations=20, density_iterations=10, batch_size=16, velocity_decay=0.99, **{"lr": 1e-3} | changed)
    data, held_out = (ring().sample(n, torch.Generator().manual_seed(n)) for n in (200, 300))
    for _ in finetune(state, data, Goal(held_out), processes):
        pass
    return state


def test_in_bfloat16_the_sampler_learns_nearly_what_it_learns_in_float32():
    def weights(**changed) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(short_run(**changed).sampler.denoiser.parameters()).detach()

    start, plain, rough = weights(lr=1e-12), weights(), weights(bf16=True)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - plain).norm()) < 0.05 * float((plain - start).norm())


def test_a_compiled_sampler_learns_the_same_and_keeps_its_names(monkeypatch):
    compile_ = torch.nn.Module.compile  # by its own backend it takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    plain, compiled = (short_run(compile=each).sampler for each in (False, True))
    assert compiled.denoiser._compiled_call_impl is not None
    assert plain.denoiser._compiled_call_impl is None
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.timeout(300)
def test_two_processes_do_what_one_does(tmp_path):
    pytest.importorskip("accelerate")
    script, out = tmp_path / "two.py", tmp_path / "two.safetensors"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (judged, group), other = (Path(f"{out}{rank}").read_text().split() for rank in (0, 1))
    assert group == "closed"  # a process group left open aborts the exit now and then
    assert other == [judged, group]  # the best state is the same one in both
    alone = short_run()
    assert float(judged) == pytest.approx(alone.best["held_out_sw"], rel=0.01)
    one, two = alone.sampler.state_dict(), load_file(out)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_batch_that_cannot_be_shared_is_refused():
    processes = dxmi.Processes()
    processes.count = 3
    with pytest.raises(ValueError, match="a batch of 16 cannot be shared evenly by 3"):
        processes.share(torch.zeros(16))


@pytest.mark.timeout(280)
def test_fine_tuning_halves_the_excess_on_the_8_gaussians_and_its_energy_detects():
    """One short seed of benchmarks/gaussians8.py: same start, fewer iterations, smaller estimators."""
    start, data = gaussians8.pretrain(seed=0, iterations=1500)
    config = dataclasses.replace(gaussians8.FINETUNE, iterations=500, density_iterations=500)
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
        assert auroc(energy(reference), energy(torch.rand(n, 2, generator=g) * 8 - 4)) > 0.85


TABLE = Tabulated(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


@pytest.mark.parametrize("path", [VE(0.05, 10), VP(), Cosine(), Linear(), TABLE], ids=repr)
def test_the_models_score_stands_in_for_the_densitys(path):
    """Of N(0, I), slopes are tau x/(alpha^2 + sigma^2)/D; the last slice has no scale and a noise of .1."""
    state = state_of(path, score="model")
    state.knows_last = True
    torch.nn.init.normal_(state.value.density_net.last.weight)
    i = torch.tensor([3, 1, 2, 2, 1, 3])
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    found = dxmi.next_value(state, x, i)
    assert torch.allclose(found, state.value.correction(x, i), atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    (own,) = torch.autograd.grad(state.value(x, i).sum(), x)
    t = state.sampler.times[i]
    variance = torch.where(i == 3, 1.01, path.alpha(t) ** 2 + path.sigma(t) ** 2)[:, None].float()
    exact = (state.value.tau * x / 2 / variance).detach()
    assert torch.allclose(gradient, exact, atol=2e-6)
    assert not torch.allclose(own, exact, atol=1e-2)


def test_a_last_slice_that_the_model_does_not_know_keeps_the_densitys_slope():
    state, i = state_of(VP(), score="model"), torch.tensor([1, 2, 3])
    torch.nn.init.normal_(state.value.density_net.last.weight)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    worth = dxmi.next_value(state, x, i)
    assert torch.allclose(worth[2], state.value(x, i)[2], atol=1e-6)
    assert torch.allclose(worth[:2], state.value.correction(x, i)[:2], atol=1e-6)
    (found,) = torch.autograd.grad(worth.sum(), x)
    (own,) = torch.autograd.grad(state.value(x, i).sum(), x)
    assert torch.allclose(found[2], own[2], atol=1e-7)
    assert not torch.allclose(found[:2], own[:2], atol=1e-2)
    state.model = lambda *_: pytest.fail("the model was asked")
    last = torch.full((3,), 3)
    assert torch.equal(dxmi.next_value(state, x, last), state.value(x, last))


@pytest.mark.parametrize(
    ("last_std", "off", "known"),
    [(0.1, 0.0, True), (0.1, 0.09, True), (0.1, 0.11, False), (0.0, 0.0, False)],
    ids=["exact", "off by less than the noise", "by more", "no noise"],
)
def test_the_model_is_asked_about_the_last_slice_if_it_takes_noise_off_there(last_std, off, known):
    """The data are one point, which an exact denoiser finds; x_0 off by as much as the noise is worth no question."""
    state, data = state_of(VP(), score="model", last_std=last_std, density_iterations=1), torch.full((1000, 2), 0.5)
    state.model.forward = lambda x, t, cond: torch.full_like(x, 0.5 + off)
    dxmi.start_sampler(state, Goal(data + 1e-6 * torch.randn(1000, 2)))
    assert state.knows_last == known
    again = state_of(VP(), score="model", last_std=last_std, density_iterations=1)
    again.load_state_dict(state.state_dict())
    assert again.knows_last == known
    older = {k: v for k, v in state.state_dict().items() if k != "knows_last"}  # of a run that never asked there
    again.load_state_dict(older)
    assert not again.knows_last


@pytest.mark.parametrize("knows_last", [True, False])
def test_the_models_score_is_that_of_each_samples_class(knows_last):
    """Each gradient has its own class's score, in the last slice too, whose noise is .2, or there the density's, if told so."""
    torch.manual_seed(0)
    denoiser = make_denoiser((2,), gaussians8.TRAIN, 3)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    times = karras(0.15, 10).times(denoiser.path, 3)
    config = FinetuneConfig(iterations=10, batch_size=8, score="model", last_std=0.2)
    state, levels = make_state(denoiser, times, config, (2,)), torch.cat([times[:-1], denoiser.path.time(math.atan(0.2))[None]])
    state.knows_last = knows_last
    i, labels = torch.tensor([1, 3, 2, 2, 1, 3]), torch.tensor([0, 1, 2, 0, 1, 2])
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (found,) = torch.autograd.grad(dxmi.next_value(state, x, i, {"class_labels": labels}).sum(), x)
    for row in range(6):
        one, t = x[row : row + 1].detach(), levels[i[row]]
        if i[row] == 3 and not knows_last:
            one, told = one.requires_grad_(True), {"class_labels": labels[row : row + 1]}
            (exact,) = torch.autograd.grad(state.value.tau * state.value.density(one, 3, told).sum(), one)
            (other,) = torch.autograd.grad(state.value.tau * state.value.density(one, 3).sum(), one)
            assert torch.allclose(found[row], exact[0], rtol=1e-4, atol=1e-6)
            assert not torch.allclose(found[row], other[0], rtol=1e-2)
            continue
        x0 = denoiser(one, t, {"class_labels": labels[row : row + 1]})
        exact = -state.value.tau / 2 * to_score(x0, one, denoiser.path, t)
        other = -state.value.tau / 2 * to_score(denoiser(one, t), one, denoiser.path, t)
        assert torch.allclose(found[row], exact[0], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found[row], other[0], rtol=1e-2)


def test_a_rewards_start_is_that_of_the_tilted_data():
    data = torch.cat([torch.randn(1000, 2) * 30, torch.randn(1000, 2) * 30 + 500])
    state = state_of(VE(0.1, 10), iterations=1, density_iterations=1)
    dxmi.start_sampler(state, make_goal(data, reward=lambda x: (x[:, 0] > 250).float(), weight=20.0))
    assert torch.allclose(state.averaged.module.start_mean, torch.full((2,), 500.0), atol=5)


def test_each_dimension_starts_with_the_noise_that_its_data_need():
    state, g = state_of(VE(0.1, 10), iterations=2, density_iterations=1), torch.Generator().manual_seed(0)
    data = torch.randn(2000, 2, generator=g) * torch.tensor([1.0, 3.0])  # the model is exact for 1 and 1
    for _ in finetune(state, data):
        pass
    noise, wanted = torch.randn(2000, 2, generator=g), state.averaged.module
    error = posterior_std(wanted, data, noise).float()
    torch.testing.assert_close(wanted.noise()[:-1], error, rtol=0.05, atol=0)
    assert bool((error[:, 1] > 1.2 * error[:, 0]).all())


def test_without_a_density_there_is_no_score_to_stand_in_for():
    assert state_of(density_iterations=0).model is None
    assert state_of(score="density").model is None
    assert state_of().model is not None
    state = state_of()
    with pytest.raises(ValueError, match="needs the pretrained model"):
        FinetuneState(state.sampler, state.value, FinetuneConfig())


def test_a_model_whose_noisiest_level_shows_the_data_is_started_where_they_are():
    """Data far wider than the noisiest level: the rollouts' start has the data's spread, not the noise's alone."""
    state, g = state_of(VE(0.1, 10), iterations=1, density_iterations=1), torch.Generator().manual_seed(0)
    data = torch.randn(2000, 2, generator=g) * torch.tensor([30.0, 0.05]) + 20
    for _ in finetune(state, data):
        pass
    x = state.averaged.module.start(4000, (2,), g)
    again = state_of(VE(0.1, 10), iterations=1, density_iterations=1)  # resumed
    again.load_state_dict(state.state_dict())
    noise = torch.randn(5, 2)
    assert torch.equal(again.averaged.module.start_from(noise), state.averaged.module.start_from(noise))
    assert torch.allclose(x.std(0), torch.tensor([math.hypot(30, 10), 10.0]), rtol=0.07)
    assert torch.allclose(x.mean(0), torch.full((2,), 20.0), atol=2)


def test_the_kept_state_of_a_reward_is_the_one_closest_to_the_tilted_data(monkeypatch):
    """Samples that are drawn as the reward asks are far from the held-out data, and near to the held-out data so drawn."""
    data = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    tilted = make_goal(data[:1500], reward=lambda x: x[:, 0], weight=1.0)
    wanted = data[1500:][
        make_goal(data[1500:], reward=lambda x: x[:, 0], weight=1.0).rows(1000, torch.Generator().manual_seed(1))
    ]
    state = state_of(iterations=4, density_iterations=0)
    state.step = state.total
    monkeypatch.setattr(state.averaged.module, "sample", lambda *_: wanted)
    near, far = keep_best(state, tilted)["held_out_sw"], keep_best(state, Goal(data[:1500]))["held_out_sw"]
    assert near < 0.25 < 0.5 < far
