"""The schedules that cost nothing: the named curves in both readings, and DMN's levels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import differential_evolution

from fewstep.free import dmn, dmn_bound, free_schedules
from fewstep.path import HALF_PI
from fewstep.schedule import NAMED, cosine, karras, log_linear

LOW, HIGH = 0.002, 80.0


def test_the_free_curves_are_the_named_ones_in_both_readings_over_the_range():
    free = free_schedules(0.01, 50.0)
    names = ["karras", "log_linear", "kl_optimal", "linear", "beta", "karras (rho 3)"]
    assert set(free) == {*names, *(f"{name} to data" for name in names)}
    own = {"karras (rho 3)": karras(0.01, 50.0, rho=3.0)} | {name: NAMED[name](0.01, 50.0) for name in names[:-1]}
    for name, curve in own.items():
        assert torch.equal(free[name].angles(7), curve.angles(7))
        assert torch.equal(free[f"{name} to data"].angles(7)[:-1], curve.angles(8)[:-2])
        for schedule in (free[name], free[f"{name} to data"]):
            assert float(schedule.sigmas(7)[0]) == pytest.approx(50.0, rel=1e-9)
            assert schedule.grids == {}
    # cosine is left out, as it is one of them
    torch.testing.assert_close(cosine(0.01, 50.0).angles(7), free["kl_optimal"].angles(7), rtol=1e-9, atol=0)
    # and all of them differ
    grids = torch.stack([s.angles(7) for s in free.values()])
    assert float((torch.cdist(grids, grids) + torch.eye(len(grids))).min()) > 1e-3


@pytest.mark.parametrize("pure", [False, True])
def test_dmn_is_among_them_for_the_steps_that_are_asked_for(pure):
    free = free_schedules(0.01, 50.0, [1, 4, 9], pure_noise=pure)
    assert set(free) == {*free_schedules(0.01, 50.0), "dmn"}
    assert set(free["dmn"].grids) == {4, 9}  # one step leaves nothing to choose
    for n in (4, 9):
        theta = free["dmn"].angles(n)
        assert float(theta[0]) == (HALF_PI if pure else math.atan(50.0))
        torch.testing.assert_close(torch.tan(theta[1:]), dmn(0.01, 50.0, n)[1:], rtol=1e-12, atol=0)


def test_what_is_handed_out_does_not_change_what_is_kept():
    dmn(0.01, 50.0, 4)[1] = 7.0
    assert float(dmn(0.01, 50.0, 4)[1]) != 7.0


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e3), (0.002, 80.0), (0.05, 2.5), (1.0, 2.0), (0.9, 1.0)])
@pytest.mark.parametrize("steps", [2, 3, 7, 16])
def test_dmn_falls_within_the_range_whatever_it_is(low, high, steps):
    sigmas = dmn(low, high, steps)
    assert sigmas.shape == (steps + 1,)
    assert float(sigmas[0]) == high
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[-2]) > low


def test_dmn_bound_by_quadrature():
    lam = np.array([-4.0, -2.5, -1.7, -0.2, 1.0, 2.2, 4.0])
    sigma = np.exp(-lam)
    error = sigma**2 / np.sqrt(1 + sigma**2)
    moved = np.zeros((6, 6))
    for s, order in enumerate([1, 2, 3, 3, 2, 1]):
        nodes = range(s - order + 1, s + 1)
        for k in nodes:
            others = [m for m in nodes if m != k]
            lagrange = lambda x, k=k, others=others: math.prod((x - lam[m]) / (lam[k] - lam[m]) for m in others)  # noqa: E731
            moved[s, k] = error[k] * quad(lambda x, f=lagrange: math.exp(x) * f(x), lam[s], lam[s + 1])[0]
    expected = np.linalg.norm(moved[[0, 1, 2, 5]], axis=1).sum() + abs(moved[3:5].sum(0)).sum()
    assert float(dmn_bound(torch.from_numpy(lam))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [3, 4])
def test_dmn_is_the_minimum(steps):
    def bound(sigmas: torch.Tensor) -> float:
        return float(dmn_bound(-torch.cat([sigmas[:-1], torch.tensor([LOW])]).log()))

    def of_gaps(gaps: np.ndarray) -> float:
        share = np.cumsum(np.exp(gaps) / np.exp(gaps).sum())[:-1]
        return bound(torch.from_numpy(np.r_[HIGH, HIGH * (LOW / HIGH) ** share, 0]))

    found = bound(dmn(LOW, HIGH, steps))
    other = differential_evolution(of_gaps, [(-3, 2)] * steps, seed=0, maxiter=40, polish=False).fun
    assert found <= 1.001 * other
    assert found < bound(replace(log_linear(LOW, HIGH), to_data=True).sigmas(steps))
