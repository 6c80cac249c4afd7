import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from counting import Counting
from fewstep.config import FinetuneConfig
from fewstep.denoiser import Denoiser, Guided, OnPath, Pretrained
from fewstep.endpoint import MIDWAY_STEPS, Midway, Runs, mean_square, reference, squared_errors
from fewstep.export import sub_range
from fewstep.free import free_schedules
from fewstep.goal import goals_gaussian, make_goal
from fewstep.learn import learn_by_cost
from fewstep.levels import learn_levels
from fewstep.metrics import sliced_wasserstein
from fewstep.mixture import Mixture, ring
from fewstep.path import HALF_PI, VE, VP, Cosine, Linear, Path, Tabulated
from fewstep.refine import STARTS
from fewstep.sampler import Sampler, start_where_data_are
from fewstep.schedule import Schedule, karras, kl_optimal, log_linear
from fewstep.solvers import STOCHASTIC, evaluations_of, solve
from fewstep.tailor import (
    DAMPING,
    DRAWS,
    LEARNED_CURVES,
    LEVELS,
    TRIED_AT,
    curve_of,
    entropy_curve,
    fit_curve,
    learned_curves,
    learned_on_the_way,
    refine_steps,
    refined_others,
    split_half_error,
    tailor,
    through,
)

PATHS = {
    "VE": VE(),
    "VP": VP(),
    "Linear": Linear(),
    "Cosine": Cosine(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, d: int = 2, seed: int = 1234, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=dtype)


class Undifferentiated(Counting):
    """Counts, and wants no gradients."""

    def forward(self, x, t, cond=None):
        assert not torch.is_grad_enabled(), "somebody wants to differentiate the network"
        assert not x.requires_grad
        return super().forward(x, t, cond)


class Judge:
    """Endpoint errors on noises that nothing was fitted to, against a much finer reference."""

    def __init__(self, model: Denoiser, n: int = 384):
        self.model, self.known = model, reference(model, noise(n), levels=96)

    def __call__(self, solver: str, schedule: Schedule, steps: int) -> float:
        runs = Runs(self.model, solver, self.known.noise)
        return math.sqrt(mean_square(runs, schedule.angles(steps)[:-1], self.known.ends))

    def best_free(self, solver: str, steps: int) -> float:
        path = self.model.path
        free = free_schedules(path.sigma_min, path.sigma_max).values()
        return min(self(solver, replace(s, pure_noise=path.ends_in_pure_noise()), steps) for s in free)


# --- what it gains ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged() -> Judge:
    return Judge(ring())


@pytest.mark.parametrize(("solver", "at_most"), [("dpmpp_2m", 0.5), ("euler", 0.95), ("heun", 0.5)])
def test_refined_levels_beat_every_free_schedule_on_noises_never_seen(judged, solver, at_most):
    schedule = tailor(ring(), solver, [6], generator=seeded(1))
    error = judged(solver, schedule, 6)
    assert error < at_most * judged.best_free(solver, 6)
    # and the curve alone is not worse than the free ones by much
    assert judged(solver, replace(schedule, grids={}), 6) < 1.25 * judged.best_free(solver, 6)


@pytest.mark.parametrize("path", [VP()], ids=["VP"])
def test_they_do_so_on_other_paths_too(path):
    model = ring(path=path)
    schedule = tailor(model, "dpmpp_2m", [6])
    judge = Judge(model)
    assert judge("dpmpp_2m", schedule, 6) < 0.6 * judge.best_free("dpmpp_2m", 6)


def test_what_was_refined_for_one_solver_is_not_what_another_wants(judged):
    for_euler, for_dpm = (tailor(ring(), solver, [6]) for solver in ("euler", "dpmpp_2m"))
    assert judged("euler", for_euler, 6) < judged("euler", for_dpm, 6)
    assert judged("dpmpp_2m", for_dpm, 6) < judged("dpmpp_2m", for_euler, 6)


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "path"), [("euler", VE()), ("heun", Linear()), ("dpmpp_2m", VE())])
def test_the_curve_and_each_refinement_cost_at_most_the_budget_and_are_counted_truly(solver, path):
    model = Undifferentiated(ring(path=path))
    known = reference(model, noise(128, dtype=torch.float32))
    schedule = fit_curve(model, solver, known)
    assert schedule.provenance["evaluations"] == model.samples <= 15_000
    assert schedule.provenance["refined"] == {}
    for steps in (3, 8):
        before = model.samples
        schedule = refine_steps(model, schedule, steps, known)
        assert schedule.provenance["refined"][str(steps)]["evaluations"] == model.samples - before <= 15_000
    assert sorted(schedule.grids) == [3, 8]


@pytest.mark.parametrize("budget", [9000, 20_000])
def test_other_budgets_are_kept_too(budget):
    model, ticks = Undifferentiated(ring()), []
    known = reference(model, noise(64, dtype=torch.float32), tick=ticks.append)
    schedule = fit_curve(model, "euler", known, budget=budget, tick=ticks.append)
    assert schedule.provenance["evaluations"] == model.samples == sum(ticks) <= budget
    refine_steps(model, schedule, 5, known, budget=budget, tick=ticks.append)
    assert model.samples == sum(ticks) <= 2 * budget


def test_all_of_it_costs_the_sum_of_its_parts():
    model = Undifferentiated(ring())
    about = tailor(model, "dpmpp_2m", [4, 6]).provenance
    assert model.samples == about["evaluations"] + sum(each["evaluations"] for each in about["refined"].values())
    assert set(about["refined"]) == {"4", "6"}


def test_both_halves_of_guidance_are_counted():
    class Labelled(Undifferentiated):
        def forward(self, x, t, cond=None):
            assert cond["label"].shape == (len(x),)
            return super().forward(x, t)

    model = Labelled(ring())
    guided = Guided(model, 1.0, {"label": torch.zeros(1)})
    about = tailor(guided, "euler", [4], cond={"label": torch.ones(3)}, noises=64, budget=15_000).provenance
    assert model.samples == about["evaluations"] + about["refined"]["4"]["evaluations"]
    assert about["evaluations"] <= 2 * 15_000
    assert about["refined"]["4"]["evaluations"] <= 2 * 15_000


def test_the_network_is_never_differentiated_even_where_it_could_be():
    weight = torch.nn.Parameter(torch.tensor(0.3))

    def net(x, t):
        assert not torch.is_grad_enabled()
        return weight * x / (1 + t[:, None])

    tailor(Pretrained(net, VE(), "x0", shape=(2,)), "dpmpp_2m", [3], noises=64, budget=7000)
    assert weight.grad is None


# --- the curve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pure_noise", [True, False])
def test_the_curve_of_equal_local_error_is_a_gaussians_closed_form_with_its_damping(pure_noise):
    known = reference(Mixture([[0.0]], 0.5), noise(16, 1), levels=300)
    curve = curve_of(known, "euler", pure_noise)
    assert (curve.to_data, curve.pure_noise) == (True, pure_noise)
    length = np.array([quad(lambda s: (0.25 + s**2) ** -0.75, math.tan(end), 80.0, limit=200)[0] for end in curve.theta])
    expected = (length / length[-1] + DAMPING * np.linspace(0, 1, 300)) / (1 + DAMPING)
    np.testing.assert_allclose(curve.u.numpy(), expected, atol=2e-3)


def test_a_solver_of_order_two_gets_the_curve_of_the_second_derivative():
    known = reference(Mixture([[0.0]], 0.5), noise(16, 1), levels=300)
    curve = curve_of(known, "dpmpp_2m", False)
    assert torch.equal(curve.u, curve_of(known, "deis", False).u)

    def density(log_sigma):
        v = math.exp(2 * log_sigma)
        return abs(v * (0.5 - v) * (0.25 + v) ** -2.5) ** (1 / 3)

    levels, kink = np.log(np.tan(curve.theta.numpy())), math.log(math.sqrt(0.5))
    length = np.array([quad(density, end, math.log(80), points=[kink] if end < kink else None, limit=400)[0] for end in levels])
    expected = (length / length[-1] + DAMPING * np.linspace(0, 1, 300)) / (1 + DAMPING)
    np.testing.assert_allclose(curve.u.numpy(), expected, atol=5e-3)
    assert float((curve.u - curve_of(known, "euler", False).u).abs().max()) > 0.05


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_the_curve_of_equal_entropy_is_a_gaussians_closed_form_which_is_kl_optimal_for_unit_variance(std):
    # E|x_0 - D|^2 = c^2 s^2/(c^2 + s^2), and over s^2 its integral is c atan(s/c)
    known = reference(Mixture([[0.0]], std), noise(16, 1), levels=300)
    s = torch.tan(known.theta)
    curve = entropy_curve(known, (std * s) ** 2 / (std**2 + s**2), pure_noise=False)
    assert curve.to_data
    angle = torch.atan(s / std)
    torch.testing.assert_close(curve.u, (angle[0] - angle) / (angle[0] - angle[-1]), rtol=0, atol=1e-4)
    if std == 1:
        torch.testing.assert_close(curve.angles(9), replace(kl_optimal(), to_data=True).angles(9), rtol=1e-3, atol=0)


@pytest.mark.parametrize("path", [VE(0.01, 50.0), Linear()], ids=["VE", "Linear"])
def test_the_learned_curves_come_back_from_the_file(path, tmp_path):
    known = reference(ring(path=path), noise(64))
    schedule = fit_curve(ring(path=path), "dpmpp_2m", known, budget=7200)
    schedule.save(tmp_path / "s.json")
    found = learned_curves(Schedule.load(tmp_path / "s.json"))
    assert tuple(found) == LEARNED_CURVES
    expected = curve_of(known, "dpmpp_2m", path.ends_in_pure_noise())
    for n in (1, 4, 11):
        torch.testing.assert_close(found["equal local error"].angles(n), expected.angles(n), rtol=1e-9, atol=0)
        assert float(found["equal entropy"].angles(n)[0]) == float(expected.angles(n)[0])
    assert learned_curves(karras()) == {}


@pytest.mark.parametrize("steps", [2, 5, 8, 13])
def test_a_curve_through_refined_levels_reads_them_off_again(steps):
    theta = torch.sort(torch.rand(steps, generator=seeded(steps)).double() * 1.5 + 0.01, descending=True).values
    curve = through(theta, karras())
    torch.testing.assert_close(curve.angles(steps)[:-1], theta, rtol=1e-9, atol=0)
    assert curve.to_data
    assert curve.theta[-1] < theta[-1]
    assert (curve.angles(steps - 1 or 1).diff() < 0).all()


def test_a_curve_through_levels_from_pure_noise_starts_there_for_every_number_of_steps():
    theta = torch.tensor([HALF_PI, 1.2, 0.9, 0.2], dtype=torch.float64)
    curve = through(theta, replace(karras(), pure_noise=True))
    for steps in (1, 3, 4, 10):
        assert float(curve.angles(steps)[0]) == HALF_PI


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_the_split_half_error_falls_with_the_noises(solver):
    def error(n: int) -> float:
        # the spread of a mixture's trajectories, not of a Gaussian's, which all bend alike
        known = reference(ring(), noise(n, seed=n))
        return split_half_error(known, solver)

    few, more, many = (np.median([error(n + i) for i in range(2)]) for n in (16, 128, 1024))
    assert more < 0.75 * few
    assert many < 0.75 * more
    assert 0 < many < 0.1


def test_the_split_half_error_is_the_distance_of_the_two_halves_own_grids():
    known = reference(ring(), noise(40))
    grids = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        half = reference(ring(), noise(40)[part])
        grids.append(curve_of(half, "euler", False).sigmas(10)[:-1])
    assert split_half_error(known, "euler") == pytest.approx(float((grids[0] / grids[1]).log().abs().max()), rel=1e-6)


@pytest.mark.parametrize(("solver", "seed", "kept"), [("euler", 1234, "through"), ("dpmpp_2m", 3, "linear to data")])
def test_the_curve_that_is_kept_has_the_least_error_of_those_that_competed_as_reported(solver, seed, kept):
    known = reference(ring(), noise(128, seed=seed))
    schedule = fit_curve(ring(), solver, known)
    about = schedule.provenance
    totals = {name: sum(map(math.log, errors.values())) for name, errors in about["curve_errors"].items()}
    assert len(totals) == 6
    assert about["curve"] == min(totals, key=totals.get)
    assert about["curve"].startswith(kept)  # or else the other case is not tested
    # the errors are those of the first noises, at most a quarter of them, which nothing was fitted to
    runs = Runs(ring(), solver, known.noise)
    squares = [squared_errors(runs(schedule.angles(n)[:-1])[0], known.ends) for n in TRIED_AT]
    judged = min(32, int(0.6 * (15_000 - (128 + DRAWS) * LEVELS)) // (6 * sum(evaluations_of(solver, n) for n in TRIED_AT)))
    again = {str(n): math.sqrt(each[:judged].mean()) for n, each in zip(TRIED_AT, squares, strict=True)}
    assert about["curve_errors"][about["curve"]] == pytest.approx(again, rel=1e-9)
    assert schedule.to_data
    assert (about["cost"], about["solver"], about["noises"]) == ("endpoint", solver, 128)
    assert about["split_half_error"] == split_half_error(known, solver)


# --- what it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_tailored_schedule_is_valid_on_its_path_for_every_number_of_steps(path, tmp_path):
    schedule = tailor(ring(path=path), "dpmpp_2m", [2, 5], noises=48, budget=6300)
    about = schedule.provenance
    assert schedule.pure_noise == path.ends_in_pure_noise()
    assert (about["sigma_min"], about["sigma_max"]) == pytest.approx((path.sigma_min, path.sigma_max), rel=1e-9)
    assert about["learned_on"] == repr(path)
    for steps in (1, 2, 3, 5, 20):
        times = schedule.times(path, steps)
        assert (times.diff() < 0).all()
        assert times[0] <= 1
        assert path.ends_in_pure_noise() == (float(times[0]) == 1.0 and float(path.alpha(times[0])) == 0)
    for steps in (2, 5):
        assert torch.equal(schedule.angles(steps)[:-1], schedule.grids[steps])
    schedule.save(tmp_path / "s.json")
    back = Schedule.load(tmp_path / "s.json")
    assert back.provenance == about
    assert torch.equal(back.angles(5), schedule.angles(5))
    assert torch.equal(back.angles(7), schedule.angles(7))


def test_equal_seeds_give_equal_schedules_and_others_do_not():
    one, two, three = (tailor(ring(), "euler", [4], noises=64, budget=7000, generator=seeded(i)) for i in (5, 5, 6))
    assert torch.equal(one.theta, two.theta)
    assert torch.equal(one.grids[4], two.grids[4])
    assert one.provenance == two.provenance
    assert not torch.equal(one.grids[4], three.grids[4])


def test_the_size_of_batches_hardly_matters():
    one, two = (tailor(ring(), "euler", [4], noises=64, budget=7000, batch_size=size) for size in (512, 25))
    torch.testing.assert_close(one.sigmas(4), two.sigmas(4), rtol=0.02, atol=0)
    assert one.provenance["evaluations"] == pytest.approx(two.provenance["evaluations"], rel=0.2)


def test_a_refinement_adds_its_grid_and_leaves_the_curve_and_the_others():
    known = reference(ring(), noise(64))
    curve = fit_curve(ring(), "euler", known, budget=7000)
    one = refine_steps(ring(), curve, 4, known, budget=7000)
    two = refine_steps(ring(), one, 6, known, budget=7000)
    assert curve.grids == {}
    assert torch.equal(two.theta, curve.theta)
    assert torch.equal(two.grids[4], one.grids[4])
    assert two.provenance["refined"]["4"] == one.provenance["refined"]["4"]
    assert curve.provenance["refined"] == {}
    for note in two.provenance["refined"].values():
        assert set(note) == {"evaluations", "from", "moved", "others"}


def test_the_other_refinements_come_back_from_the_file_each_for_its_numbers_of_steps(tmp_path):
    known = reference(ring(), noise(64))
    schedule = fit_curve(ring(), "euler", known)
    for n in (4, 6):
        schedule = refine_steps(ring(), schedule, n, known)
    schedule.save(tmp_path / "s.json")
    found = refined_others(Schedule.load(tmp_path / "s.json"))
    told = {n: schedule.provenance["refined"][str(n)]["others"] for n in (4, 6)}
    assert found.keys() == {f"refined from {start}" for others in told.values() for start in others}
    assert all(map(learned_on_the_way, found))
    for n, others in told.items():
        assert len(others) == STARTS - 1  # and dynamic programming
        for start, theta in others.items():
            same = found[f"refined from {start}"]
            assert same.angles(n)[:-1].tolist() == theta
            assert len(theta) == n
    assert {n for each in found.values() for n in each.grids} == {4, 6}
    assert refined_others(karras()) == {}


def test_the_range_that_is_given_is_the_one_that_is_used():
    schedule = tailor(ring(), "euler", [4], noises=64, budget=7000, sigma_min=0.05, sigma_max=20.0)
    assert (schedule.provenance["sigma_min"], schedule.provenance["sigma_max"]) == pytest.approx((0.05, 20.0), rel=1e-9)
    for steps in (4, 9):
        assert float(schedule.sigmas(steps)[-2]) >= 0.05 * (1 - 1e-9)
    assert float(schedule.sigmas(9)[0]) < 81


def test_a_shape_that_is_not_known_is_asked_for():
    net = Pretrained(lambda x, t: 0.3 * x / (1 + t[:, None]), VE(), "x0")
    with pytest.raises(ValueError, match="shape"):
        tailor(net, "euler")
    schedule = tailor(net, "euler", shape=(3,), noises=64, budget=7000)
    assert schedule.provenance["noises"] == 64


@pytest.mark.parametrize(("noises", "budget"), [(128, 7000), (16, 15_000), (128, 1000)])
def test_too_few_evaluations_or_noises_for_a_curve_are_refused(noises, budget):
    with pytest.raises(ValueError, match="too few to fit a curve"):
        tailor(ring(), "euler", noises=noises, budget=budget)


@pytest.mark.parametrize(("solver", "quiet"), [("ancestral", "euler"), ("dpmpp_2m_sde", "dpmpp_2m")])
def test_a_stochastic_solver_gets_the_levels_of_the_same_solver_without_its_noise(solver, quiet):
    drawn, still = (tailor(ring(), name, [3], noises=64, budget=7000) for name in (solver, quiet))
    for steps in (3, 8):
        assert torch.equal(drawn.angles(steps), still.angles(steps))
    assert drawn.provenance["solver"] == solver


@pytest.mark.parametrize("solver", sorted(STOCHASTIC))
def test_a_stochastic_solvers_samples_are_nearer_to_the_data_on_its_levels_than_on_the_published_ones(solver):
    # the exact ring: what 5 steps leave to do is large, and 4,000 samples see it
    model, count = ring(path=VE(0.02, 40.0)), 4000
    data = model.sample(count, seeded(1))

    def distance(schedule: Schedule) -> float:
        times, g = schedule.times(model.path, 5), seeded(2)
        x = solve(model, model.path.start(count, (2,), g, times[0]), times, solver, generator=g).x
        return sliced_wasserstein(x, data, 200, seeded(3))

    ours = tailor(model, solver, [5])
    assert distance(ours) < 0.5 * distance(learn_by_cost(model, data, generator=seeded(0)))
    assert distance(ours) < 0.8 * distance(karras(0.02, 40.0))


# --- image to image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VE(0.02, 40.0), Linear(), VP()], ids=["VE", "Linear", "VP"])
def test_pictures_begin_where_the_ode_takes_noise(path):
    # of N(0, s^2) in closed form: x/alpha grows as sqrt(s^2 + sigma^2)
    std, start, z = 0.5, 0.7, noise(50)
    model = Counting(Mixture(torch.zeros(1, 2), std, path=path))
    begun = Midway(model, start)
    states, evaluations = begun.states(z)
    high = math.inf if path.ends_in_pure_noise() else path.sigma_max
    grown = math.sqrt(std**2 + start**2) * (1.0 if high == math.inf else high / math.hypot(std, high))
    assert torch.allclose(begun.path.start_from(states, 1.0), grown * z, rtol=0.01)
    assert evaluations == model.samples == 50 * MIDWAY_STEPS


def from_pictures(solver: str, schedules: dict[str, Schedule], start: float, steps: int) -> dict[str, float]:
    """Endpoint errors from 1,000 data with noise of level start, none of which any fit has seen."""
    model = ring(path=VE(0.02, 40.0))
    x = model.sample(1000, seeded(5), torch.float64) + start * noise(1000)

    def end(schedule: Schedule, solver: str, steps: int) -> torch.Tensor:
        times = schedule.times(model.path, steps)
        assert float(torch.tan(schedule.angles(steps)[0])) == pytest.approx(start, rel=1e-9)
        return solve(model, x, times, solver).x

    exact = end(log_linear(0.02, start), "unipc", 200)
    return {k: float((end(s, solver, steps) - exact).square().mean().sqrt()) for k, s in schedules.items()}


@pytest.mark.parametrize(("solver", "start", "gain"), [("dpmpp_2m", 1.0, 0.5), ("unipc", 3.0, 0.7)])
def test_levels_from_pictures_beat_every_free_schedule_and_the_cut_curve(solver, start, gain):
    model = ring(path=VE(0.02, 40.0))
    ours = tailor(model, solver, [5], start=start, generator=seeded(0))
    assert ours.provenance["start"] == start
    assert ours.made_for() == pytest.approx((0.02, start))
    free = free_schedules(0.02, start, [5])
    cut = sub_range(tailor(model, solver, generator=seeded(0)), sigma=start)
    errors = from_pictures(solver, free | {"ours": ours, "cut": cut}, start, 5)
    best = min(error for name, error in errors.items() if name in free)
    assert errors["ours"] < gain * best
    assert errors["ours"] < gain * errors["cut"]


@pytest.mark.parametrize("path", [VE(), Linear()], ids=["VE", "Linear"])
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
def test_levels_from_pictures_keep_to_the_budget_and_are_counted_truly(solver, path):
    model = Undifferentiated(ring(path=path))
    about = tailor(model, solver, [3], start=2.0).provenance
    assert model.samples == about["evaluations"] + about["refined"]["3"]["evaluations"]
    assert about["evaluations"] <= 15_000


@pytest.mark.parametrize("start", [0.001, 80.0, math.nan])
def test_pictures_cannot_begin_outside_of_the_models_levels(start):
    model = Undifferentiated(ring(path=VE(0.002, 80.0)))
    with pytest.raises(ValueError, match="image to image starts between"):
        tailor(model, "euler", start=start)
    assert model.samples == 0


# --- what is known not to work ----------------------------------------------------------------------------------------


def test_an_unknown_solver_is_refused_before_the_model_is_asked():
    model = Undifferentiated(ring())
    with pytest.raises(ValueError, match="solver"):
        tailor(model, "nonsense")
    assert model.samples == 0


def enough(noises: int, path: Path | None = None) -> int:
    """The budget that a refusal asks for."""
    with pytest.raises(ValueError, match="too few to fit a curve") as error:
        tailor(ring(path=path), "euler", noises=noises, budget=noises * 60)
    return int(re.search(r"want about (\d+)", str(error.value))[1])


@pytest.mark.parametrize("path", [VE(), Linear()], ids=["VE", "to pure noise"])
@pytest.mark.parametrize("noises", [64, 128])
def test_a_budget_is_refused_before_the_model_is_asked(noises, path):
    refused, about = 0, enough(noises, path)
    for budget in range(about - 300, about + 300, 50):
        model = Undifferentiated(ring(path=path))
        try:
            tailor(model, "euler", noises=noises, budget=budget)
        except ValueError:
            refused += 1
            assert model.samples == 0
    assert 0 < refused < 12


@pytest.mark.parametrize("lower", [None, 2.0])
def test_a_budget_for_many_steps_is_refused_before_the_model_is_asked(lower):
    refused = 0
    for budget in range(7_000, 12_000, 500):
        model = Undifferentiated(ring(path=VE(0.05, 20.0)))
        try:
            tailor(model, "euler", [20], noises=64, budget=budget, lower=lower)
        except ValueError:
            refused += 1
            assert model.samples == 0
    assert 0 < refused < 10


def test_the_budget_that_a_refusal_asks_for_will_do():
    budget = enough(64)
    assert tailor(ring(), "euler", noises=64, budget=budget + 60).provenance["evaluations"] <= budget + 60
    with pytest.raises(ValueError, match="too few"):
        tailor(ring(), "euler", noises=64, budget=int(0.9 * budget))


PUBLISHED = FinetuneConfig(density_iterations=0)  # starts in noise


def spread_out(steps: int, model: Denoiser, config: FinetuneConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma/alpha of the levels that a sampler learns on, and 4,000 samples of it before it learns."""
    data = ring().sample(4000, seeded(3))
    schedule = learn_levels(model, steps, make_goal(data), config)
    sampler = Sampler(model, schedule.times(model.path, steps))
    if config.density_iterations:
        start_where_data_are(sampler, goals_gaussian(make_goal(data), 0))
    with torch.no_grad():
        x = sampler.sample(sampler.start(4000, (2,), seeded(1)), seeded(2))
    return schedule.sigmas(steps), x


def test_a_sampler_in_noise_of_a_flow_model_begins_below_pure_noise_where_the_same_model_does_on_a_ve_path():
    plain = ring(path=VE(0.05, 20.0))
    flow = OnPath(plain, Linear(0.05, 20.0))
    pure = tailor(flow, "ancestral", [3], generator=seeded(0))
    assert float(pure.times(flow.path, 3)[0]) == 1.0  # a runtime begins where the model does
    (one, _), (other, x) = (spread_out(3, each, PUBLISHED) for each in (plain, flow))
    torch.testing.assert_close(other, one, rtol=1e-4, atol=0)
    assert float(other[0]) <= 20
    assert abs(float(x.std()) / float(ring().sample(2000, seeded(3)).std()) - 1) < 0.2


@pytest.mark.parametrize("steps", [2, 4])
def test_a_sampler_that_starts_at_the_datas_gaussian_begins_lower_and_ends_nearer(steps):
    data = ring().sample(4000, seeded(4))
    model = ring(path=VE(0.05, 20.0))
    (in_noise, far), (at_the_gaussian, near) = (spread_out(steps, model, each) for each in (PUBLISHED, FinetuneConfig()))
    assert float(at_the_gaussian[0]) < 0.8 * float(in_noise[0])
    far_off, closer = (sliced_wasserstein(x, data, 500, seeded(5)) for x in (far, near))
    assert closer < 0.8 * far_off, (far_off, closer)
    flow, _ = spread_out(steps, OnPath(model, Linear(0.05, 20.0)), FinetuneConfig())
    torch.testing.assert_close(flow, at_the_gaussian, rtol=1e-4, atol=0)


def test_no_level_of_a_sampler_lies_below_the_noise_that_its_last_step_leaves():
    model, data = ring(path=VE(0.01, 20.0)), ring().sample(4000, seeded(4))
    found = learn_levels(model, 6, data, FinetuneConfig(last_std=0.6)).sigmas(6)[:-1]
    assert float(found.min()) >= 0.6 * (1 - 1e-6)
    in_noise = learn_levels(model, 6, data, replace(PUBLISHED, last_std=0.6)).sigmas(6)[:-1]
    assert float(in_noise.min()) < 0.6
