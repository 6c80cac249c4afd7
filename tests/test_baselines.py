"""Every peer on a case with a known answer, and its bill."""

import math
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import beta as beta_distribution

from fewstep import schedule
from fewstep.baselines import PEERS, Problem, ays, cheapest, entropic, fit, gits, klub, ld3, oss
from fewstep.denoiser import Denoiser, OnPath
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP
from fewstep.solvers import solve

LOW, HIGH = 0.002, 80.0


def problem(
    denoiser: Denoiser, steps: int, solver: str = "euler", low: float = LOW, high: float = HIGH, n: int = 512
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    path = VE(low, high)
    x0 = denoiser.sample(2000, generator, torch.float64)
    noise = path.start(n, x0.shape[1:], generator, dtype=torch.float64)
    return Problem(OnPath(denoiser, path), solver, steps, x0, noise, generator)


def gaussian(std: float = 1.0, dimensions: int = 2) -> Mixture:
    return Mixture(torch.zeros(1, dimensions), std)


def endpoints(p: Problem, sigmas: torch.Tensor) -> torch.Tensor:
    return solve(p.denoiser, p.noise, p.denoiser.path.time(torch.atan(sigmas)), p.solver).x


QUICK = {"ld3": partial(ld3, noises=20, epochs=2), "oss": partial(oss, levels=30), "ays": partial(ays, sweeps=1)}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("steps", [2, 5])
def test_every_peer_gives_a_grid(name, steps):
    p = problem(ring(), steps)
    sigmas, evaluations, gradients = fit(QUICK.get(name, name), p)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float64
    assert not sigmas.requires_grad
    assert float(sigmas[0]) == pytest.approx(HIGH)
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[-1]) == 0
    assert float(sigmas[-2]) >= LOW - 1e-12
    model_free = not name.startswith(("entropic", "corrector", "predictor", "ays", "gits", "oss", "ld3"))
    assert (evaluations == 0) == model_free
    assert (gradients > 0) == name.startswith(("ld3", "predictor"))


def test_same_seed_same_grid():
    for name in ("ays", "entropic", "ld3"):
        once, again = (fit(QUICK.get(name, name), problem(ring(), 4)).sigmas for _ in range(2))
        assert torch.equal(once, again), name


def test_what_each_costs():
    p = problem(ring(), 6)
    assert fit("gits_l2", p)[1:] == (256 * 60, 0)
    assert fit(partial(oss, levels=20, noises=10), p)[1:] == (10 * (20 + 1 + 19 + 18 + 17 + 16 + 15), 0)
    assert fit("entropic", p)[1:] == (100 * 64, 0)
    assert fit("corrector", p)[1:] == (2 * 99 * 64, 0)
    assert fit("predictor", p)[1:] == (3 * 2 * 99 * 64, 3 * 99 * 64)
    one_sweep, look = 5 * 2 * 12 * 2 * 8, 6 * 2 * 64
    assert fit(partial(ays, draws=8, sweeps=1), p)[1:] == (one_sweep + look, 0)
    spent = fit(partial(ld3, noises=30, epochs=3, batch=10, teacher=16), p)
    starts = len(schedule.NAMED)
    assert spent[1:] == (60 * 31 + 30 * 6 * (starts + 3 + 3), 30 * 6 * 3)


def test_wrong_problems_say_so():
    p = problem(ring(), 6)
    with pytest.raises(ValueError, match="peer must be one of"):
        fit("karas", p)
    with pytest.raises(ValueError, match="wrap it in OnPath"):
        Problem(ring(path=VP()), "euler", 6, p.x0, p.noise)
    with pytest.raises(ValueError, match="steps must be"):
        problem(ring(), 1)
    with pytest.raises(ValueError, match="starting points"):
        fit("gits_l1", problem(ring(), 6, n=10))
    with pytest.raises(ValueError, match="half of them held out"):
        fit("ld3", problem(ring(), 6, n=10))
    with pytest.raises(ValueError, match="deterministic"):
        fit("ld3", problem(ring(), 6, "ancestral"))


# --- without the model --------------------------------------------------------------------------------------------


def test_karras_is_the_formula():
    for name, rho in (("karras", 7), ("karras3", 3)):
        expected = np.linspace(HIGH ** (1 / rho), LOW ** (1 / rho), 8) ** rho
        np.testing.assert_allclose(fit(name, problem(ring(), 8)).sigmas[:-1], expected, rtol=1e-5)
        np.testing.assert_allclose(fit(f"{name}_to_data", problem(ring(), 7)).sigmas[:-1], expected[:-1], rtol=1e-5)


def test_beta_against_scipy():
    p = problem(ring(), 7)
    t_high, t_low = (float(VP().time(math.atan(level))) for level in (HIGH, LOW))
    quantiles = beta_distribution(0.6, 0.6).ppf(np.linspace(1, 0, 7))
    np.testing.assert_allclose(fit("beta", p).sigmas[:-1], VP().ratio(t_low + quantiles * (t_high - t_low)), rtol=1e-6)


def test_beyond_the_linear_beta_path_beta_keeps_the_range():
    assert float(fit("beta", problem(ring(), 4, high=500.0)).sigmas[0]) == pytest.approx(500)


# --- from the denoising error -------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_entropic_time_of_a_gaussian(std):
    sigmas = fit(partial(entropic, draws=1000), problem(gaussian(std, 4), 8)).sigmas[:-1]
    entropy = (std**2 * sigmas**2 / (std**2 + sigmas**2)).log() / 2
    falls = -entropy.diff()
    assert float((falls / falls.mean() - 1).abs().max()) < 0.02


def test_rescaled_entropic_time_of_a_unit_gaussian_is_kl_optimal():
    p = problem(gaussian(1.0, 4), 8)
    angles = torch.atan(fit(partial(entropic, rescaled=True, draws=1000), p).sigmas)
    torch.testing.assert_close(angles, torch.atan(fit("kl_optimal", p).sigmas), atol=0.02, rtol=0)


def exact_klub(levels: np.ndarray, std: float, dimensions: int) -> np.ndarray:
    """E|D(x_t) - D(x_s)|^2 = mmse(s) - mmse(t), since D(x_s) = E[D(x_t) | x_s]."""

    def mmse(t: float) -> float:
        return dimensions * std**2 * t**2 / (std**2 + t**2)

    def step(s: float, low: float) -> float:
        # in log t, over which the integrand is tame
        return quad(lambda v: (mmse(s) - mmse(math.exp(v))) * math.exp(-2 * v), math.log(low), math.log(s), limit=200)[0]

    return np.array([step(s, low) for s, low in pairwise(levels)])


def test_klub_of_a_gaussian():
    p = problem(gaussian(0.7, 3), 6)
    levels = fit("karras", p).sigmas[:-1]
    estimate = klub(p, levels[:-1], levels[1:], draws=20000)
    np.testing.assert_allclose(estimate, exact_klub(levels.numpy(), 0.7, 3), rtol=0.05)


def test_ays_finds_the_minimum_of_the_bound_of_a_gaussian():
    low, high, steps = 0.05, 20.0, 4
    p = problem(gaussian(1.0, 4), steps, low=low, high=high)

    def bound(inner: np.ndarray) -> float:
        levels = np.r_[high, np.exp(inner), low]
        return exact_klub(levels, 1.0, 4).sum() if (np.diff(levels) < 0).all() else np.inf

    start = np.log(np.geomspace(high, low, steps + 1)[1:-1])
    least = minimize(bound, start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-4}).fun
    unstopped = fit(partial(ays, draws=256, tolerance=-1.0, sweeps=20), p).sigmas
    assert bound(unstopped[1:-1].log().numpy()) < 1.02 * least
    kl_optimal = bound(fit("kl_optimal_to_data", p).sigmas[1:-1].log().numpy())
    assert kl_optimal > 1.2 * least  # that one is the optimum for Euler's deterministic steps, not of this bound


def test_ays_halves_its_ten_steps_where_more_are_wanted():
    p = problem(ring(), 13)
    sigmas, evaluations, _ = fit(partial(ays, draws=4, sweeps=1), p)
    assert sigmas.shape == (14,)
    assert evaluations == sum((n - 1) * 2 * 12 * 2 * 4 + n * 2 * 32 for n in (10, 20))


# --- from a teacher's trajectories --------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 1.15])
def test_cheapest_against_all_subsets(gamma, generator):
    size, steps = 9, 4
    cost = torch.rand(size, size, generator=generator, dtype=torch.float64).triu(1)
    cost[torch.ones(size, size).tril() > 0] = math.inf
    ways = [(0, *inner, size - 1) for inner in combinations(range(1, size - 1), steps - 1)]
    best = min(ways, key=lambda way: sum(gamma**k * float(cost[i, j]) for k, (i, j) in enumerate(pairwise(way))))
    assert tuple(cheapest(cost, steps, gamma).tolist()) == best


@pytest.mark.parametrize("norm", [1, 2])
def test_gits_against_all_subsets(norm):
    p = problem(ring(), 3)
    sigmas = schedule.karras(LOW, HIGH).sigmas(8)
    points = solve(p.denoiser, p.noise[:64], p.denoiser.path.time(torch.atan(sigmas)), keep_trajectory=True).trajectory

    def cost(i: int, j: int) -> float:
        jump = sigmas[[i, j]]
        landed = solve(p.denoiser, points[i], p.denoiser.path.time(torch.atan(jump))).x
        return float(torch.linalg.vector_norm(landed - points[j], ord=norm, dim=1).mean())

    ways = [(0, i, j, 8) for i, j in combinations(range(1, 8), 2)]
    best = min(ways, key=lambda way: sum(1.15**k * cost(*step) for k, step in enumerate(pairwise(way))))
    chosen = fit(partial(gits, norm=norm, levels=8, noises=64), p).sigmas
    torch.testing.assert_close(chosen, sigmas[list(best)])


@pytest.mark.parametrize("peer", [partial(gits, norm=2), oss])
def test_with_all_of_the_teachers_steps_the_student_is_the_teacher(peer):
    p = problem(ring(), 9)
    torch.testing.assert_close(fit(partial(peer, levels=9, noises=32), p).sigmas, schedule.karras(LOW, HIGH).sigmas(9))


def test_oss_of_two_steps_against_all_subsets():
    p = problem(ring(), 2, n=32)
    sigmas = schedule.karras(LOW, HIGH).sigmas(15)
    target = endpoints(p, sigmas)
    errors = [float(((endpoints(p, sigmas[[0, i, 15]]) - target) ** 2).mean()) for i in range(1, 15)]
    chosen = fit(partial(oss, levels=15, noises=32), p).sigmas
    torch.testing.assert_close(chosen[1], sigmas[1 + int(np.argmin(errors))])


def test_oss_of_more_steps_against_a_plain_forward_search():
    p, levels, steps = problem(ring(), 4, n=16), 10, 4
    sigmas = schedule.karras(LOW, HIGH).sigmas(levels)
    times = p.denoiser.path.time(torch.atan(sigmas))
    points = solve(p.denoiser, p.noise, times, keep_trajectory=True).trajectory
    ways = {0: (0,)}  # to each level, the student's best way of k steps
    for _ in range(steps):

        def error(way: tuple[int, ...]) -> float:
            return float(((solve(p.denoiser, p.noise, times[list(way)]).x - points[way[-1]]) ** 2).mean())

        longer = [(*way, j) for i, way in ways.items() for j in range(i + 1, levels + 1) if i < levels]
        ways = {j: min((way for way in longer if way[-1] == j), key=error) for j in {way[-1] for way in longer}}
    torch.testing.assert_close(fit(partial(oss, levels=levels, noises=16), p).sigmas, sigmas[list(ways[levels])])


def test_oss_beats_gits_at_the_endpoint():
    p = problem(ring(), 6)
    target = endpoints(p, schedule.karras(LOW, HIGH).sigmas(300))
    errors = {name: float((endpoints(p, fit(name, p).sigmas) - target).norm()) for name in ("karras", "gits_l2", "oss")}
    assert errors["oss"] < errors["gits_l2"] < errors["karras"]


# --- through the solver -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("std", [0.5, 1.0])
def test_ld3_of_a_gaussian_takes_equal_angles(steps, std):
    """Euler multiplies x by cos(theta_i - theta_i+1) cos(theta_i)/cos(theta_i+1), sigma = std tan(theta), so the endpoint is
    nearest where the product of cos(theta_i - theta_i+1) is largest: at equal steps down to 0."""
    p = problem(gaussian(std), steps)
    sigmas = fit(partial(ld3, teacher=200), p).sigmas
    equal = std * torch.tan(math.atan(HIGH / std) * torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    torch.testing.assert_close(sigmas, equal, rtol=0.02, atol=1e-9)
    exact = p.noise * std / math.hypot(std, HIGH)

    def error(inner: np.ndarray) -> float:
        levels = torch.from_numpy(np.r_[HIGH, np.exp(inner), 0])
        return float(((endpoints(p, levels) - exact) ** 2).mean()) if bool((levels.diff() < 0).all()) else np.inf

    least = minimize(error, np.linspace(1, -1, steps - 1), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).fun
    assert error(sigmas[1:-1].log().numpy()) < 1.01 * least


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc", "deis", "ipndm"])
def test_ld3_lowers_the_endpoint_error_on_fresh_noise(solver):
    p = problem(ring(), 5, solver)
    learned = fit(partial(ld3, noises=50, epochs=8, batch=25), p).sigmas
    fine = schedule.karras(LOW, HIGH).sigmas(100)
    target = solve(p.denoiser, p.noise, p.denoiser.path.time(torch.atan(fine)), "heun").x
    fresh = slice(100, None)
    named = [fit(f"{name}_to_data", p).sigmas for name in ("karras", "log_linear", "kl_optimal", "linear")]
    errors = [float(((endpoints(p, sigmas) - target)[fresh] ** 2).sum(1).mean()) for sigmas in (learned, *named)]
    assert errors[0] < min(errors[1:])
