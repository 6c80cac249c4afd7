"""The trainable few-step sampler: a denoiser on a grid of levels, whose steps are Gaussian.

    step i:  x_{i+1} = mean + std_i z,   mean = alpha_s x0 + sqrt(sigma_s^2 - std0_i^2) eps,   t = times[i], s = times[i+1]

std0 is eta times ancestral sampling's, so an untrained Sampler with eta = 1 *is* the ancestral sampler, and DDIM in the
limit of 0; std is learned from there, apart from the mean, except in the last step (to exact data), where it is fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.denoiser import Cond, Denoiser, to_eps
from fewstep.path import Path, broadcast
from fewstep.solvers import ancestral_std, require_times, update


class Transition(NamedTuple):
    """N(mean, std^2 I): mean (b, *d), std () or (b,)."""

    mean: Tensor
    std: Tensor

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """A reparametrised draw: differentiable in mean and std."""
        where = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=where)
        return self.mean + broadcast(self.std, self.mean) * noise.to(self.mean.device)


class Sampler(nn.Module):
    """denoiser: trainable, on its own path. times: (N+1,) strictly decreasing. last_std: noise of the last step.

    eta: the share of ancestral sampling's noise that the untrained sampler has.
    """

    times: Tensor
    initial_std: Tensor
    last_std: Tensor

    def __init__(self, denoiser: Denoiser, times: Tensor, last_std: float = 0.0, eta: float = 1.0):
        super().__init__()
        times = require_times(times)
        if times[-1] != 0:
            raise ValueError(f"a sampler's times must end at exact data, 0, not at {times[-1]:.6g}")
        if last_std < 0 or not 0 < eta <= 1:
            raise ValueError(f"a sampler needs last_std >= 0 and eta in (0, 1], got {last_std} and {eta}")
        self.denoiser = denoiser
        std = eta * ancestral_std(denoiser.path, times[:-1], times[1:])
        self.register_buffer("times", times)
        self.register_buffer("initial_std", std)
        self.register_buffer("last_std", torch.tensor([last_std], dtype=torch.float32))
        self.log_std = nn.Parameter(std[:-1].log().float())

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @property
    def steps(self) -> int:
        return len(self.initial_std)

    def radius(self) -> Tensor:
        """The size of the states of each step, hypot(alpha, sigma): (N+1,)."""
        return torch.hypot(self.path.alpha(self.times), self.path.sigma(self.times))

    def std(self) -> Tensor:
        """The noise of every step: (N,)."""
        return torch.cat([self.log_std.exp(), self.last_std])

    def step(self, x: Tensor, i: int | Tensor, cond: Cond = None) -> Transition:
        """The law of x_{i+1} given x_i = x (b, *d); i a step index, or one per sample (b,). Differentiable."""
        j = torch.as_tensor(i).cpu()
        if bool((j < 0).any()):
            raise IndexError(f"steps count from 0 to {self.steps - 1}, got {int(j.min())}")
        t, s = self.times.cpu()[j], self.times.cpu()[j + 1]
        x0 = self.denoiser(x, t, cond)
        mean = update(x0, to_eps(x0, x, self.path, t), self.path, s, self.initial_std.cpu()[j])
        return Transition(mean, self.std()[j.to(self.log_std.device)])

    def start(self, n: int, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """n states to roll out from: (n, *shape), on the sampler's device."""
        return self.path.start(n, shape, generator, self.times[0].cpu(), self.log_std.dtype, self.log_std.device)

    @torch.no_grad()
    def rollout(self, start: Tensor, generator: torch.Generator | None = None, cond: Cond = None) -> Tensor:
        """All states from noise to data, without gradients: (N+1, b, *d). N evaluations per sample."""
        states = [start]
        for i in range(self.steps):
            states.append(self.step(states[-1], i, cond).draw(generator))
        return torch.stack(states)

    @torch.no_grad()
    def sample(self, start: Tensor, generator: torch.Generator | None = None, cond: Cond = None) -> Tensor:
        """Samples (b, *d): a rollout whose last step is its mean, without noise. N evaluations per sample."""
        x = start
        for i in range(self.steps - 1):
            x = self.step(x, i, cond).draw(generator)
        return self.step(x, self.steps - 1, cond).mean
