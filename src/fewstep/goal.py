"""What is the sampler to reach?   The data, of their classes if it is told labels, tilted by a reward if there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.start import Gaussian, gaussian_of

MANY = 10_000  # data whose principal components are taken
Reward = Callable[[Tensor], Tensor]


class Goal(NamedTuple):
    """What the sampler is to reach: data (n, *d), their labels (n,) or None, and a reward r(x) -> (b,), higher = better.

    With a reward the aim is p(x) exp(weight r(x)): data are drawn that often, and the energy has -weight r in it.
    """

    data: Tensor
    labels: Tensor | None = None
    reward: Reward | None = None
    weight: float = 0.0
    shares: Tensor | None = None

    def rows(self, n: int, generator: torch.Generator) -> Tensor:
        if self.shares is None:
            return torch.randint(len(self.data), (n,), generator=generator)
        return torch.multinomial(self.shares, n, replacement=True, generator=generator)


def make_goal(
    data: Tensor, labels: Tensor | None = None, reward: Reward | None = None, weight: float = 1.0, least: float = 20.0
) -> Goal:
    """Raises ValueError where the reward fails, is not one finite number per sample, or leaves fewer than `least` data in
    effect."""
    if reward is None:
        return Goal(data, labels)
    try:
        with torch.no_grad():
            each = torch.cat([reward(part).detach().double().cpu() for part in data.split(500)])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        name = getattr(reward, "__name__", type(reward).__name__)
        raise ValueError(f"the reward {name} failed on data (b, {', '.join(map(str, data.shape[1:]))}): {error}") from error
    if each.shape != (len(data),) or not bool(torch.isfinite(each).all()):
        raise ValueError(f"a reward returns one finite number per sample, (b,); got shape {tuple(each.shape)} for {len(data)}")
    shares = torch.softmax(weight * each, 0)
    left = float(1 / (shares**2).sum())
    if left < least:
        raise ValueError(f"with weight {weight:g} the reward leaves {left:.1f} of {len(data)} data in effect; lower the weight")
    return Goal(data, labels, reward, weight, shares)


def condition(goal: Goal, rows: Tensor) -> Cond:
    """What the sampler and the energy are told of these data: their labels, if the goal has any."""
    return None if goal.labels is None else {"class_labels": goal.labels[rows].to(goal.data.device)}


def goals_gaussian(goal: Goal, seed: int) -> Gaussian:
    """The Gaussian of what the sampler is to reach, from 10,000 draws."""
    rows = goal.rows(MANY, torch.Generator().manual_seed(seed))
    return gaussian_of(goal.data[rows.to(goal.data.device)].float())
