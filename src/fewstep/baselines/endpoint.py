"""Which levels bring this very solver nearest to where the exact trajectory ends? LD3."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fewstep import schedule
from fewstep.baselines.problem import Problem
from fewstep.path import as_time
from fewstep.solvers import STOCHASTIC, solve


def ld3(p: Problem, noises: int = 100, epochs: int = 40, batch: int = 20, rate: float = 0.1, teacher: int = 64) -> Tensor:
    """LD3 (Tong et al. 2025): gradient descent on the endpoint's squared error, through the solver, in the levels.

    The levels' gaps in log sigma are a softmax of `steps` numbers. The target is where Heun's method on `teacher` Karras
    levels leads from the same noise. The mean error on `noises` further starting points, held out, chooses the named
    schedule to start from and, after every epoch, whether the levels are kept. The solver must be deterministic.
    """
    if p.solver in STOCHASTIC:
        raise ValueError(f"ld3 compares endpoints from the same noise: it needs a deterministic solver, got {p.solver!r}")
    if len(p.noise) < 2 * noises:
        raise ValueError(f"ld3 needs {2 * noises} starting points, half of them held out, got {len(p.noise)}")
    low, high = p.ends
    path, noise = p.denoiser.path, p.noise[: 2 * noises]
    target = solve(p.denoiser, noise, path.time(torch.atan(schedule.karras(low, high).sigmas(teacher))), "heun").x

    def levels(logits: Tensor) -> Tensor:
        inner = high * (low / high) ** logits.softmax(0).cumsum(0)[:-1]
        return torch.cat([as_time([high]), inner, as_time([0.0])])

    def error(logits: Tensor, rows: Tensor | slice) -> Tensor:
        ends = solve(p.denoiser, noise[rows], path.time(torch.atan(levels(logits))), p.solver).x
        return ((ends - target[rows]) ** 2).flatten(1).sum(1).mean()

    def tried(logits: Tensor) -> tuple[float, Tensor]:
        with torch.no_grad():
            return float(error(logits, slice(noises, None))), logits.detach().clone()

    def first(tries: Iterable[tuple[float, Tensor]]) -> tuple[float, Tensor]:
        return min(tries, key=lambda one: one[0])

    starts = [make(low, high).sigmas(p.steps + 1)[:-1] for make in schedule.NAMED.values()]
    best = first(tried((-s.log().diff()).log()) for s in starts)
    logits = best[1].clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * math.ceil(noises / batch))
    for _ in range(epochs):
        for rows in torch.randperm(noises, generator=p.generator, device=p.where).to(noise.device).split(batch):
            with torch.enable_grad():
                (logits.grad,) = torch.autograd.grad(error(logits, rows), logits)
            optimiser.step()
            decay.step()
        best = first([best, tried(logits)])
    return levels(best[1])
