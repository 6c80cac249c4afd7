import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from counting import Counting
from fewstep import endpoint
from fewstep.denoiser import Denoiser, Guided, Pretrained
from fewstep.endpoint import (
    Reference,
    Runs,
    deal,
    denoising_errors,
    level_range,
    local_error_costs,
    local_error_order,
    mean_square,
    reference,
)
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP, Cosine, Linear, Path, Tabulated
from fewstep.schedule import from_costs, log_linear
from fewstep.solvers import SOLVERS, STOCHASTIC, evaluations_of, solve
from fewstep.tailor import tailor

STD = 0.5
MEAN = torch.tensor([[0.7, -0.3, 0.1]], dtype=torch.float64)
PATHS = {
    "VE": VE(),
    "VP": VP(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "Linear": Linear(),
    "Cosine": Cosine(),
    "Tabulated, zero terminal SNR": Tabulated(torch.linspace(0.9999, 0.0, 121, dtype=torch.float64)),
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
DETERMINISTIC = sorted(set(SOLVERS) - STOCHASTIC)
on_every_solver = pytest.mark.parametrize("solver", DETERMINISTIC)


def noise(n: int, d: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(path: Path | None = None) -> Mixture:
    return Mixture(MEAN, STD, path=path)


def amplitude(z: Tensor, path: Path) -> Tensor:
    """A in a Gaussian's trajectories, x/alpha = mean + A sqrt(STD^2 + sigma^2), from noise z at the path's noisiest level."""
    if path.ends_in_pure_noise():
        return z
    return (path.sigma_max * z - MEAN) / math.sqrt(STD**2 + path.sigma_max**2)


class ByLabel(Denoiser):
    """A point mass at 1000 times the row's label."""

    path, shape = VE(0.01, 10.0), (2,)

    def forward(self, x, t, cond=None):
        assert set(cond) == {"label"}
        assert cond["label"].shape == (len(x),)
        return 1000 * cond["label"][:, None].to(x).expand(x.shape)


# --- where the ODE ends -----------------------------------------------------------------------------------------------


def test_a_centred_gaussians_ends_are_its_noise_shrunk_to_its_width():
    z = noise(64, 1)
    known = reference(Mixture([[0.0]], STD), z, levels=192)
    exact = 80 * z * STD / math.sqrt(STD**2 + 80**2)
    torch.testing.assert_close(known.ends, exact, rtol=5e-5, atol=0)
    assert torch.equal(known.noise, z)


@on_every_path
def test_the_ends_of_a_gaussian_are_its_closed_form_on_every_path(path):
    z = noise(32)
    known = reference(gaussian(path), z)
    exact = MEAN + STD * amplitude(z, path)
    torch.testing.assert_close(known.ends, exact, rtol=0, atol=2e-3)
    # the ends of another starting level than the path's own would be further off than that
    assert float((MEAN + 0.99 * STD * z - exact).abs().max()) > 5e-3


def test_the_ends_converge_with_the_levels_at_the_solvers_order():
    path, z = VE(1e-4, 80.0), noise(32)
    exact = MEAN + STD * amplitude(z, path)
    levels = np.array([32, 64, 128])
    errors = [float((reference(gaussian(path), z, levels=int(n)).ends - exact).square().mean().sqrt()) for n in levels]
    slope = np.polyfit(np.log(levels), np.log(errors), 1)[0]
    assert slope == pytest.approx(-3, abs=0.4)
    assert errors[-1] < 1e-4


def test_the_default_reference_is_far_closer_to_the_end_than_ten_steps_are():
    model, z = ring(), noise(64, 2)
    fine, usual = (reference(model, z, levels=n).ends for n in (384, 48))
    coarse = solve(model, 80 * z, log_linear().times(model.path, 10), "dpmpp_2m").x
    assert float((usual - fine).square().mean()) < 1e-3 * float((coarse - fine).square().mean())


@on_every_path
def test_the_levels_are_log_uniform_over_the_paths_range_or_the_one_given(path):
    for limits in ((path.sigma_min, path.sigma_max), (0.1, 10.0)):
        given = {} if limits[0] == path.sigma_min else {"sigma_min": 0.1, "sigma_max": 10.0}
        known = reference(gaussian(path), noise(2), levels=20, **given)
        expected = np.geomspace(limits[1], limits[0], 20)
        np.testing.assert_allclose(torch.tan(known.theta).numpy(), expected, rtol=1e-5)


def test_a_narrower_range_starts_from_its_own_noise():
    z, path = noise(16), VE(0.002, 80.0)
    known = reference(gaussian(path), z, levels=192, sigma_max=3.0)
    exact = MEAN + STD * (3 * z - MEAN) / math.sqrt(STD**2 + 9)
    torch.testing.assert_close(known.ends, exact, rtol=0, atol=2e-4)


# --- how the belief bends ---------------------------------------------------------------------------------------------


@on_every_path
def test_the_bending_is_the_gaussians_closed_form_derivative_along_each_trajectory(path):
    z, k = noise(8), 160
    known = reference(gaussian(path), z, levels=k)
    a = amplitude(z, path).square().sum(1)  # |A|^2
    levels = torch.tan(known.theta)
    first, second = known.bending
    assert first.shape == (k - 1, 8)
    assert second.shape == (k - 2, 8)
    v = levels[:-1] * levels[1:]  # sigma^2 half-way in log sigma
    slope = STD**2 * v * (STD**2 + v) ** -1.5  # D = mean + A c^2 (c^2 + sigma^2)^{-1/2}
    torch.testing.assert_close(first, slope[:, None] ** 2 * a, rtol=1e-2, atol=3e-3 * float(first.max()))
    v = levels[1:-1] ** 2
    curve = STD**2 * v * (2 * STD**2 - v) * (STD**2 + v) ** -2.5
    settled = slice(3, None)  # of the multistep solver, after a first step from pure noise
    torch.testing.assert_close(second[settled], (curve[:, None] ** 2 * a)[settled], rtol=0.02, atol=3e-3 * float(second.max()))
    # both tell levels and trajectories apart
    assert first.std(0).min() > 0.1 * first.max(0).values.min()
    assert a.max() / a.min() > 2


@pytest.mark.parametrize("std", [0.1, 0.5, 3.0])
def test_the_curve_of_order_one_is_a_gaussians_closed_form_density(std):
    known = reference(Mixture([[0.0]], std), noise(16, 1), levels=400)
    costs = local_error_costs(known.bending, 1)
    assert costs.shape == (399,)
    curve = from_costs(known.theta, costs, order=4)
    # |dD/dlog sigma|^{1/2}, up to a constant, in log sigma: the number of steps per octave
    length = np.array(
        [quad(lambda s: (std**2 + s**2) ** -0.75, math.tan(end), 80.0, epsabs=0, limit=200)[0] for end in curve.theta]
    )
    np.testing.assert_allclose(curve.u.numpy(), length / length[-1], atol=2e-3)


def test_the_costs_of_order_two_are_the_geometric_means_of_the_levels_either_side():
    bending = (torch.ones(5, 3), torch.tensor([[1.0, 1, 4], [8.0, 8, 2], [1.0, 2, 3], [50.0, 30, 40]]))
    at_levels = [2.0, 2, 6, 2, 40, 40]
    expected = [math.sqrt(a * b) for a, b in pairwise(at_levels)]
    assert local_error_costs(bending, 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_the_order_of_the_local_error_is_the_solvers_but_at_most_two(solver, order):
    assert local_error_order(solver) == order


@pytest.mark.parametrize("model", [gaussian(), ring()], ids=["Gaussian", "ring"])
def test_one_small_euler_step_is_off_by_half_h_squared_times_the_slope_that_the_reference_saw(model):
    z = noise(16, model.shape[0])
    known = reference(model, z, levels=250)
    levels, h = torch.tan(known.theta), 0.02
    ratios = []
    for i in (95, 120, 132, 145, 162):
        middle = float((levels[i] * levels[i + 1]).sqrt())
        sigmas = middle * torch.exp(torch.tensor([h / 2, -h / 2], dtype=torch.float64))
        times = model.path.time(torch.atan(sigmas))
        there = log_linear(float(sigmas[0]), 80.0).times(model.path, 100)[:-1]
        x = solve(model, 80 * z, there, "heun").x
        one = solve(model, x, times, "euler").x
        fine = torch.linspace(0, 1, 9, dtype=torch.float64)
        exact = solve(model, x, model.path.time(torch.atan(sigmas[0] * (sigmas[1] / sigmas[0]) ** fine)), "heun").x
        error = (one - exact).norm(dim=1)
        ratios.append(error / (h**2 * known.bending[0][i].sqrt()))
    # one constant for all levels and trajectories
    ratios = torch.stack(ratios)
    assert float(ratios.median()) == pytest.approx(0.5, rel=0.01)
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.5), rtol=0.1, atol=0)


# --- replay -----------------------------------------------------------------------------------------------------------

GRID = log_linear(0.02, 60.0)


def moved(theta: Tensor, i: int) -> Tensor:
    return torch.cat([theta[:i], theta[i : i + 1] * 0.97, theta[i + 1 :]])


@on_every_solver
@pytest.mark.parametrize("path", [VE(), Linear(), VP()], ids=["VE", "Linear", "VP"])
def test_a_replayed_run_is_the_fresh_one_bit_for_bit_and_asks_from_the_first_changed_level_on(solver, path):
    steps, m = 5, 6
    z, model = noise(m, 2), Counting(ring(path=path))
    theta = GRID.angles(steps)[:-1]
    if path.ends_in_pure_noise():
        theta[0] = math.pi / 2
    runs = Runs(model, solver, z)
    x, log = runs(theta)
    # heun asks once on a step from pure noise, and on the one to data
    heun = [1 if path.ends_in_pure_noise() else 2, *[2] * (steps - 2), 1]
    asked = heun if solver == "heun" else [1] * steps
    assert runs.evaluations == model.samples == m * sum(asked)
    for i in range(int(path.ends_in_pure_noise()), steps):
        changed = moved(theta, i)
        before = runs.evaluations, model.samples
        replayed, its_log = runs(changed, log)
        before_that = sum(asked[:i]) - (i > 0 and asked[i - 1] == 2)  # the second question is about the level below
        expected = m * (sum(asked) - before_that)
        if i > 1 or not path.ends_in_pure_noise():
            assert expected == m * ((2 if solver == "heun" else 1) * (steps - i) - (solver == "heun" and i == 0))
        assert runs.evaluations - before[0] == model.samples - before[1] == expected
        fresh, fresh_log = runs(changed)
        assert torch.equal(replayed, fresh)
        assert not torch.equal(replayed, x)
        assert len(its_log) == len(fresh_log)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(its_log, fresh_log, strict=True))


@on_every_solver
def test_a_replay_of_the_same_levels_asks_nothing_and_of_its_own_log_nothing_again(solver):
    runs = Runs(ring(), solver, noise(6, 2))
    theta = GRID.angles(6)[:-1]
    x, log = runs(theta)
    again, second = runs(theta, log)
    assert torch.equal(again, x)
    third, _ = runs(theta, second)
    assert torch.equal(third, x)
    assert runs.evaluations == 6 * evaluations_of(solver, 6)


def test_a_level_that_comes_back_after_a_change_is_asked_again():
    # the times after the changed one are the same, but not the places
    runs = Runs(ring(), "euler", noise(6, 2))
    theta = GRID.angles(6)[:-1]
    _, log = runs(theta)
    before = runs.evaluations
    x, _ = runs(moved(theta, 2), log)
    assert runs.evaluations - before == 6 * 4
    assert torch.equal(x, runs(moved(theta, 2))[0])


@on_every_solver
def test_a_log_of_fewer_or_more_levels_is_replayed_as_far_as_it_agrees(solver):
    runs = Runs(ring(), solver, noise(4, 2))
    theta = GRID.angles(7)[:-1]
    for first, second in ((theta[:4], theta), (theta, theta[:4])):
        _, log = runs(first)
        assert torch.equal(runs(second, log)[0], runs(second)[0])


def test_an_empty_log_replays_nothing():
    runs = Runs(ring(), "euler", noise(4, 2))
    theta = GRID.angles(3)[:-1]
    assert torch.equal(runs(theta, [])[0], runs(theta)[0])


# --- runs -------------------------------------------------------------------------------------------------------------


@on_every_solver
@pytest.mark.parametrize("path", [VE(), VP(), Linear()], ids=["VE", "VP", "Linear"])
def test_a_run_is_the_solve_of_the_same_levels(solver, path):
    model, z = ring(path=path), noise(5, 2)
    schedule = log_linear(path.sigma_min, min(path.sigma_max, 80.0))
    theta = schedule.angles(6)[:-1]
    if path.ends_in_pure_noise():
        theta[0] = math.pi / 2
    times = torch.cat([path.time(theta), torch.zeros(1, dtype=torch.float64)])
    there = solve(model, path.sigma(times[0]) * z, times, solver)
    runs = Runs(model, solver, z)
    assert torch.equal(runs(theta)[0], there.x)
    assert runs.evaluations == 5 * there.evaluations


@pytest.mark.parametrize("size", [1, 7, 20, 64])
def test_the_size_of_batches_changes_nothing_but_how_many_go_at_once(size):
    model, z = Counting(ring()), noise(20, 2)
    label = {"label": torch.arange(3)}
    theta, seen = GRID.angles(5)[:-1], []
    runs = Runs(model, "dpmpp_2m", z, batch_size=size, tick=seen.append)
    torch.testing.assert_close(runs(theta)[0], Runs(ring(), "dpmpp_2m", z)(theta)[0], rtol=1e-12, atol=1e-12)
    assert runs.evaluations == model.samples == sum(seen) == 100
    assert model.most == max(seen) == min(size, 20)
    dealt = Runs(ByLabel(), "euler", z, label, batch_size=size)(theta)[0]
    torch.testing.assert_close(dealt[:, 0], 1000 * (torch.arange(20) % 3).double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [7, 64])
def test_the_size_of_batches_does_not_change_the_reference(size):
    z, seen = noise(20, 2), []
    model = Counting(ring())
    one, other = reference(model, z, batch_size=size, tick=seen.append), reference(ring(), z)
    torch.testing.assert_close(one.ends, other.ends, rtol=1e-12, atol=1e-12)
    for a, b in zip(one.bending, other.bending, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert one.evaluations == other.evaluations == model.samples == sum(seen) == 20 * 48
    assert model.most == min(size, 20)


def test_trajectories_are_held_in_parts_that_fit_and_give_the_same(monkeypatch):
    z, label = noise(20, 2), {"label": torch.arange(7)}
    whole, labelled = reference(ring(), z), reference(ByLabel(), z, label)
    monkeypatch.setattr(endpoint, "MEMORY", 48 * 2 * 6)  # six noises' trajectories
    model = Counting(ring())
    parts = reference(model, z)
    assert model.most == 6
    assert parts.evaluations == whole.evaluations
    torch.testing.assert_close(parts.ends, whole.ends, rtol=1e-12, atol=1e-12)
    for a, b in zip(parts.bending, whole.bending, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(reference(ByLabel(), z, label).ends, labelled.ends, rtol=1e-12, atol=0)
    monkeypatch.setattr(endpoint, "MEMORY", 1)  # less than one
    torch.testing.assert_close(reference(ring(), z[:3]).ends, whole.ends[:3], rtol=1e-12, atol=1e-12)


@on_every_path
def test_the_error_of_denoising_its_own_ends_is_a_gaussians_closed_form_on_every_path(path):
    known = reference(gaussian(path), noise(2048))
    errors = denoising_errors(gaussian(path), known, draws=2048)
    s = torch.tan(known.theta)
    torch.testing.assert_close(errors, 3 * (STD * s) ** 2 / (STD**2 + s**2), rtol=0.08, atol=0)


@pytest.mark.parametrize("size", [7, 512])
def test_denoising_deals_out_the_conditions_of_the_ends_and_counts(size):
    label, seen = {"label": torch.arange(3)}, []
    known = reference(ByLabel(), noise(20), label, levels=5)
    model = Counting(ByLabel())
    errors = denoising_errors(model, known, 8, label, size, seen.append)
    assert errors.shape == (5,)
    assert float(errors.max()) < 1e-6  # a million with another's label
    assert model.samples == sum(seen) == 5 * 8
    assert model.most == min(size, 40)


@on_every_path
def test_a_reference_costs_its_levels_for_every_noise_and_one_more_from_pure_noise(path):
    model = Counting(gaussian(path))
    known = reference(model, noise(6), levels=30)
    assert known.evaluations == model.samples == 6 * (30 + path.ends_in_pure_noise())


def test_both_halves_of_guidance_are_counted():
    class Labelled(Counting):
        def forward(self, x, t, cond=None):
            assert cond["label"].shape == (len(x),)
            return super().forward(x, t)

    counting = Labelled(gaussian())
    guided = Guided(counting, 2.0, {"label": torch.tensor([0.0])})
    known = reference(guided, noise(5), {"label": torch.ones(5)}, levels=10)
    assert known.evaluations == counting.samples == 2 * 5 * 10
    runs = Runs(guided, "heun", noise(5), {"label": torch.ones(5)})
    runs(GRID.angles(4)[:-1])
    assert runs.evaluations == counting.samples - 100 == 2 * 5 * 7


def test_no_gradient_is_asked_for():
    def net(x, t):
        assert not torch.is_grad_enabled()
        return 0.5 * x

    model = Pretrained(net, VE(), "x0")
    z = noise(3, 2)
    reference(model, z, levels=6)
    Runs(model, "heun", z)(GRID.angles(3)[:-1])


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1, 3, 7, 20])
def test_conditions_are_dealt_out_in_turn(given):
    rows = torch.arange(20)
    label = torch.arange(given, dtype=torch.float64) + 1
    dealt = deal({"label": label}, rows)["label"]
    assert dealt.tolist() == [i % given + 1 for i in range(20)]
    assert deal({"label": label}, rows[13:16])["label"].tolist() == [i % given + 1 for i in (13, 14, 15)]
    for size in (4, 512):
        known = reference(ByLabel(), noise(20, 2), {"label": label}, batch_size=size)
        torch.testing.assert_close(known.ends[:, 1], 1000 * dealt, rtol=1e-9, atol=0)


@pytest.mark.parametrize("cond", [None, {}])
def test_no_condition_is_dealt_as_none(cond):
    assert deal(cond, torch.arange(3)) is None


# --- errors -----------------------------------------------------------------------------------------------------------


def test_the_endpoint_error_of_one_euler_step_is_a_gaussians_closed_form():
    model, z = gaussian(), noise(50)
    ends = MEAN + STD * amplitude(z, model.path)
    one = MEAN + STD**2 * (80 * z - MEAN) / (STD**2 + 80**2)
    expected = float((one - ends).square().mean())
    got = mean_square(Runs(model, "euler", z), torch.atan(torch.tensor([80.0], dtype=torch.float64)), ends)
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_the_endpoint_error_of_a_run_that_overflows_is_infinite(value):
    broken = Pretrained(lambda x, t: x * 0 + value, VE(), "x0")
    theta = GRID.angles(3)[:-1]
    assert mean_square(Runs(broken, "euler", noise(4)), theta, noise(4)) == math.inf


@pytest.mark.parametrize("solver", sorted(STOCHASTIC))
def test_a_stochastic_solver_has_no_end_to_compare(solver):
    with pytest.raises(ValueError, match=f"{solver} has no end to compare.*deterministic"):
        Runs(ring(), solver, noise(4, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 19])
def test_trajectories_that_are_not_finite_are_refused_with_what_to_do(value, row):
    # one bad sample, at the cleanest levels only, among many good ones
    z = noise(20, 2)
    cleanest = float(VE().time(math.atan(0.003)))

    def net(x, t):
        y = 0.5 * x
        if float(t[0]) < cleanest and len(x) > row:
            y = y.clone()
            y[row] = value
        return y

    with pytest.raises(ValueError, match=r"trajectories are not finite.*sigma_min"):
        reference(Pretrained(net, VE(), "x0"), z)
    known = reference(Pretrained(net, VE(), "x0"), z, sigma_min=0.01)
    assert bool(torch.isfinite(known.ends).all())


LIMITS = {
    "zero": ({"sigma_min": 0.0}, "got 0 and 80"),
    "upside down": ({"sigma_min": 90.0}, "got 90 and 80"),
    "negative": ({"sigma_max": -1.0}, "got 0.002 and -1"),
    "not a number": ({"sigma_max": math.nan}, "got 0.002 and nan"),
    "infinite": ({"sigma_max": math.inf}, "got 0.002 and inf"),
    "beyond the model": ({"sigma_max": 81.0}, "81 is beyond the model's noisiest level, 80"),
}


@pytest.mark.parametrize(("given", "says"), LIMITS.values(), ids=LIMITS.keys())
def test_levels_that_are_no_range_of_the_model_are_refused_before_it_is_asked(given, says):
    model = Counting(ring())
    with pytest.raises(ValueError, match=says):
        reference(model, noise(4, 2), **given)
    assert model.samples == 0


def test_a_level_that_people_have_rounded_up_is_the_models_own():
    path = Tabulated((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
    assert level_range(ring(path=path), None, 14.62) == (path.sigma_min, path.sigma_max)
    assert path.sigma_max < 14.62
    learned = tailor(ring(path=path), "euler", [4], sigma_max=14.62, noises=64, budget=8000)
    for n in (4, 7):
        assert float(learned.times(path, n)[0]) == pytest.approx(1.0)


def test_a_path_that_ends_in_pure_noise_may_be_learned_on_beyond_its_nominal_range():
    assert level_range(ring(path=Linear()), None, 500.0) == (0.002, 500.0)
    known = reference(gaussian(Linear()), noise(8), levels=60, sigma_max=500.0)
    torch.testing.assert_close(known.ends, MEAN + STD * noise(8), rtol=0, atol=2e-3)


def test_single_precision_noises_give_the_same_reference():
    z = noise(16, 2)
    one, two = reference(ring(), z.float()), reference(ring(), z)
    assert one.ends.dtype == torch.float32
    assert isinstance(one, Reference)
    torch.testing.assert_close(one.ends.double(), two.ends, rtol=0, atol=1e-3)
    costs = [local_error_costs(known.bending, p) for known in (one, two) for p in (1, 2)]
    for a, b in ((costs[0], costs[2]), (costs[1], costs[3])):
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-4 * float(b.max()))
