"""torchebm on the 8 Gaussians, for benchmarks/gaussians8.py: `pip install torchebm`, or its rows are left out.

Its energies are trained by its own losses, an MLP of 2-128-128-1, and sampled by its own samplers with as many
evaluations of the energy's gradient as ours has of its network. The samplers' step size, the one setting that few steps
depend on, is the best of a grid by sliced Wasserstein distance to the training data: their best, not ours.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fewstep.metrics import sliced_wasserstein

STEP_SIZES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)


@dataclass(frozen=True)
class Settings:
    """joint: iterations of energy matching's second phase, with Langevin chains. noise: std of the noise in dsm."""

    kind: Literal["cd", "dsm", "energy matching"]
    iterations: int
    batch_size: int = 256
    lr: float = 1e-3
    chain: int = 20
    step_size: float = 0.05
    noise: float = 0.2
    joint: int = 0


ROWS = {
    "CD-20": Settings("cd", 1500),
    "denoising score matching": Settings("dsm", 3000),
    "energy matching": Settings("energy matching", 1500),
    "energy matching, joint phase": Settings("energy matching", 1500, joint=200),
}


def installed() -> bool:
    return importlib.util.find_spec("torchebm") is not None


def learn(settings: Settings, data: Tensor, seed: int) -> nn.Module:
    """The energy, (b, 2) -> (b,), of data (n, 2)."""
    from torchebm.core import BaseModel
    from torchebm.couplings import ExactOTCoupling
    from torchebm.losses import ContrastiveDivergence, DenoisingScoreMatching, EnergyMatchingLoss
    from torchebm.samplers import LangevinDynamics

    class Energy(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, 0]

    class FastExactOT(ExactOTCoupling):
        """The same assignment as the library's own auction, which takes half a second."""

        def _solve(self, cost: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])

    torch.manual_seed(seed)  # the library draws from the global generator
    energy = Energy()
    if settings.kind == "cd":
        chains = LangevinDynamics(energy, step_size=settings.step_size)
        loss = ContrastiveDivergence(energy, chains, k_steps=settings.chain, persistent=True)
    elif settings.kind == "dsm":
        loss = DenoisingScoreMatching(energy, noise_scale=settings.noise)
    else:
        loss = EnergyMatchingLoss(energy, coupling=FastExactOT(), lambda_cd=0.0)
    optimiser = torch.optim.Adam(energy.parameters(), lr=settings.lr)
    for k in range(settings.iterations + settings.joint):
        if k == settings.iterations:
            loss.lambda_cd = 2.0  # the library's own value
        found = loss(data[torch.randint(len(data), (settings.batch_size,))])
        optimiser.zero_grad()
        (found[0] if isinstance(found, tuple) else found).backward()
        optimiser.step()
    return energy


def sample(settings: Settings, energy: nn.Module, n: int, steps: int, step_size: float, g: torch.Generator) -> Tensor:
    """n samples after so many steps: down the potential from N(0, I), as energy matching has it, else by Langevin dynamics
    from a Gaussian of the data's size."""
    from torchebm.samplers import GradientDescentSampler, LangevinDynamics

    noise = torch.randn(n, 2, generator=g)
    if settings.kind == "energy matching":
        return GradientDescentSampler(energy, step_size=step_size).sample(x=noise, n_steps=steps)
    return LangevinDynamics(energy, step_size=step_size).sample(x=2 * noise, n_steps=steps, generator=g)


def best_step_size(settings: Settings, energy: nn.Module, data: Tensor, steps: int, n: int) -> float:
    def distance(step_size: float) -> float:
        g = torch.Generator().manual_seed(5)
        found = sample(settings, energy, n, steps, step_size, g)
        return sliced_wasserstein(found, data[:n], 100, g) if bool(torch.isfinite(found).all()) else float("inf")

    return min(STEP_SIZES, key=distance)
