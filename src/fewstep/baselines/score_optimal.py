"""Which levels leave every step the same work? The published costs (Williams et al. 2024), which know no solver but Euler's."""

from __future__ import annotations

from torch import Tensor

from fewstep.baselines.problem import Problem
from fewstep.learn import learn_by_cost


def score_optimal(p: Problem, cost: str = "corrector", probes: int = 100, draws: int = 64) -> Tensor:
    """cost: "corrector", 2 (probes - 1) draws evaluations, or Euler's "predictor", each of whose is sent back many times."""
    solver = "euler" if cost == "predictor" else None
    found = learn_by_cost(
        p.denoiser,
        p.x0,
        cost,
        solver=solver,
        probes=probes,
        draws=draws,
        batch_size=p.batch_size,
        generator=p.generator,
    )
    return found.sigmas(p.steps)
