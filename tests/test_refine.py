import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from counting import Counting
from fewstep.denoiser import Denoiser
from fewstep.endpoint import Runs, mean_square, reference
from fewstep.free import free_schedules
from fewstep.mixture import Mixture, ring
from fewstep.path import HALF_PI, VE, VP, Cosine, Linear, Path, Tabulated, as_time
from fewstep.refine import Bounds, _jacobian, descend, refine
from fewstep.refine import bounds_of as bounds_from
from fewstep.schedule import Schedule, bend, karras, kl_optimal, log_linear, unbend
from fewstep.solvers import evaluations_of

PATHS = {
    "VE": VE(),
    "VP": VP(),
    "Linear": Linear(),
    "Cosine": Cosine(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
}


def bounds_of(model, low):
    return bounds_from(model, torch.atan(torch.tensor([model.path.sigma_max, low], dtype=torch.float64)))


def noise(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(path: Path | None = None) -> Mixture:
    """A Gaussian of four widths: no grid of three levels suits them all."""
    return Mixture([[0.7, -0.3, 0.1, 0.0]], torch.tensor([[2.0, 1.0, 0.3, 0.05]]), path=path)


def bent_grid(schedule: Schedule, steps: int, path: Path) -> Tensor:
    return bend(replace(schedule, pure_noise=path.ends_in_pure_noise()).angles(steps)[:-1])


class Breaking(Denoiser):
    """Another denoiser that overflows where sigma/alpha lies in a band, or x far from where the diffusion takes it."""

    def __init__(self, denoiser: Denoiser, low: float = math.inf, high: float = math.inf, widths: float = math.inf):
        super().__init__()
        self.denoiser, self.path, self.shape = denoiser, denoiser.path, denoiser.shape
        self.low, self.high, self.widths = low, high, widths
        self.broke = 0

    def forward(self, x, t, cond=None):
        y = self.denoiser(x, t, cond)
        level = float(self.path.ratio(t))
        far = x.abs().max() > self.widths * float(self.path.sigma(t) + 5 * self.path.alpha(t))
        if self.low < level < self.high or bool(far):
            self.broke += 1
            return y * math.inf
        return y


# --- the range of levels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_only_a_ve_paths_first_level_may_move(path):
    bounds = bounds_of(ring(path=path), 0.03)
    assert bounds.free_start == isinstance(path, VE)
    assert float(torch.tan(unbend(as_time(bounds.low)))) == pytest.approx(0.03, rel=1e-12)
    assert float(unbend(as_time(bounds.high))) == pytest.approx(float(path.angle(1.0)), rel=1e-12)


TOP = -0.0125  # where sigma is about 80
levels_between = st.lists(st.floats(-6.0, TOP), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(levels=levels_between, free_start=st.booleans(), stretch=st.floats(1, 50))
def test_gaps_make_falling_levels_in_the_range_and_levels_make_their_gaps(levels, free_start, stretch):
    bounds = Bounds(-6.0, TOP, free_start)
    gaps = bounds.gaps(torch.tensor(sorted(levels, reverse=True), dtype=torch.float64))
    assert (gaps > 0).all()
    stretch = torch.tensor([stretch if free_start else 1.0] + [stretch] * (len(levels) - 1), dtype=torch.float64)
    bent = bounds.levels(gaps * stretch)  # far beyond the lower end
    assert (bent.diff() < 0).all()
    assert bent[-1] >= -6
    assert bent[0] <= TOP
    assert free_start or bent[0] == TOP
    torch.testing.assert_close(bounds.levels(bounds.gaps(bent)), bent, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), above=st.floats(0.0, 2.0))
def test_a_step_that_would_leave_the_upper_end_is_the_least_of_the_quadratic_that_stays_in_it(seed, above):
    g = torch.Generator().manual_seed(seed)
    root, gradient = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64)
    hessian, bounds = root.T @ root, Bounds(-6.0, TOP, True)
    gaps = torch.tensor([-TOP * math.exp(above), 1.0, 1.0, 1.0], dtype=torch.float64)
    step = bounds.step(hessian, gradient, gaps)
    wanted = minimize(
        lambda s: 0.5 * s @ hessian.numpy() @ s + gradient.numpy() @ s,
        np.zeros(4),
        jac=lambda s: hessian.numpy() @ s + gradient.numpy(),
        bounds=[(-above, None)] + [(None, None)] * 3,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    torch.testing.assert_close(step, torch.from_numpy(wanted.x), rtol=1e-4, atol=1e-6)
    assert -TOP * math.exp(above + float(step[0])) >= -TOP * (1 - 1e-9)  # in the range


# --- the Jacobian -----------------------------------------------------------------------------------------------------


def parts(
    model: Denoiser, solver: str, z: Tensor, ends: Tensor, bent: Tensor
) -> tuple[Callable, Bounds, Tensor, Tensor, Tensor]:
    """Runs' residual, the bounds, gaps and levels, and the true d residual/d log gaps by automatic differentiation."""
    runs, bounds = Runs(model, solver, z), bounds_of(model, model.path.sigma_min)
    gaps = bounds.gaps(bent)
    bent = bounds.levels(gaps)

    def residual(levels, replay=None):
        x, log = runs(unbend(levels), replay)
        return (x - ends).flatten(), log

    free = slice(bounds.first, None)

    def differentiable(log_gaps):
        moved = gaps.clone()
        moved[free] = torch.exp(log_gaps)
        with torch.enable_grad():
            return (Runs.__call__.__wrapped__(runs, unbend(bounds.levels(moved)))[0] - ends).flatten()

    truth = torch.autograd.functional.jacobian(differentiable, gaps[free].log())
    return residual, bounds, gaps, bent, truth


JACOBIANS = [
    *[(VE(), solver) for solver in ("euler", "heun", "dpmpp_2m", "unipc", "deis", "ipndm")],
    *[(VP(), solver) for solver in ("euler", "heun", "dpmpp_2m")],
    *[(Linear(), solver) for solver in ("euler", "heun", "deis")],  # of the others autograd makes 0 * inf at pure noise
]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize(("path", "solver"), JACOBIANS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_the_jacobian_is_the_derivative_by_the_logarithms_of_the_gaps(path, solver):
    model, z = ring(path=path), noise(8)
    start = bent_grid(karras(path.sigma_min, min(path.sigma_max, 80.0)), 6, path)[:5]
    residual, bounds, gaps, bent, truth = parts(model, solver, z, reference(model, z).ends, start)
    r, log = residual(bent)

    def magnified(levels, replay=None):
        # the same runs, moved a ten-thousandth as far: its finite differences are then derivatives
        near, _ = residual(bent + 1e-4 * (levels - bent), replay)
        return r + (near - r) / 1e-4, log

    exact = _jacobian(magnified, r, log, bent, gaps, bounds)
    assert exact.shape == (16, 5 if bounds.free_start else 4)  # of the levels that may move
    assert float((exact - truth).norm() / truth.norm()) < 1e-3
    assert float(((exact - truth).norm(dim=0) / truth.norm(dim=0)).max()) < 0.01
    # and with the moves that are made, close enough to descend by
    usual = _jacobian(residual, r, log, bent, gaps, bounds)
    assert float((usual - truth).norm() / truth.norm()) < 0.25


def test_a_jacobian_costs_the_levels_from_the_moved_one_on():
    model = Counting(ring())
    for solver, expected in (("euler", 21), ("dpmpp_2m", 21), ("heun", 11 + 10 + 8 + 6 + 4 + 2)):
        z, start = noise(4), bent_grid(log_linear(), 7, model.path)[:6]
        runs, bounds = Runs(model, solver, z), bounds_of(model, 0.002)
        gaps = bounds.gaps(start)
        x, log = runs(unbend(bounds.levels(gaps)))
        before = model.samples

        def residual(levels, replay=None, runs=runs):
            x, log = runs(unbend(levels), replay)
            return x.flatten(), log

        _jacobian(residual, x.flatten(), log, bounds.levels(gaps), gaps, bounds)
        assert model.samples - before == 4 * expected


# --- descent ----------------------------------------------------------------------------------------------------------


def smallest(model: Denoiser, solver: str, z: Tensor, ends: Tensor, bounds: Bounds, starts: list[Tensor]) -> float:
    """The least mean square error that scipy's simplex finds, by the same coordinates."""
    runs, first = Runs(model, solver, z), 0 if bounds.free_start else 1

    def error(log_gaps):
        gaps = torch.zeros(len(starts[0]), dtype=torch.float64)
        gaps[first:] = torch.from_numpy(np.exp(np.clip(log_gaps, -12, 3)))
        return mean_square(runs, unbend(bounds.levels(gaps)), ends)

    options = {"xatol": 1e-4, "fatol": 1e-12, "maxfev": 200, "adaptive": True}
    found = [minimize(error, bounds.gaps(s)[first:].log().numpy(), method="Nelder-Mead", options=options) for s in starts]
    return min(each.fun for each in found)


OPTIMA = [
    pytest.param(spread(VE()), "euler", 2, id="a Gaussian, VE, euler, 2"),
    pytest.param(spread(VE()), "euler", 3, id="a Gaussian, VE, euler, 3"),
    pytest.param(spread(VE()), "dpmpp_2m", 3, id="a Gaussian, VE, dpmpp_2m, 3"),
    pytest.param(spread(Linear()), "euler", 2, id="a Gaussian, Linear, euler, 2"),
    pytest.param(spread(Linear()), "heun", 3, id="a Gaussian, Linear, heun, 3"),
    pytest.param(ring(), "euler", 2, id="ring, VE, euler, 2"),
    pytest.param(ring(), "heun", 3, id="ring, VE, heun, 3"),
    pytest.param(ring(path=VP()), "euler", 3, id="ring, VP, euler, 3"),
]


def three_starts(path: Path, steps: int) -> list[Tensor]:
    low, high = path.sigma_min, path.sigma_max
    curves = [karras(low, high), log_linear(low, high), replace(kl_optimal(low, high), to_data=True)]
    return [bent_grid(curve, steps + 1, path)[:steps] for curve in curves[:2]] + [bent_grid(curves[2], steps, path)]


@pytest.mark.parametrize(("model", "solver", "steps"), OPTIMA)
def test_the_descent_ends_at_the_optimum_that_a_simplex_finds(model, solver, steps):
    z = noise(24, model.shape[0])
    ends, bounds = reference(model, z).ends, bounds_of(model, model.path.sigma_min)
    starts = three_starts(model.path, steps)
    found = [descend(Runs(model, solver, z), ends, start, bounds, 20_000) for start in starts]
    for bent, error in found:
        assert mean_square(Runs(model, solver, z), unbend(bent), ends) == pytest.approx(error, rel=1e-9)
    least = smallest(model, solver, z, ends, bounds, starts[1:])
    before = [mean_square(Runs(model, solver, z), unbend(start), ends) for start in starts]
    assert sorted(before)[1] > 1.1 * least  # there was something to find
    assert math.sqrt(min(error for _, error in found)) < 1.01 * math.sqrt(least)


@pytest.mark.parametrize(
    "model",
    [pytest.param(spread(), id="a Gaussian"), pytest.param(ring(), id="ring")],
)
def test_a_second_descent_from_where_the_first_one_ended_gains_little(model):
    z = noise(24, model.shape[0])
    ends, bounds = reference(model, z).ends, bounds_of(model, model.path.sigma_min)
    for solver in ("euler", "dpmpp_2m"):
        for start in three_starts(model.path, 3):
            bent, once = descend(Runs(model, solver, z), ends, start, bounds, 20_000)
            _, twice = descend(Runs(model, solver, z), ends, bent, bounds, 20_000)
            assert math.sqrt(twice) > 0.9 * math.sqrt(once)  # it stops at steps that gain .2 %


@settings(deadline=None, max_examples=20)
@given(
    levels=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6),
    solver=st.sampled_from(["euler", "heun", "dpmpp_2m", "ipndm"]),
    path=st.sampled_from(["VE", "VP", "Linear"]),
    runs_affordable=st.floats(1.0, 30.0),
)
def test_levels_never_cross_nor_leave_their_range_and_never_get_worse_within_the_budget(levels, solver, path, runs_affordable):
    steps = len(levels)
    model = Counting(ring(path=PATHS[path]))
    bounds = bounds_of(model, 0.05)
    start = bounds.low + (bounds.high - bounds.low) * torch.tensor(sorted(levels, reverse=True), dtype=torch.float64)
    if not bounds.free_start:
        if steps == 1:
            return
        start[0] = bounds.high
    z = noise(5)
    ends = reference(model.denoiser, z, levels=24).ends
    budget = int(5 * evaluations_of(solver, steps) * runs_affordable)
    bent, error = descend(Runs(model, solver, z), ends, start, bounds, budget)
    assert model.samples <= budget
    assert bent.shape == (steps,)
    assert (bent.diff() < 0).all()
    assert bounds.low <= bent[-1]
    assert bent[0] <= bounds.high
    assert bounds.free_start or bent[0] == bounds.high
    first = bounds.levels(bounds.gaps(start))
    before = mean_square(Runs(model, solver, z), unbend(first), ends)
    assert error <= before * (1 + 1e-12)
    # and the error is that of these levels
    assert error == pytest.approx(mean_square(Runs(model, solver, z), unbend(bent), ends), rel=1e-9)


def test_the_first_level_stays_at_the_upper_end_where_the_start_of_a_run_is_what_is_wrong():
    # a lower first level mistakes the Gaussian's mean and widths there for noise's
    model = spread(VE(0.05, 10.0))
    z = noise(24, 4)
    ends, bounds = reference(model, z, levels=200).ends, bounds_of(model, 0.05)
    start = bent_grid(log_linear(0.05, 10.0), 16, VE(0.05, 10.0))
    runs = Runs(model, "unipc", z)
    before = math.sqrt(mean_square(runs, unbend(start), ends))
    bent, error = descend(runs, ends, start, bounds, 30_000)
    _, half = descend(
        Runs(model, "unipc", z), ends, start, bounds._replace(high=float(bend(torch.atan(torch.tensor(5.0))))), 30_000
    )
    assert float(torch.tan(unbend(bent[0]))) > 9
    assert math.sqrt(error) < 0.5 * min(before, math.sqrt(half))


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun", "ipndm"])
def test_a_huge_first_gap_is_closed_again(solver):
    model, z = ring(), noise(24)
    ends, bounds = reference(model, z).ends, bounds_of(model, 0.002)
    start = bend(torch.atan(torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=torch.float64)))
    before = mean_square(Runs(model, solver, z), unbend(start), ends)
    bent, error = descend(Runs(model, solver, z), ends, start, bounds, 20_000)
    assert before > 0.8
    assert error < before / 3
    assert float(torch.tan(unbend(bent[0]))) > 1


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_levels_at_which_the_model_overflows_are_not_moved_to(solver):
    z = noise(24)
    ends, bounds = reference(ring(), z).ends, bounds_of(ring(), 0.002)
    start = bent_grid(log_linear(), 5, VE())[:4]
    there, free = descend(Runs(ring(), solver, z), ends, start, bounds, 20_000)
    # a band of levels around the third one, where it would go without
    low, high = sorted([float(start[2]), float(there[2])])
    edge = torch.tan(unbend(as_time([low + 0.6 * (high - low), low + 1.6 * (high - low)]))).tolist()
    if there[2] < start[2]:
        edge = torch.tan(unbend(as_time([low - 0.6 * (high - low), low + 0.4 * (high - low)]))).tolist()
    model = Breaking(ring(), *edge)
    before = mean_square(Runs(model, solver, z), unbend(start), ends)
    bent, error = descend(Runs(model, solver, z), ends, start, bounds, 20_000)
    assert model.broke > 0
    assert math.isfinite(before)
    assert bool(torch.isfinite(bent).all())
    assert error == pytest.approx(mean_square(Runs(model, solver, z), unbend(bent), ends), rel=1e-9)
    assert error <= before
    assert free < before


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_level_that_the_model_overflows_beside_does_not_hold_the_others(path):
    """The Jacobian moves each level a little to one side, and there, hardly wider than that, the model overflows."""
    z, model = noise(24), ring(path=path)
    ends, bounds = reference(model, z).ends, bounds_of(model, path.sigma_min)
    start = bent_grid(log_linear(path.sigma_min, path.sigma_max), 5, path)
    before = mean_square(Runs(model, "euler", z), unbend(start), ends)
    seen: list[Tensor] = []

    class Watched(Runs):
        def __call__(self, theta, replay=None):
            seen.append(theta)
            return super().__call__(theta, replay)

    descend(Watched(model, "euler", z), ends, start, bounds, 1500)
    moved = next(theta[2] for theta in seen if bool((theta != seen[0])[2]) and int((theta != seen[0]).sum()) == 1)
    level = float(torch.tan(moved))
    breaking = Breaking(model, 0.999 * level, 1.001 * level)
    bent, error = descend(Runs(breaking, "euler", z), ends, start, bounds, 20_000)
    assert breaking.broke > 0
    assert error < 0.8 * before
    assert error == pytest.approx(mean_square(Runs(model, "euler", z), unbend(bent), ends), rel=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_start_that_overflows_is_handed_back_as_it_was(path):
    model, z = Breaking(ring(path=path), 0.1, 10.0), noise(8)
    start = bent_grid(log_linear(path.sigma_min, path.sigma_max), 4, path)
    bent, error = descend(Runs(model, "euler", z), noise(8), start, bounds_of(model, path.sigma_min), 2000)
    assert error == math.inf
    torch.testing.assert_close(bent, start, rtol=0, atol=1e-12)


# --- refinement -------------------------------------------------------------------------------------------------------


def all_starts(path: Path) -> dict[str, Schedule]:
    free = free_schedules(path.sigma_min, path.sigma_max)
    return {name: replace(curve, pure_noise=path.ends_in_pure_noise()) for name, curve in free.items()}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(("solver", "steps"), [("euler", 2), ("heun", 4)])
def test_a_refined_grid_falls_within_the_range_and_its_evaluations_are_within_the_budget(path, solver, steps):
    model, z = Counting(ring(path=path)), noise(48).float()
    known = reference(model.denoiser, z)
    ticks = []
    found = refine(model, solver, steps, known, all_starts(path), budget=4000, tick=ticks.append)
    assert found.evaluations == model.samples == sum(ticks) <= 4000
    assert found.theta.shape == (steps,)
    assert (found.theta.diff() < 0).all()
    assert found.start in all_starts(path)
    widest = float(path.angle(1.0))
    if found.moved:
        assert float(torch.tan(found.theta[-1])) >= 0.02 * (1 - 1e-9)
    assert float(found.theta[0]) <= widest + 1e-12
    if not isinstance(path, VE):
        assert float(found.theta[0]) == pytest.approx(widest, rel=1e-12)


def test_the_evaluations_of_guidance_count_double():
    class Twice(Counting):
        def __init__(self, denoiser):
            super().__init__(denoiser)
            self.evaluations = 2

    model = Twice(ring())
    found = refine(model, "euler", 4, reference(ring(), noise(32)), all_starts(VE()), budget=8000)
    assert found.evaluations == 2 * model.samples <= 2 * 8000


@pytest.mark.parametrize("name", ["karras", "log_linear to data", "linear"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "deis"])
def test_the_outcome_is_no_worse_than_the_start_on_the_noises_that_judge(name, solver):
    known = reference(ring(), noise(64))
    start = all_starts(VE())[name]
    found = refine(ring(), solver, 5, known, {name: start}, budget=8000)
    runs = Runs(ring(), solver, known.noise[:16])  # the first quarter: nothing else may look at them
    before, after = (mean_square(runs, theta, known.ends[:16]) for theta in (start.angles(5)[:-1], found.theta))
    assert found.start == name
    assert after <= before
    assert found.moved
    assert after < 0.9 * before


def test_levels_that_help_only_the_noises_they_were_fitted_to_are_given_up():
    known = reference(ring(), noise(64))
    # wrong ends for all but the first quarter
    wrong = known._replace(ends=torch.cat([known.ends[:16], -0.3 * known.ends[16:]]))
    starts = {"a good start": replace(kl_optimal(), to_data=True)}
    right, found = (refine(ring(), "euler", 6, each, starts, budget=8000) for each in (known, wrong))
    assert right.moved
    assert not found.moved
    assert found.start == "a good start"
    assert torch.equal(found.theta, starts["a good start"].angles(6)[:-1])


def test_the_noises_that_judge_are_not_fitted_to():
    known = reference(ring(), noise(64))
    # without any influence on what is proposed, whatever their ends
    starts = {"one": karras()}
    one = refine(ring(), "euler", 4, known, starts, budget=8000)
    other = refine(
        ring(), "euler", 4, known._replace(ends=torch.cat([known.ends[:16] * 1.02, known.ends[16:]])), starts, budget=8000
    )
    assert one.moved
    assert other.moved
    assert torch.equal(one.theta, other.theta)


def test_starts_that_overflow_do_not_spoil_the_search():
    known = reference(ring(), noise(64))
    good = replace(kl_optimal(), to_data=True)
    level = float(karras().sigmas(5)[2])
    model = Breaking(ring(), 0.999 * level, 1.001 * level)
    starts = {"a": karras(), "b": replace(karras(), to_data=False), "good": good, "z": karras()}
    assert mean_square(Runs(model, "euler", known.noise), karras().angles(5)[:-1], known.ends) == math.inf
    found = refine(model, "euler", 5, known, starts, budget=10_000)
    before = mean_square(Runs(ring(), "euler", known.noise), good.angles(5)[:-1], known.ends)
    assert found.start == "good"
    assert mean_square(Runs(model, "euler", known.noise), found.theta, known.ends) < before


def test_of_starts_that_all_overflow_one_comes_back_unmoved():
    model = Breaking(ring(), 0.01, 70.0)
    found = refine(model, "euler", 4, reference(ring(), noise(64)), {"a": karras(), "b": log_linear()}, budget=4000)
    assert not found.moved
    assert found.start in ("a", "b")
    assert bool(torch.isfinite(found.theta).all())


@pytest.mark.parametrize(("solver", "steps", "count"), [("euler", 6, 10), ("heun", 5, 2), ("dpmpp_2m", 3, 1), ("euler", 1, 1)])
def test_a_budget_that_is_too_small_is_refused_with_one_that_will_do(solver, steps, count):
    model, known = Counting(ring()), reference(ring(), noise(64))
    starts = dict(list(all_starts(VE()).items())[:count])
    with pytest.raises(ValueError, match=f"too few to refine {steps} steps of {solver} from {count} starts") as error:
        refine(model, solver, steps, known, starts, budget=60)
    assert model.samples == 0
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    found = refine(model, solver, steps, known, starts, budget=least)
    assert found.evaluations == model.samples <= least
    with pytest.raises(ValueError, match="too few"):
        refine(model, solver, steps, known, starts, budget=int(0.8 * least))


def test_too_few_noises_are_refused():
    with pytest.raises(ValueError, match=r"15 noises are too few.*16"):
        refine(ring(), "euler", 3, reference(ring(), noise(15)), all_starts(VE()))


def test_a_refinement_repeats():
    known = reference(ring(), noise(48))
    one, two = (refine(ring(), "dpmpp_2m", 4, known, all_starts(VE()), budget=5000) for _ in range(2))
    assert torch.equal(one.theta, two.theta)
    assert one[1:4] == two[1:4]
    assert one.others.keys() == two.others.keys()
    assert all(map(torch.equal, one.others.values(), two.others.values()))


def test_conditions_follow_their_noises():
    class Labelled(Denoiser):
        """Two Gaussians, told apart by the label; far apart, so that the wrong one's ends are unmistakable."""

        path, shape = VE(), (2,)

        def forward(self, x, t, cond=None):
            assert cond["label"].shape == (len(x),)
            far = 50 * cond["label"][:, None].to(x)
            return Mixture([[0.3, -0.2]], torch.tensor([[1.0, 0.2]]))(x - far, t) + far

    label = {"label": torch.tensor([0, 1, 2])}
    known = reference(Labelled(), noise(50), label)
    starts = {"karras": karras()}
    found = refine(Labelled(), "euler", 5, known, starts, cond=label, budget=6000, batch_size=9)
    after = math.sqrt(mean_square(Runs(Labelled(), "euler", known.noise, label), found.theta, known.ends))
    assert after < 0.5
    assert found.moved


# --- what is known not to work ----------------------------------------------------------------------------------------


def test_one_step_where_its_only_level_is_fixed_comes_back_as_it_is():
    model = ring(path=Linear())
    found = refine(model, "euler", 1, reference(model, noise(32)), all_starts(model.path), budget=4000)
    assert found.theta.tolist() == [HALF_PI]


def test_a_narrower_range_keeps_its_own_first_level_off_the_ve_path():
    model = ring(path=VP())
    known = reference(model, noise(64), sigma_max=20.0)
    starts = {name: s for name, s in free_schedules(0.01, 20.0).items() if "linear" in name}
    found = refine(model, "euler", 5, known, starts, budget=8000)
    assert found.moved
    assert float(torch.tan(found.theta[0])) == pytest.approx(20.0, rel=1e-6)
