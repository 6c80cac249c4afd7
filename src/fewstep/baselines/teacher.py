"""Which of a teacher's many levels are enough? Dynamic programming: GITS and OSS."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep import schedule
from fewstep.baselines.problem import Problem
from fewstep.path import broadcast
from fewstep.solvers import solve


def _teacher(p: Problem, levels: int, noises: int) -> tuple[Tensor, Tensor]:
    """A Karras grid of `levels` levels and 0, and Euler's trajectories on it: (levels + 1, b, *d)."""
    if not p.steps <= levels:
        raise ValueError(f"a teacher of {levels} levels has no {p.steps} levels to choose from")
    if len(p.noise) < noises:
        raise ValueError(f"this peer needs {noises} starting points, got {len(p.noise)}; give more noise or ask for fewer")
    sigmas = schedule.karras(*p.ends).sigmas(levels)
    times = p.denoiser.path.time(torch.atan(sigmas))
    points = solve(p.denoiser, p.noise[:noises], times, "euler", keep_trajectory=True).trajectory
    assert points is not None
    return sigmas, points


def gits(p: Problem, norm: int, levels: int = 60, noises: int = 256, gamma: float = 1.15) -> Tensor:
    """GITS (Chen et al. 2024, Sec. 4): the subset of a teacher's levels with the least summed cost, by dynamic programming.

    The cost of i -> j: how far one Euler step from the teacher's point at i lands from the teacher's at j, in the L1 or L2
    norm; every step's cost weighs gamma times the one before. noises x levels evaluations.
    """
    sigmas, points = _teacher(p, levels, noises)
    cost = torch.full((levels + 1, levels + 1), math.inf, dtype=torch.float64)
    for i in range(levels):
        # the teacher's own step is Euler's, and tells its direction
        slope = (points[i + 1] - points[i]) / broadcast(sigmas[i + 1] - sigmas[i], points[i])
        landed = points[i] + along(sigmas[i + 1 :] - sigmas[i], slope) * slope
        away = torch.linalg.vector_norm((landed - points[i + 1 :]).flatten(2), ord=norm, dim=2)
        cost[i, i + 1 :] = away.mean(1).double().cpu()
    return sigmas[cheapest(cost, p.steps, gamma)]


def cheapest(cost: Tensor, steps: int, gamma: float = 1.0) -> Tensor:
    """The `steps` steps from node 0 to the last, (steps + 1,), that minimise sum_k gamma^k cost[n_k, n_k+1]."""
    to_go, chosen = cost[:, -1], []
    for _ in range(steps - 1):
        to_go, choice = (cost + gamma * to_go).min(1)
        chosen.append(choice)
    nodes = [0]
    for choice in reversed(chosen):
        nodes.append(int(choice[nodes[-1]]))
    return torch.tensor([*nodes, len(cost) - 1])


def oss(p: Problem, levels: int = 200, noises: int = 32) -> Tensor:
    """OSS (Pei et al. 2025, Alg. 1): as GITS, but a step starts where the student's best k steps to that level have led.

    After k steps each level j keeps the student's state that is nearest to the teacher's point (mean squared distance, over
    all noises). noises (levels + 1 + (steps - 1) (levels - steps/2)) evaluations.
    """
    sigmas, points = _teacher(p, levels, noises)
    state, came_from = points[:1].expand_as(points), []
    reached = range(0, 1)
    for k in range(p.steps):
        ask = torch.cat([state[i] for i in reached])
        each = sigmas[list(reached)].repeat_interleave(noises)
        slopes = ((ask - p.denoised(ask, each)) / broadcast(each, ask)).reshape(len(reached), *points.shape[1:])
        best = torch.full((levels + 1,), math.inf, dtype=torch.float64)
        origin, following = torch.zeros(levels + 1, dtype=torch.long), torch.zeros_like(points)
        last = k == p.steps - 1
        for i, slope in zip(reached, slopes, strict=True):
            to = slice(levels, None) if last else slice(i + 1, levels)
            landed = state[i] + along(sigmas[to] - sigmas[i], slope) * slope
            away = ((landed - points[to]) ** 2).flatten(1).mean(1).double().cpu()
            nearer = away < best[to]
            best[to], origin[to] = torch.where(nearer, away, best[to]), torch.where(nearer, i, origin[to])
            following[to] = torch.where(along(nearer, slope) > 0, landed, following[to])
        state, reached = following, range(k + 1, levels)
        came_from.append(origin)
    nodes = [levels]
    for origin in reversed(came_from):
        nodes.append(int(origin[nodes[-1]]))
    return sigmas[nodes[::-1]]


def along(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (k,) ready to multiply a state x (b, *d) into k states (k, b, *d)."""
    return sigma.to(x).reshape(-1, *[1] * x.ndim)
