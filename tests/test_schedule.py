import json
import math
import os
from dataclasses import replace
from pathlib import Path as File

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fewstep.path import VE, VP, Cosine, Linear, Tabulated
from fewstep.schedule import (
    NAMED,
    Schedule,
    bend,
    cosine,
    equalise,
    from_costs,
    karras,
    kl_optimal,
    linear,
    log_linear,
    step_lengths,
    unbend,
)

STEPS = [2, 3, 4, 5, 7, 10, 18, 20, 35, 50, 64, 100, 256, 1000]

# (schedule, sigma as a function of u), written out from the papers
FORMULAS = {
    "karras": (karras(), lambda u: (80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7),
    "karras of rho 3": (karras(0.03, 14.6, 3), lambda u: (14.6 ** (1 / 3) + u * (0.03 ** (1 / 3) - 14.6 ** (1 / 3))) ** 3),
    "log_linear": (log_linear(), lambda u: 80 * (0.002 / 80) ** u),
    "kl_optimal": (kl_optimal(), lambda u: np.tan((1 - u) * np.arctan(80) + u * np.arctan(0.002))),
    "kl_optimal of a latent model": (
        kl_optimal(0.03, 14.6),
        lambda u: np.tan((1 - u) * np.arctan(14.6) + u * np.arctan(0.03)),
    ),
    "linear, finite": (linear(0.002, 80), lambda u: 1 / (1 / ((1 - u) * 80 / 81 + u * 0.002 / 1.002) - 1)),
    "linear": (linear(), lambda u: 1 / (1 / ((1 - u) + u * 0.002 / 1.002) - 1)),
    "cosine, finite": (cosine(0.002, 80), lambda u: np.tan((1 - u) * np.arctan(80) + u * np.arctan(0.002))),
    "cosine": (cosine(), lambda u: np.tan((1 - u) * np.pi / 2 + u * np.arctan(0.002))),
}
FROM_PURE_NOISE = {"linear", "cosine"}
FINITE = {name: schedule for name, (schedule, _) in FORMULAS.items() if name not in FROM_PURE_NOISE}
on_every_formula = pytest.mark.parametrize("name", FORMULAS)
on_every_finite = pytest.mark.parametrize("name", FINITE)

PATHS = {
    "VE": VE(),
    "VP": VP(),
    "Cosine": Cosine(),
    "Linear": Linear(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "Tabulated, zero terminal SNR": Tabulated(torch.linspace(0.9999, 0.0, 121, dtype=torch.float64)),
}

TEN_STEP_OPTIMUM = [80, 49.66, 30.82, 19.13, 11.86, 7.348, 4.536, 2.774, 1.653, 0.9007, 0.002]  # of N(0, 0.5^2)


def log_uniform(probes: int = 200, sigma_min: float = 0.002, sigma_max: float = 80.0) -> torch.Tensor:
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), probes, dtype=torch.float64)


def gaussian_costs(sigma: torch.Tensor, c: float = 0.5, d: int = 1) -> torch.Tensor:
    """The corrector cost between neighbouring levels on N(0, c^2 I_d), in closed form."""
    s, cleaner = sigma[:-1], sigma[1:]
    return d * cleaner**2 * (c**2 + s**2) * (1 / (c**2 + cleaner**2) - 1 / (c**2 + s**2)) ** 2


def same(a: Schedule, b: Schedule) -> bool:
    fields = ("name", "pure_noise", "to_data", "provenance")
    grids = a.grids.keys() == b.grids.keys() and all(torch.equal(a.grids[n], b.grids[n]) for n in a.grids)
    curves = torch.equal(a.u, b.u) and torch.equal(a.theta, b.theta)
    return grids and curves and all(getattr(a, f) == getattr(b, f) for f in fields)


# --- named schedules --------------------------------------------------------------------------------------------------


@on_every_formula
@pytest.mark.parametrize("steps", STEPS)
def test_a_named_schedule_reads_off_its_published_formula(name, steps):
    schedule, formula = FORMULAS[name]
    first = int(name in FROM_PURE_NOISE)  # there the first level is infinite
    expected = formula(np.linspace(0, 1, steps)[first:])
    levels = torch.tan(schedule.angles(steps))[first:-1]
    np.testing.assert_allclose(levels.numpy(), expected, rtol=1e-6 if steps <= 256 else 2e-4)


@on_every_formula
@pytest.mark.parametrize("steps", [1, *STEPS])
def test_a_grid_falls_strictly_from_the_noisiest_level_to_exact_data(name, steps):
    angles = FORMULAS[name][0].angles(steps)
    assert len(angles) == steps + 1
    assert (angles.diff() < 0).all()
    assert angles[-1] == 0
    assert (float(angles[0]) == math.pi / 2) == (name in FROM_PURE_NOISE)


@on_every_finite
@pytest.mark.parametrize("steps", STEPS)
def test_sigmas_run_from_sigma_max_to_sigma_min_and_then_zero(name, steps):
    schedule = FINITE[name]
    sigmas = schedule.sigmas(steps)
    limits = schedule.provenance["sigma_max"], schedule.provenance["sigma_min"]
    assert sigmas.dtype == torch.float64
    assert [float(sigmas[0]), float(sigmas[-2])] == pytest.approx(limits, rel=1e-12)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@on_every_finite
def test_one_step_goes_from_the_noisiest_level_straight_to_data(name):
    schedule = FINITE[name]
    assert schedule.sigmas(1).tolist() == pytest.approx([schedule.provenance["sigma_max"], 0], rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(low=st.floats(1e-4, 0.5), span=st.floats(1.01, 1e5), steps=st.integers(2, 300), name=st.sampled_from(sorted(NAMED)))
def test_every_named_schedule_is_monotone_on_any_range(low, span, steps, name):
    sigmas = NAMED[name](low, low * span).sigmas(steps)
    assert (sigmas.diff() < 0).all()
    assert [float(sigmas[0]), float(sigmas[-2])] == pytest.approx([low * span, low], rel=1e-9)


@pytest.mark.parametrize("name", sorted(NAMED))
@pytest.mark.parametrize("limits", [(80.0, 0.002), (0.0, 80.0), (-1.0, 80.0), (1.0, 1.0)])
def test_a_named_schedule_refuses_levels_that_are_no_range(name, limits):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        NAMED[name](*limits)


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_a_number_of_steps_that_is_no_count_is_refused(steps):
    with pytest.raises(ValueError, match="whole number"):
        karras().angles(steps)


# --- the same levels on every path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("steps", [1, 2, 10, 47, 300])
@pytest.mark.parametrize("named", [karras, log_linear, kl_optimal, linear, cosine])
def test_times_are_the_same_levels_on_every_path(path, steps, named):
    schedule = named(path.sigma_min, min(path.sigma_max, 80.0))
    times, sigmas = schedule.times(path, steps), schedule.sigmas(steps)
    assert times.shape == sigmas.shape
    assert times[-1] == 0
    assert times[0] <= 1
    assert (times.diff() < 0).all()
    torch.testing.assert_close(path.ratio(times), sigmas, rtol=1e-8, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("named", [karras, log_linear, kl_optimal, linear, cosine])
def test_a_schedule_of_a_paths_whole_range_starts_at_its_noisiest_finite_level(path, named):
    times = named(path.sigma_min, path.sigma_max).times(path, 10)
    assert times[0] <= 1
    assert float(path.ratio(times[0])) == pytest.approx(path.sigma_max, rel=1e-8)
    if not path.ends_in_pure_noise():
        assert float(times[0]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("schedule", [linear(), cosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_linear_and_cosine_start_from_pure_noise(schedule, steps):
    with pytest.raises(ValueError, match=r"pure noise.*\.times\(path, steps\)"):
        schedule.sigmas(steps)
    for name in ("Linear", "Cosine", "Tabulated, zero terminal SNR"):
        times = schedule.times(PATHS[name], steps)
        assert times[0] == 1
        assert PATHS[name].alpha(times[0]) == 0


def test_linear_and_cosine_are_uniform_in_the_time_of_their_own_paths():
    for schedule, path in ((linear(), Linear()), (cosine(), Cosine())):
        gaps = schedule.times(path, 20)[:-1].diff()
        torch.testing.assert_close(gaps, gaps[0].expand(19), rtol=1e-5, atol=0)


def test_a_curve_marked_pure_noise_starts_there_and_is_otherwise_unchanged():
    finite = karras()
    marked = Schedule(finite.u, finite.theta, pure_noise=True)
    assert marked.angles(10)[0] == math.pi / 2
    assert torch.equal(marked.angles(10)[1:], finite.angles(10)[1:])
    assert marked.times(Linear(), 10)[0] == 1
    with pytest.raises(ValueError, match="pure noise"):
        marked.sigmas(10)


@pytest.mark.parametrize(
    ("schedule", "path"),
    [(karras(), VE(0.002, 10.0)), (log_linear(0.01, 200.0), VP()), (linear(), VE()), (cosine(), PATHS["Tabulated"])],
    ids=["karras on a short VE", "log_linear on VP", "linear on VE", "cosine on a table"],
)
def test_a_schedule_noisier_than_the_path_is_refused(schedule, path):
    with pytest.raises(ValueError, match=r"sigma_max <= "):
        schedule.times(path, 10)


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 7])
def test_equalising_the_gaussians_closed_form_costs_gives_its_ten_step_optimum(d):
    sigma = log_uniform()
    theta = equalise(torch.atan(sigma), gaussian_costs(sigma, d=d), points=11)
    assert torch.tan(theta).tolist() == pytest.approx(TEN_STEP_OPTIMUM, rel=0.01)
    curve = from_costs(torch.atan(sigma), gaussian_costs(sigma, d=d))
    assert torch.equal(curve.angles(11)[:-1], theta)


@pytest.mark.parametrize(("c", "points"), [(0.5, 11), (0.5, 30), (1.0, 8), (0.1, 20), (3.0, 15)])
def test_the_equalised_levels_are_equal_shares_of_the_closed_form_length(c, points):
    sigma = log_uniform(2000)
    levels = torch.tan(equalise(torch.atan(sigma), gaussian_costs(sigma, c), points)).numpy()
    length = np.arcsinh(levels / c) - levels / np.sqrt(c**2 + levels**2)
    shares = (length[0] - length) / (length[0] - length[-1])
    np.testing.assert_allclose(shares, np.linspace(0, 1, points), atol=1e-3)


def test_the_length_of_the_gaussian_is_its_closed_form():
    assert float(step_lengths(gaussian_costs(log_uniform(2000))).sum()) == pytest.approx(9.5367, rel=1e-3)


def test_equalising_again_changes_nothing_and_its_costs_are_equal():
    sigma = log_uniform(2000)
    before = gaussian_costs(sigma).sqrt()
    assert float(before.std() / before.mean()) > 0.5
    once = torch.tan(equalise(torch.atan(sigma), gaussian_costs(sigma), 1000))
    # but for the last one: it spans orders of magnitude of sigma, so that its cost is no longer its length squared
    after = gaussian_costs(once).sqrt()[:-1]
    assert float(after.std() / after.mean()) < 0.01
    twice = torch.tan(equalise(torch.atan(once), gaussian_costs(once), points=11))
    assert twice.tolist() == pytest.approx(TEN_STEP_OPTIMUM, rel=0.02)


@pytest.mark.parametrize("cost", [1.0, 3e-7, 4e9])
@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_levels_whose_steps_cost_the_same_stay_where_they_are(cost, order):
    theta = torch.atan(log_uniform(40))
    torch.testing.assert_close(equalise(theta, torch.full((39,), cost), order=order), theta, rtol=1e-9, atol=0)


def test_a_cost_of_another_order_gives_the_same_levels_as_the_same_length():
    theta = torch.atan(log_uniform(100))
    gap, density = -theta.diff(), torch.rand(99, generator=torch.Generator().manual_seed(0)).double() + 0.1
    by_two = equalise(theta, gap**2 * density, 17)
    torch.testing.assert_close(equalise(theta, gap**4 * density**2, 17, order=4), by_two, rtol=1e-10, atol=0)
    torch.testing.assert_close(equalise(theta, gap * density.sqrt(), 17, order=1), by_two, rtol=1e-10, atol=0)
    assert not torch.allclose(equalise(theta, gap**4 * density**2, 17), by_two, rtol=0.05)


positive = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60)


@settings(deadline=None, max_examples=60)
@given(costs=positive, scale=st.floats(1e-6, 1e6))
def test_the_curve_passes_through_every_probed_level_at_its_share_of_the_length_in_any_unit(costs, scale):
    costs = torch.tensor(costs, dtype=torch.float64)
    theta = torch.atan(log_uniform(len(costs) + 1))
    curve, length = from_costs(theta, costs), costs.sqrt().cumsum(0)
    torch.testing.assert_close(curve.u[1:], length / length[-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(curve.at(curve.u), theta, rtol=1e-9, atol=0)
    torch.testing.assert_close(equalise(theta, scale * costs, 9), equalise(theta, costs, 9), rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=60)
@given(costs=st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e12)), min_size=2, max_size=60), steps=st.integers(2, 200))
def test_any_costs_that_are_not_all_zero_give_a_strictly_falling_grid(costs, steps):
    if max(costs) == 0:
        costs[0] = 1.0
    grid = from_costs(torch.atan(log_uniform(len(costs) + 1)), torch.tensor(costs, dtype=torch.float64)).sigmas(steps)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    ("costs", "says"),
    [([0.0, 0.0, 0.0], "all costs are zero"), ([1.0, math.nan, 1.0], "cost 1 is nan"), ([1.0, 1.0, -2.0], "cost 2 is -2")],
)
def test_costs_that_are_no_costs_are_refused(costs, says):
    with pytest.raises(ValueError, match=says):
        equalise(torch.atan(log_uniform(4)), torch.tensor(costs))


# --- blending ---------------------------------------------------------------------------------------------------------


def learned(knots: int = 150) -> Schedule:
    sigma = log_uniform(knots)
    return from_costs(torch.atan(sigma), gaussian_costs(sigma), name="learned", provenance={"cost": "corrector"})


PAIRS = {
    "two named": (karras(), log_linear()),
    "learned and named": (learned(), log_linear()),
    "named and learned": (karras(), learned()),
    "two learned": (learned(150), learned(77)),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_a_blend_of_nothing_is_the_one_and_of_everything_the_other(one, other):
    for steps in (2, 10, 33):
        torch.testing.assert_close(one.blend(other, 0.0).sigmas(steps), one.sigmas(steps), rtol=2e-3, atol=0)
        torch.testing.assert_close(one.blend(other, 1.0).sigmas(steps), other.sigmas(steps), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_a_blend_moves_every_level_monotonically_from_the_one_to_the_other(one, other):
    grids = torch.stack([one.blend(other, gamma).sigmas(12)[:-1].log() for gamma in torch.linspace(0, 1, 9).tolist()])
    assert (grids.diff(dim=1) < 0).all()
    direction = torch.sign(other.sigmas(12)[:-1].log() - one.sigmas(12)[:-1].log())
    far = (grids[-1] - grids[0]).abs() > 0.01
    assert far.any()
    assert ((grids.diff(dim=0) * direction)[:, far] > 0).all()


def test_a_halfway_blend_of_log_linear_ranges_is_the_geometric_mean_of_their_levels():
    # in log tan(theta/2), which is log sigma where sigma is small
    blend = log_linear(1e-6, 1e-2).blend(log_linear(1e-4, 1e-2), 0.5)
    expected = (log_linear(1e-6, 1e-2).sigmas(7)[:-1] * log_linear(1e-4, 1e-2).sigmas(7)[:-1]).sqrt()
    torch.testing.assert_close(blend.sigmas(7)[:-1], expected, rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=60)
@given(cost=st.floats(0.1, 10), knots=st.integers(60, 1100), gamma=st.floats(0, 1))
@example(cost=2.0, knots=105, gamma=0.0)
def test_curves_whose_knots_almost_coincide_can_be_blended(cost, knots, gamma):
    # equal costs: the knots are uniform in u up to rounding, like a named schedule's
    equal = from_costs(torch.atan(log_uniform(knots)), torch.full((knots - 1,), cost, dtype=torch.float64))
    blend = equal.blend(log_linear(), gamma)
    torch.testing.assert_close(blend.sigmas(10), log_linear().sigmas(10), rtol=2e-3, atol=0)


def test_a_blend_of_everything_also_takes_over_whether_it_starts_from_pure_noise():
    finite = karras()
    pure = Schedule(finite.u, finite.theta, pure_noise=True)
    assert finite.blend(pure, 1.0).pure_noise
    assert not pure.blend(finite, 1.0).pure_noise


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_a_blend_beyond_either_end_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        karras().blend(log_linear(), gamma)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [karras(), linear(), cosine(), learned(), karras().blend(log_linear(), 0.3)], ids=lambda s: s.name
)
def test_a_schedule_comes_back_from_its_file_bit_for_bit(schedule, tmp_path):
    file = tmp_path / "schedule.json"
    schedule.save(file)
    assert same(Schedule.load(file), schedule)
    assert torch.equal(Schedule.load(str(file)).angles(17), schedule.angles(17))


@settings(deadline=None, max_examples=50)
@given(
    u=st.sets(st.floats(1e-9, 1 - 1e-9), max_size=40),
    theta=st.sets(st.floats(1e-9, math.pi / 2), min_size=42, max_size=42),
    name=st.text(max_size=20),
    pure_noise=st.booleans(),
    to_data=st.booleans(),
    provenance=st.dictionaries(
        st.text(max_size=5), st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.none())
    ),
)
def test_any_curve_comes_back_from_its_file_bit_for_bit(tmp_path_factory, u, theta, name, pure_noise, to_data, provenance):
    u = torch.tensor([0.0, *sorted(u), 1.0], dtype=torch.float64)
    theta = torch.tensor(sorted(theta, reverse=True)[: len(u)], dtype=torch.float64)
    grids = {len(theta): theta, 1: theta[-1:]}
    schedule = Schedule(u, theta, name, pure_noise, to_data, grids, provenance)
    file = tmp_path_factory.mktemp("schedules") / "any.json"
    schedule.save(file)
    assert same(Schedule.load(file), schedule)


def test_lists_of_numbers_make_the_same_schedule_as_double_tensors():
    a = Schedule([0.0, 0.1, 1.0], [1.5, 0.7, 0.1])
    b = Schedule(*(torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0.1, 1.0], [1.5, 0.7, 0.1])))
    assert same(a, b)


def damaged(**changes) -> str:
    document = {"format": "fewstep.schedule", "version": 1, "name": "x", "pure_noise": False}
    document |= {"u": [0.0, 0.5, 1.0], "theta": [1.5, 0.7, 0.1], "provenance": {}} | changes
    return json.dumps({k: v for k, v in document.items() if v is not ...})


def damaged_grids(**grids) -> str:
    return damaged(version=2, to_data=True, grids=grids)


FAULTS = {
    "empty": ("", "JSON"),
    "not JSON": ("sigma: 80\n", "JSON"),
    "truncated": (damaged()[:-30], "JSON"),
    "a list": ("[1, 2, 3]", "not a schedule"),
    "another format": (damaged(format="somebody.else"), "not a schedule"),
    "no format": (damaged(format=...), "not a schedule"),
    "a future version": (damaged(version=3), "version 3.*reads up to 2: upgrade"),
    "no version": (damaged(version=...), "version None"),
    "theta not monotone": (damaged(theta=[1.5, 1.6, 0.1]), r"theta must strictly decrease; theta\[1\]=1.6 >= theta\[0\]=1.5"),
    "u not monotone": (damaged(u=[0.0, 1.0, 1.0]), "u must strictly increase"),
    "u not from 0 to 1": (damaged(u=[0.0, 0.5, 0.9]), "from 0 to 1"),
    "unequal lengths": (damaged(u=[0.0, 1.0]), "one length"),
    "too short": (damaged(u=[0.0], theta=[1.0]), "length >= 2"),
    "theta too large": (damaged(theta=[1.6, 0.7, 0.1]), "pi/2"),
    "theta not above zero": (damaged(theta=[1.5, 0.7, 0.0]), r"\(0, pi/2\]"),
    "theta not finite": (damaged(theta=[1.5, math.nan, 0.1]), "finite"),
    "theta of words": (damaged(theta="abc"), "damaged"),
    "no theta": (damaged(theta=...), "theta"),
    "no grids in version 2": (damaged(version=2, to_data=True), "damaged"),
    "a grid of another length": (damaged_grids(**{"3": [1.0, 0.5]}), r"grids\[3\] must be 3 angles"),
    "a grid that is not monotone": (damaged_grids(**{"2": [0.5, 1.0]}), r"grids\[2\] must strictly decrease"),
    "a grid that goes to data": (damaged_grids(**{"2": [0.5, 0.0]}), r"grids\[2\] must be 2 angles in \(0, pi/2\]"),
    "a grid beyond pure noise": (damaged_grids(**{"2": [1.6, 0.5]}), r"grids\[2\] must be 2 angles"),
    "a grid that is not finite": (damaged_grids(**{"2": [1.0, math.nan]}), r"grids\[2\] must be 2 angles"),
    "a grid of no number of steps": (damaged_grids(six=[1.0, 0.5]), "damaged"),
    "a grid of words": (damaged_grids(**{"2": "ab"}), "damaged"),
    "grids in a list": (damaged(version=2, to_data=True, grids=[[1.0, 0.5]]), "damaged"),
    "a matrix for a grid": (damaged_grids(**{"2": [[1.0, 0.5]]}), r"grids\[2\] must be 2 angles"),
}


@pytest.mark.parametrize(("text", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_a_file_that_is_no_schedule_is_refused_by_name_and_fault(text, says, tmp_path):
    file = tmp_path / "some schedule.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Schedule.load(file)
    assert str(file) in str(error.value)


def test_the_undamaged_file_of_these_tests_does_load(tmp_path):
    (tmp_path / "fine.json").write_text(damaged())
    assert Schedule.load(tmp_path / "fine.json").name == "x"


def test_binary_junk_is_refused_by_name(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a schedule"):
        Schedule.load(file)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Schedule.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("failure", ["provenance that is no JSON", "disk full halfway", "killed before the rename"])
def test_a_failing_save_leaves_the_old_file_as_it_was(failure, tmp_path, monkeypatch):
    file, new = tmp_path / "schedule.json", karras(0.01, 10.0)
    log_linear().save(file)
    before = file.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left on device")

    def half(self, text, *_, **__):
        self.write_bytes(text[: len(text) // 2].encode())
        fail()

    if failure == "provenance that is no JSON":
        new = Schedule(new.u, new.theta, provenance={"model": object()})
    elif failure == "disk full halfway":
        monkeypatch.setattr(File, "write_text", half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, TypeError)):
        new.save(file)
    assert file.read_bytes() == before
    assert same(Schedule.load(file), log_linear())


def test_saving_over_an_old_file_replaces_it(tmp_path):
    file = tmp_path / "schedule.json"
    log_linear().save(file)
    karras().save(file)
    assert same(Schedule.load(file), karras())
    assert [f.name for f in tmp_path.iterdir()] == ["schedule.json"]


def test_a_schedule_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        karras().name = "mine"


# --- format version 2 -------------------------------------------------------------------------------------------------


def refined() -> Schedule:
    grids = {4: torch.tensor([1.5, 1.2, 0.7, 0.2], dtype=torch.float64), 2: torch.tensor([1.1, 0.3], dtype=torch.float64)}
    return replace(learned(), to_data=True, grids=grids)


def test_a_document_of_version_one_reads_as_the_schedule_that_it_always_was(tmp_path):
    document = karras(0.01, 50.0).to_dict() | {"version": 1}
    del document["to_data"], document["grids"]
    old = Schedule.from_dict(document)
    assert same(old, karras(0.01, 50.0))
    assert (old.to_data, old.grids) == (False, {})
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert same(Schedule.load(tmp_path / "old.json"), old)
    # what a version 1 file could not say is not read out of one
    assert same(Schedule.from_dict(document | {"to_data": True, "grids": {"2": [1.0, 0.5]}}), old)


def test_saving_writes_version_two_with_everything():
    document = refined().to_dict()
    assert (document["format"], document["version"]) == ("fewstep.schedule", 2)
    assert document["to_data"] is True
    assert document["grids"] == {"2": [1.1, 0.3], "4": [1.5, 1.2, 0.7, 0.2]}
    assert list(document["grids"]) == ["2", "4"]
    assert same(Schedule.from_dict(json.loads(json.dumps(document))), refined())
    assert Schedule.from_dict(document).to_dict() == document


def test_an_old_file_that_is_saved_again_reads_the_same(tmp_path):
    old = Schedule.from_dict(json.loads(damaged()))
    old.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["version"] == 2
    new = Schedule.load(tmp_path / "new.json")
    assert same(new, old)
    assert torch.equal(new.angles(9), old.angles(9))


@pytest.mark.parametrize("document", [None, [], "text", {}, {"format": "other", "version": 2}])
def test_a_document_that_is_no_schedule_is_refused(document):
    with pytest.raises(ValueError, match="not a schedule"):
        Schedule.from_dict(document)


def test_a_version_two_document_without_to_data_is_refused():
    document = refined().to_dict()
    del document["to_data"]
    with pytest.raises(ValueError, match="damaged"):
        Schedule.from_dict(document)


# --- read to data, and grids of their own -----------------------------------------------------------------------------


@on_every_formula
@pytest.mark.parametrize("steps", [1, 2, 5, 18, 64])
def test_a_curve_that_leads_to_data_has_data_in_place_of_its_last_level(name, steps):
    schedule, formula = FORMULAS[name]
    angles = replace(schedule, to_data=True).angles(steps)
    assert angles.shape == (steps + 1,)
    assert angles[-1] == 0
    assert (angles.diff() < 0).all()
    torch.testing.assert_close(angles[:-1], schedule.angles(steps + 1)[:-2], rtol=0, atol=0)
    first = int(name in FROM_PURE_NOISE)
    expected = formula(np.linspace(0, 1, steps + 1)[first:-1])
    np.testing.assert_allclose(torch.tan(angles[first:-1]).numpy(), expected, rtol=1e-6)
    assert float(angles[-2]) > 1.01 * float(schedule.theta[-1])  # no evaluation is spent at sigma_min


def test_a_refined_grid_is_read_as_it_is_and_the_other_numbers_of_steps_from_the_curve():
    schedule, curve = refined(), replace(refined(), grids={})
    assert schedule.angles(4).tolist() == [1.5, 1.2, 0.7, 0.2, 0]
    assert schedule.sigmas(2).tolist() == pytest.approx([math.tan(1.1), math.tan(0.3), 0])
    path = Linear()
    torch.testing.assert_close(path.angle(schedule.times(path, 4)), schedule.angles(4), rtol=1e-9, atol=1e-12)
    for steps in (1, 3, 5, 40):
        assert torch.equal(schedule.angles(steps), curve.angles(steps))
    assert not torch.equal(schedule.angles(4), curve.angles(4))


def test_a_grid_starts_where_it_says_even_on_a_curve_from_pure_noise():
    schedule = replace(refined(), pure_noise=True)
    assert float(schedule.angles(4)[0]) == 1.5
    assert float(schedule.angles(3)[0]) == math.pi / 2


def test_reading_a_grid_does_not_hand_out_the_schedules_own_memory():
    schedule = refined()
    schedule.angles(4)[0] = 0.0
    schedule.sigmas(4)[0] = 0.0
    assert float(schedule.grids[4][0]) == 1.5


def test_grids_are_sorted_and_numbered_by_whole_numbers_in_double_precision():
    schedule = Schedule([0.0, 1.0], [1.5, 0.1], grids={3: [1.0, 0.5, 0.25], 1: torch.tensor([0.5])})
    assert list(schedule.grids) == [1, 3]
    assert all(grid.dtype == torch.float64 for grid in schedule.grids.values())


@pytest.mark.parametrize("grid", [[1.0, 0.5], [1.0, 0.5, 0.5], [1.0, 0.5, 0.0], [1.6, 0.5, 0.1], [math.nan, 0.5, 0.1]])
def test_a_grid_that_is_none_is_refused(grid):
    with pytest.raises(ValueError, match=r"grids\[3\]"):
        Schedule([0.0, 1.0], [1.5, 0.1], grids={3: grid})


def test_a_blend_takes_over_how_the_nearer_curve_is_read_and_forgets_the_grids():
    blend = refined().blend(log_linear(), 0.3)
    assert blend.to_data
    assert blend.grids == {}
    assert not refined().blend(log_linear(), 0.7).to_data


# --- the bent coordinate, damping and the free schedules --------------------------------------------------------------


def test_the_bent_coordinate_is_the_logarithm_of_sigma_at_the_clean_end_and_finite_at_pure_noise():
    sigma = torch.tensor([1e-6, 1e-4, 1e-2], dtype=torch.float64)
    torch.testing.assert_close(bend(torch.atan(sigma)), (sigma / 2).log(), rtol=1e-5, atol=0)
    assert float(bend(torch.tensor(math.pi / 2, dtype=torch.float64))) == pytest.approx(0, abs=1e-15)
    # tan(theta/2) = (sqrt(1 + sigma^2) - 1)/sigma
    sigma = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(bend(torch.atan(sigma)), (((1 + sigma**2).sqrt() - 1) / sigma).log(), rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(theta=st.floats(1e-9, math.pi / 2), other=st.floats(1e-9, math.pi / 2))
def test_unbending_undoes_bending_which_keeps_the_order(theta, other):
    pair = torch.tensor([theta, other], dtype=torch.float64)
    bent = bend(pair)
    torch.testing.assert_close(unbend(bent), pair, rtol=1e-12, atol=0)
    if abs(theta - other) > 1e-9 * theta:
        assert (bent[0] < bent[1]) == (theta < other)


def test_damping_lengthens_every_step_by_its_share_of_the_mean():
    sigma = log_uniform(100)
    costs = gaussian_costs(sigma)
    lengths = step_lengths(costs).numpy()
    for damping in (0.0, 0.05, 1.0):
        curve = from_costs(torch.atan(sigma), costs, damping=damping)
        longer = lengths + damping * lengths.mean()
        np.testing.assert_allclose(curve.u[1:].numpy(), np.cumsum(longer) / longer.sum(), rtol=1e-9)
    assert same(from_costs(torch.atan(sigma), costs, damping=0.0), from_costs(torch.atan(sigma), costs))


def test_much_damping_gives_back_the_levels_of_the_probes():
    theta, costs = torch.atan(log_uniform(100)), gaussian_costs(log_uniform(100))
    stiff = from_costs(theta, costs, damping=1e6)
    torch.testing.assert_close(stiff.sigmas(9), log_linear().sigmas(9), rtol=1e-3, atol=0)


def test_no_stretch_of_levels_is_skipped_with_damping():
    theta, costs = torch.atan(log_uniform(61)), torch.zeros(60, dtype=torch.float64)
    costs[30] = 1.0  # everything happens here
    for damping, above in ((0.0, 1), (0.5, 10)):
        levels = from_costs(theta, costs, damping=damping).sigmas(61)[:-1]
        assert int((levels > 1.01 * log_uniform(61)[30]).sum()) == pytest.approx(above, abs=1)
