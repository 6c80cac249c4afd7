"""The published DxMI (arXiv 2407.00626) in two dimensions, written down directly: the clock and the quality to compare with.

One iteration, on one batch of fresh rollouts x_0 .. x_N:

    energy    mean E(data) - mean E(x_N) + gamma (mean E(data)^2 + mean E(x_N)^2)           one Adam step
    value     ( stopgrad[ V(x_{i+1}, i+1) + c_i ] - V(x_i, i) )^2    i = N-1, .., 0         one Adam step each, live network
    sampler   V(x'_{i+1}, i+1) + c_i     on one minibatch of mixed steps, x' redrawn        one Adam step
    c_i     = tau ( -log std_i + |x_i - x_{i+1}|^2 / (2 s_i^2) )     mean per dimension, as in the released code

with E = V(., N), a time-dependent value whose last slice is the energy, and s_i^2 the running mean square of |x_i - x_{i+1}|
(decay a = .99), starting at std_i^2. The log of each step's noise has its own rate, the last step's noise is fixed; rates
are constant and nothing is averaged. The authors' released code stops at images: the 2-D experiments are not in it, and
what the paper leaves unsaid (batch, rates) is in `Settings`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.denoiser import OnPath, Pretrained
from fewstep.networks import MLP
from fewstep.solvers import ancestral_std


@dataclass(frozen=True)
class Settings:
    """Of the published algorithm on the 8 Gaussians. clip: norm of the gradient of the sampler's network."""

    iterations: int = 8000
    batch_size: int = 128
    lr: float = 1e-4
    lr_value: float = 1e-3
    lr_std: float = 1e-2
    tau: float = 0.1
    gamma: float = 1.0
    velocity_decay: float = 0.99
    clip: float = 0.1
    last_std: float = 0.02
    seed: int = 0


class Chain(nn.Module):
    """The sampler: x_{i+1} = a_i x + b_i net(c_i x, clock_i) + std_i z, the ancestral sampler at first.

    `denoiser` is a model of `fewstep train`, a v-prediction on the cosine path, seen on another one. Its path's arithmetic
    is done once, here, so that what is timed is the algorithm.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    clock: Tensor
    radius: Tensor
    last_log_std: Tensor

    def __init__(self, denoiser: OnPath, times: Tensor, last_std: float):
        super().__init__()
        own, path = cast(Pretrained, denoiser.denoiser), denoiser.path
        assert own.predicts == "v"
        self.net, self.path, self.times = copy.deepcopy(cast(nn.Module, own.net)).requires_grad_(True), path, times
        t, s = times[:-1], times[1:]
        theta, std = path.angle(t), ancestral_std(path, t, s)
        radius = torch.hypot(path.alpha(times), path.sigma(times))
        left = torch.sqrt((path.sigma(s) ** 2 - std**2).clamp(min=0))
        # x/radius = cos x0 + sin eps and v = cos eps - sin x0; the mean is alpha_s x0 + left eps
        self.register_buffer("a", ((path.alpha(s) * theta.cos() + left * theta.sin()) / radius[:-1]).float())
        self.register_buffer("b", (left * theta.cos() - path.alpha(s) * theta.sin()).float())
        self.register_buffer("c", (1 / radius[:-1]).float())
        self.register_buffer("clock", own.path.time(theta).float())
        self.register_buffer("radius", radius.float())
        self.register_buffer("last_log_std", torch.tensor([last_std]).log())
        self.log_std = nn.Parameter(std[:-1].log().float())

    @property
    def steps(self) -> int:
        return len(self.a)

    def log_stds(self) -> Tensor:
        """(N,)."""
        return torch.cat([self.log_std, self.last_log_std])

    def mean(self, x: Tensor, i: int | Tensor) -> Tensor:
        """Of x_{i+1}, given x (b, d) and one step index or one per sample (b,)."""
        a, b, c = (k[i].reshape(-1, 1) for k in (self.a, self.b, self.c))
        return a * x + b * self.net(c * x, self.clock[i].expand(len(x)))

    def start(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.path.start(n, shape, generator, self.times[0])

    @torch.no_grad()
    def rollout(self, start: Tensor, generator: torch.Generator) -> Tensor:
        """(N+1, b, d)."""
        states, std = [start], self.log_stds().exp()
        for i in range(self.steps):
            states.append(self.mean(states[-1], i) + std[i] * torch.randn(start.shape, generator=generator))
        return torch.stack(states)

    def sample(self, start: Tensor, generator: torch.Generator) -> Tensor:
        return self.rollout(start, generator)[-1]


class TimeValue(nn.Module):
    """V(x, i), on states divided by their path's radius; `energy(x)` is V(x, N)."""

    radius: Tensor

    def __init__(self, radius: Tensor, width: int = 128, depth: int = 2, step_features: int = 32):
        super().__init__()
        self.register_buffer("radius", radius)
        self.of_step = nn.Embedding(len(radius), step_features)
        self.mlp = MLP(2, step_features, 1, width, depth)

    def forward(self, x: Tensor, i: int | Tensor) -> Tensor:
        """x (b, 2), i one step index or one per sample (b,): (b,)."""
        index = torch.as_tensor(i).expand(len(x))
        return self.mlp(x / self.radius[index, None], self.of_step(index))[:, 0]

    def energy(self, x: Tensor) -> Tensor:
        return self(x, len(self.radius) - 1)


class Run:
    """A chain and its value, their optimisers and the velocities' scales."""

    def __init__(self, chain: Chain, value: TimeValue, settings: Settings):
        self.settings, self.chain, self.value = settings, chain, value
        # fused, which costs less than a loop over the weights: the clock is not to be won by another kernel
        groups = [{"params": self.chain.net.parameters()}, {"params": [self.chain.log_std], "lr": settings.lr_std}]
        self.sampler_optimiser = torch.optim.Adam(groups, lr=settings.lr, fused=True)
        self.value_optimiser = torch.optim.Adam(self.value.parameters(), lr=settings.lr_value, fused=True)
        self.velocity = (2 * self.chain.log_stds()).exp().detach()
        self.generator = torch.Generator().manual_seed(settings.seed)

    @classmethod
    def of(cls, denoiser: OnPath, times: Tensor, settings: Settings) -> Run:
        """From a model of `fewstep train`, with an untrained value."""
        chain = Chain(denoiser, times, settings.last_std)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return cls(chain, TimeValue(chain.radius), settings)

    def running_cost(self, i: int | Tensor, x: Tensor, x_next: Tensor, log_std: Tensor) -> Tensor:
        """c_i of transitions (b, d) in step(s) i with log noise () or (b,): (b,)."""
        return self.settings.tau * (((x - x_next) ** 2).mean(1) / (2 * self.velocity[i]) - log_std)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def energy_step(run: Run, data: Tensor, generated: Tensor) -> float:
    """Energy of the data minus that of the samples, before the step."""
    of_data, of_generated = run.value.energy(data), run.value.energy(generated)
    gap = of_data.mean() - of_generated.mean()
    descend(run.value_optimiser, gap + run.settings.gamma * ((of_data**2).mean() + (of_generated**2).mean()))
    return float(gap.detach())


def value_step(run: Run, i: int, x: Tensor, x_next: Tensor) -> None:
    """On the transitions (b, d) of step i."""
    with torch.no_grad():
        target = run.value(x_next, i + 1) + run.running_cost(i, x, x_next, run.chain.log_stds()[i])
    descend(run.value_optimiser, ((target - run.value(x, i)) ** 2).mean())


def sampler_step(run: Run, i: Tensor, x: Tensor) -> None:
    """On states x (b, d) of mixed steps i (b,): the gradient goes through one transition only."""
    log_std = run.chain.log_stds()[i]
    x_next = run.chain.mean(x, i) + log_std.exp()[:, None] * torch.randn(x.shape, generator=run.generator)
    run.value.requires_grad_(False)
    loss = (run.value(x_next, i + 1) + run.running_cost(i, x, x_next, log_std)).mean()
    run.sampler_optimiser.zero_grad()
    loss.backward()
    run.value.requires_grad_(True)
    nn.utils.clip_grad_norm_(run.chain.net.parameters(), run.settings.clip)
    run.sampler_optimiser.step()


def iterate(run: Run, data: Tensor) -> float:
    """One iteration on a batch of data (b, 2): E(data) - E(samples)."""
    chain, b = run.chain, len(data)
    states = chain.rollout(chain.start(b, tuple(data.shape[1:]), run.generator), run.generator)
    gap = energy_step(run, data, states[-1])
    for i in reversed(range(chain.steps)):
        value_step(run, i, states[i], states[i + 1])
    chosen = torch.randperm(chain.steps * b, generator=run.generator)[:b]
    sampler_step(run, chosen // b, states[:-1].flatten(0, 1)[chosen])
    run.velocity.lerp_(((states[:-1] - states[1:]) ** 2).mean((1, 2)), 1 - run.settings.velocity_decay)
    return gap


def learn(run: Run, data: Tensor) -> Iterator[float]:
    """All iterations on data (n, 2); yields E(data) - E(samples)."""
    for _ in range(run.settings.iterations):
        yield iterate(run, data[torch.randint(len(data), (run.settings.batch_size,), generator=run.generator)])
