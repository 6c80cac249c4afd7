"""Which levels does the error of denoising ask for? Entropic time, and Align Your Steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fewstep import schedule
from fewstep.baselines.problem import Problem, ending_in_data
from fewstep.path import broadcast


def entropic(p: Problem, rescaled: bool = False, probes: int = 100, draws: int = 64) -> Tensor:
    """Levels between which H[x_0 | x_sigma] falls equally (Stancevic et al. 2025).

    dH/dsigma = E|x_0 - D|^2/sigma^3, because dI/d(snr) = mmse/2. rescaled: sigma dH/dsigma instead, which for unit-variance
    Gaussian data is kl_optimal. probes x draws evaluations.
    """
    low, high = p.ends
    sigma = torch.logspace(math.log10(high), math.log10(low), probes, dtype=torch.float64)
    each = sigma.repeat_interleave(draws)
    x0 = p.data(len(each))
    mistake = p.denoised(x0 + broadcast(each, x0) * p.normal(len(each)), each) - x0
    mmse = (mistake.double() ** 2).flatten(1).sum(1).cpu().reshape(probes, draws).mean(1)
    rate = mmse / sigma ** (1 if rescaled else 2)  # per unit of log sigma
    return schedule.from_costs(torch.atan(sigma), (rate[1:] + rate[:-1]) / 2, order=1).sigmas(p.steps)


def klub(p: Problem, high: Tensor, low: Tensor, draws: int, cells: int = 64) -> Tensor:
    """AYS's bound on the KL divergence of each step high -> low (m,), up to a common factor (Sabour et al. 2024, Sec. 3):

        integral of E|D(x_t, t) - D(x_high, high)|^2 / t^3 over low < t < high,    x_high = x_t + sqrt(high^2 - t^2) z

    by Monte Carlo on common data and noise; t is drawn in proportion to the integrand of Gaussian data of x0's variance,
    taken constant on `cells` cells of log t. 2 m draws evaluations.
    """
    steps, variance = len(high), float(p.x0.double().var())
    part = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    grid = torch.lerp(low.log()[:, None], high.log()[:, None], part)
    t = grid.exp()
    height = (high[:, None] ** 2 - t**2).clamp(min=0) / (t**2 * (variance + t**2))
    mass = (height[:, 1:] + height[:, :-1]) / 2
    mass = mass / mass.sum(1, keepdim=True)
    above = torch.cat([mass.new_zeros(steps, 1), mass.cumsum(1)], 1)
    u = p.uniform(draws).expand(steps, -1)
    cell = (torch.searchsorted(above, u.contiguous(), right=True) - 1).clamp(0, cells - 1)
    inside = (u - above.gather(1, cell)) / mass.gather(1, cell)
    width = (high / low).log()[:, None] / cells
    t = (grid.gather(1, cell) + inside.clamp(0, 1) * width).exp()

    top = high[:, None].expand_as(t)
    x0, eps, z = (torch.cat([v] * steps) for v in (p.data(draws), p.normal(draws), p.normal(draws)))
    x_t = x0 + broadcast(t.flatten(), x0) * eps
    x_top = x_t + broadcast((top**2 - t**2).clamp(min=0).sqrt().flatten(), x0) * z
    cleaner, noisier = p.denoised(torch.cat([x_t, x_top]), torch.cat([t.flatten(), top.flatten()])).chunk(2)
    change = ((cleaner - noisier).double() ** 2).flatten(1).sum(1).cpu().reshape(t.shape)
    return (change / t**2 * width / mass.gather(1, cell)).mean(1)


def ays(p: Problem, draws: int = 64, candidates: int = 11, tolerance: float = 0.2, sweeps: int = 20) -> Tensor:
    """Align Your Steps (Sabour et al. 2024): sweeps that move each level to the best of some candidates between its
    neighbours, by `klub`.

    From a Karras grid of `steps` steps, or of 10 that is halved to 20 and 40 where more are wanted and then interpolated.
    Stops once a sweep lowers the bound, seen in 8 times as many fresh draws, by less than `tolerance` of it: the bound goes
    on falling after samples have turned worse (App. A.3), on `mixture.ring` from about a fifth per sweep downwards.
    """
    low, high = p.ends
    levels = schedule.karras(low, high).sigmas(min(p.steps, 10) + 1)[:-1]
    while True:
        bound = math.inf
        for _ in range(sweeps):
            for i in range(1, len(levels) - 1):
                before, after = levels[i - 1], levels[i + 1]
                share = p.uniform(candidates)
                tries = torch.cat([levels[i : i + 1], torch.exp(torch.lerp(before.log(), after.log(), share))])
                tops, bottoms = torch.cat([before.expand_as(tries), tries]), torch.cat([tries, after.expand_as(tries)])
                levels[i] = tries[klub(p, tops, bottoms, draws).reshape(2, -1).sum(0).argmin()]
            previous, bound = bound, float(klub(p, levels[:-1], levels[1:], 8 * draws).sum())
            if bound > (1 - tolerance) * previous:
                break
        if len(levels) > p.steps or len(levels) > 40:
            break
        halves = (levels[1:] * levels[:-1]).sqrt()
        levels = torch.cat([torch.stack([levels[:-1], halves], 1).flatten(), levels[-1:]])
    at = np.linspace(0, len(levels) - 1, p.steps + 1)
    return ending_in_data(torch.from_numpy(np.exp(np.interp(at, np.arange(len(levels)), levels.log().numpy()))))
