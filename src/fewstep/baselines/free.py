"""Which levels, without asking the model?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fewstep import free
from fewstep.baselines.problem import Peer, Problem, ending_in_data
from fewstep.schedule import Schedule


def named(make: Callable[..., Schedule]) -> Peer:
    return lambda p: make(*p.ends).sigmas(p.steps)


def to_data(curve: Peer) -> Peer:
    """The curve's N steps from sigma_max to sigma_min as the N steps to data."""
    return lambda p: ending_in_data(curve(replace(p, steps=p.steps + 1))[:-1])


def dmn(p: Problem) -> Tensor:
    return free.dmn(*p.ends, p.steps)
