"""How plausible is x?   An energy maps (b, *d) to (b,): low = plausible, and q(x) is proportional to exp(-E(x)/tau).

A Value maps (x, i) to the expected cost of the rest of the way from step i; its last slice is the energy, V(., N) = E.
It sees the states of step i divided by their path's radius there, so that all are of the data's size, on VE paths too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.networks import MLP


class Value(nn.Module):
    """V(x, i) by an MLP on flattened samples, for steps i = 0..N; `energy(x)` is V(x, N).

    radius: (N+1,), the size of the states of each step, `Sampler.radius()`.
    """

    radius: Tensor

    def __init__(self, shape: tuple[int, ...], radius: Tensor, width: int = 128, depth: int = 2, step_features: int = 32):
        super().__init__()
        self.steps = len(radius) - 1
        self.register_buffer("radius", radius.float())
        self.of_step = nn.Embedding(self.steps + 1, step_features)
        self.mlp = MLP(math.prod(shape), step_features, 1, width, depth)

    def forward(self, x: Tensor, i: int | Tensor) -> Tensor:
        """i: one index, or one per sample (b,). Returns (b,)."""
        index = torch.as_tensor(i, device=x.device).expand(len(x))
        return self.mlp(x.flatten(1) / self.radius[index, None], self.of_step(index))[:, 0]

    def energy(self, x: Tensor) -> Tensor:
        """E(x): (b,)."""
        return self(x, self.steps)
