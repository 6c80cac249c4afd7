"""Learn what each step does: a few-step sampler and an energy, jointly, by maximum-entropy inverse reinforcement learning.

    min over E, max over pi    E_data[E(x)] - E_pi[E(x_N)] + tau H(pi)                     (DxMI, Yoon et al. 2024)

solved by dynamic programming (DxDP) along the sampler's own rollouts x_0 .. x_N, noise to data: no teacher, no
back-propagation through the chain, no MCMC. Per iteration, on one batch of fresh rollouts:

    energy   mean E(data) - mean E(x_N) + gamma (mean E(data)^2 + mean E(x_N)^2)
    value    ( stopgrad[ V(x_{i+1}, i+1) + c_i ] - V(x_i, i) )^2        for all i at once, with E = V(., N)
    sampler  V(x'_{i+1}, i+1) + c_i,  x'_{i+1} redrawn from the policy, gradient through one transition only
    c_i    = tau ( -log std_i + |x_i - k_i x_{i+1}|^2 / (2 s_i^2) )     running cost, mean per dimension

c_i bounds the entropy by the data-processing inequality, against a backward chain N(k_i x_{i+1}, s_i^2). The paper
takes k_i = 1. Ours is the path's own noising kernel, k_i = alpha_t/alpha_s, which is the same on a VE path but does not
charge for the rescaling of the others; s_i^2 starts at that kernel's variance and then follows the running mean square
(adaptive velocity regularisation). A step without noise has no running cost.

The last step's noise is fixed, so the sampler cannot reach the data itself, only the data with that noise added: that is
what it is held to, or the energy would learn to see the noise. `Sampler.sample` leaves the noise of the last step out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import FinetuneConfig
from fewstep.denoiser import Denoiser
from fewstep.energy import Value
from fewstep.path import broadcast
from fewstep.sampler import Sampler
from fewstep.training import averaged


class FinetuneState:
    """All that the next iteration needs. `averaged.module` is the sampler to use, `averaged_value.module` its energy."""

    def __init__(self, sampler: Sampler, value: Value, config: FinetuneConfig):
        if value.steps != sampler.steps:
            raise ValueError(f"the value is made for {value.steps} steps, the sampler takes {sampler.steps}")
        if not any(p.requires_grad for p in sampler.denoiser.parameters()):
            raise ValueError(
                "the sampler's denoiser has no parameters to train; hand its network over as an nn.Module, not as a function "
                "around one"
            )
        self.config, self.sampler, self.value = config, sampler, value
        self.averaged = averaged(sampler, config.ema)
        self.averaged_value = averaged(value, config.ema)
        self.sampler_optimiser = torch.optim.Adam(
            [{"params": list(sampler.denoiser.parameters())}, {"params": [sampler.log_std]}],
            lr=config.lr,
            betas=(config.momentum, 0.999),
        )
        self.value_optimiser = torch.optim.Adam(value.parameters(), lr=config.lr_value, betas=(config.momentum, 0.999))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0

        path, t, s = sampler.path, sampler.times[:-1].cpu(), sampler.times[1:].cpu()
        back = path.alpha(t) / path.alpha(s)
        self.back_scale = back.to(sampler.log_std)
        self.back_variance = (path.sigma(t) ** 2 - (back * path.sigma(s)) ** 2).to(sampler.log_std)
        self.noisy = (sampler.std() > 0).detach()

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler,
            "value": self.value,
            "averaged": self.averaged,
            "averaged_value": self.averaged_value,
            "sampler_optimiser": self.sampler_optimiser,
            "value_optimiser": self.value_optimiser,
        }

    def state_dict(self) -> dict[str, Any]:
        own = {"generator": self.generator.get_state(), "back_variance": self.back_variance, "step": self.step}
        return {name: part.state_dict() for name, part in self._parts.items()} | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.back_variance = state["back_variance"].to(self.back_variance)
        self.step = state["step"]


def squared_velocity(state: FinetuneState, i: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
    """|x_i - k_i x_{i+1}|^2 of transitions x -> x_next (b, *d) in steps i (b,): (b,), mean per dimension."""
    return ((x - broadcast(state.back_scale[i], x) * x_next) ** 2).flatten(1).mean(1)


def running_cost(state: FinetuneState, i: Tensor, x: Tensor, x_next: Tensor, std: Tensor) -> Tensor:
    """c_i of transitions x -> x_next (b, *d) in steps i (b,) with noise std (b,): (b,), nats, mean per dimension."""
    entropy = -torch.where(state.noisy[i], std, 1.0).log()
    velocity = squared_velocity(state, i, x, x_next) / (2 * state.back_variance[i])
    return state.config.tau * state.noisy[i] * (entropy + velocity)


def value_step(state: FinetuneState, data: Tensor, i: Tensor, x: Tensor, x_next: Tensor) -> dict[str, float]:
    """One step of energy and value together, on data (b, *d) and the transitions x -> x_next (N b, *d) of steps i."""
    config, value = state.config, state.value
    generated = x_next[i == state.sampler.steps - 1]
    with torch.no_grad():
        target = value(x_next, i + 1) + running_cost(state, i, x, x_next, state.sampler.std()[i])
    of_data, of_generated = value.energy(data), value.energy(generated)
    gap = of_data.mean() - of_generated.mean()
    energy_loss = gap + config.gamma * ((of_data**2).mean() + (of_generated**2).mean())
    value_loss = ((target - value(x, i)) ** 2).mean()
    state.value_optimiser.zero_grad()
    # the paper takes one gradient step per level: a mean over the levels would slow each of them down N times
    (energy_loss + state.sampler.steps * value_loss).backward()
    state.value_optimiser.step()
    return {
        "energy_data": float(of_data.detach().mean()),
        "energy_generated": float(of_generated.detach().mean()),
        "value_loss": float(value_loss.detach()),
    }


def sampler_step(state: FinetuneState, i: Tensor, x: Tensor) -> dict[str, float]:
    """One step of the sampler on states x (N b, *d) at steps i: expected value of the next state plus running cost."""
    transition = state.sampler.step(x, i)
    x_next = transition.draw(state.generator)
    state.value.requires_grad_(False)
    to_go = state.value(x_next, i + 1).mean()
    cost = running_cost(state, i, x, x_next, transition.std).mean()
    state.sampler_optimiser.zero_grad()
    (state.sampler.steps * (to_go + cost)).backward()
    state.value.requires_grad_(True)
    norm = nn.utils.clip_grad_norm_(state.sampler.denoiser.parameters(), state.config.clip)
    state.sampler_optimiser.step()
    return {"value_next": float(to_go.detach()), "running_cost": float(cost.detach()), "gradient_norm": float(norm)}


def iterate(state: FinetuneState, data: Tensor) -> dict[str, float]:
    """One iteration: rollout, value and energy, sampler, averages. data: a batch (b, *d)."""
    config, sampler = state.config, state.sampler
    left = min(1.0, 2 * (1 - state.step / config.iterations))
    groups = state.sampler_optimiser.param_groups + state.value_optimiser.param_groups
    for group, lr in zip(groups, (config.lr, config.lr_std, config.lr_value), strict=True):
        group["lr"] = lr * left

    states = sampler.rollout(sampler.start(len(data), tuple(data.shape[1:]), state.generator), state.generator)
    x, x_next = states[:-1].flatten(0, 1), states[1:].flatten(0, 1)
    i = torch.arange(sampler.steps, device=x.device).repeat_interleave(len(data))
    mean_square = squared_velocity(state, i, x, x_next).reshape(sampler.steps, -1).mean(1)
    state.back_variance.lerp_(mean_square, 1 - config.velocity_decay)

    metrics = value_step(state, data, i, x, x_next)
    if state.step >= config.warmup:
        metrics |= sampler_step(state, i, x)
    state.averaged.update_parameters(sampler)
    state.averaged_value.update_parameters(state.value)
    state.step += 1
    metrics["energy_gap"] = metrics["energy_data"] - metrics["energy_generated"]
    metrics["sample_std"] = float(states[-1].std())
    metrics |= {f"step_noise_{k}": float(std) for k, std in enumerate(sampler.std().detach())}
    return metrics


def finetune(state: FinetuneState, data: Tensor) -> Iterator[dict[str, float]]:
    """Run from state.step to the configured number of iterations over data (n, *d); yields the metrics of each.

    Raises ValueError, naming the metric and the iteration, as soon as one is not finite.
    """
    while state.step < state.config.iterations:
        rows = torch.randint(len(data), (state.config.batch_size,), generator=state.generator)
        batch = data[rows.to(data.device)]
        smoothing = torch.randn(batch.shape, generator=state.generator).to(batch)
        metrics = iterate(state, batch + float(state.sampler.last_std) * smoothing)
        for name, value in metrics.items():
            if not abs(value) < float("inf"):
                raise ValueError(f"{name} is not finite at iteration {state.step}: lower --lr and --lr-value")
        yield metrics


def make_state(denoiser: Denoiser, times: Tensor, config: FinetuneConfig, shape: tuple[int, ...]) -> FinetuneState:
    """A fresh state: a sampler on `times` from a trainable copy of the denoiser, and a new value for samples of this shape."""
    own = copy.deepcopy(denoiser).requires_grad_(True)
    sampler = Sampler(own, times, config.last_std, config.eta)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        value = Value(shape, sampler.radius())
    device = next(own.parameters(), torch.empty(0)).device
    return FinetuneState(sampler.to(device), value.to(device), config)
