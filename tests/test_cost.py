import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import cost
from fewstep.cost import (
    PREDICTOR_ORDERS,
    controls,
    corrector_costs,
    data_moments,
    draws_until,
    predictor_costs,
)
from fewstep.denoiser import Denoiser, Pretrained, to_score
from fewstep.mixture import Mixture, ring
from fewstep.path import VE
from fewstep.schedule import equalise, karras, linear, log_linear
from fewstep.solvers import solve

BIMODAL = Mixture([[-1.0], [1.0]], 0.3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(sigmas, path=BIMODAL.path) -> Tensor:
    return path.time(torch.atan(torch.as_tensor(sigmas, dtype=torch.float64)))


def several(dim: int) -> Mixture:
    """Five Gaussians of unequal widths, close enough to overlap."""
    means = 2 * torch.randn(5, dim, generator=seeded(dim), dtype=torch.float64)
    return Mixture(means, 0.4 + 0.3 * torch.rand(5, dim, generator=seeded(1), dtype=torch.float64))


def line(mixture: Mixture, sigma: float, points: int = 801) -> Tensor:
    reach = 2 + 7 * math.hypot(sigma, 0.3)
    return torch.linspace(-reach, reach, points, dtype=torch.float64)[:, None]


def cost_by_quadrature(model: Denoiser, law: Mixture, high: float, low: float, solver: str = "euler") -> float:
    """The predictor cost of a 1-D step without Monte Carlo."""
    x = line(law, high)
    difference = cost._Step(model, x, at([high, low]), solver, None).dense_difference()[:, 0]
    return low**2 * float(torch.trapezoid(law.log_prob(x, at(high)).exp() * difference**2, x[:, 0]))


# --- truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "low"), [(60.0, 50.0), (1.0, 0.8), (0.3, 0.1), (0.01, 0.004)])
@pytest.mark.parametrize("probes", [None, 2, 4])
def test_a_gaussians_euler_step_has_its_closed_form_cost(high, low, probes):
    gaussian = Mixture(torch.zeros(1, 4), 0.5)
    data = gaussian.sample(20_000, seeded(0), torch.float64)
    each = predictor_costs(gaussian, data, at([high, low]), 20_000, 20_000, probes=probes, generator=seeded(1)).each
    shrink = 1 - high * (high - low) / (0.25 + high**2)  # F(x) = shrink x
    after = shrink**2 * (0.25 + high**2)
    exact = 4 * low**2 * (1 / (0.25 + low**2) - 1 / after) ** 2 * after
    assert each.shape == (1, 20_000)
    assert each.dtype == torch.float64
    assert float(each.mean()) == pytest.approx(exact, rel=6 * math.sqrt(2 / 4 / 20_000))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("high", "low"), [(20.0, 15.0), (1.5, 1.2), (0.6, 0.5), (0.3, 0.25), (0.05, 0.03)])
def test_the_difference_of_scores_is_that_of_the_law_after_the_step(solver, high, low):
    times = at([high, low])
    x = line(BIMODAL, high, 20_001)
    y = solve(BIMODAL, x, times, solver).x
    order = y[:, 0].numpy()
    assert (np.diff(order) > 0).all()
    density = BIMODAL.log_prob(x, times[0]).numpy() - np.log(np.gradient(order, x[:, 0].numpy()))  # change of variables
    pushed = np.gradient(density, order)
    truth = to_score(BIMODAL(y, times[1]), y, BIMODAL.path, times[1])[:, 0].numpy() - pushed
    found = cost._Step(BIMODAL, x, times, solver, None).dense_difference()[:, 0].numpy()
    inside = slice(500, -500)
    # the second term: the error of the finite differences
    np.testing.assert_allclose(found[inside], truth[inside], atol=0.003 * np.abs(found).max() + 1e-5 * np.abs(pushed).max())


def test_the_draws_average_to_the_integral():
    data = BIMODAL.sample(50_000, seeded(0), torch.float64)
    for high, low in ((5.0, 4.0), (0.8, 0.7), (0.2, 0.17)):
        each = predictor_costs(BIMODAL, data, at([high, low]), 50_000, 50_000, generator=seeded(1)).each[0]
        error = float(each.std()) / math.sqrt(50_000)
        assert abs(float(each.mean()) - cost_by_quadrature(BIMODAL, BIMODAL, high, low)) < 4 * error


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_costs_fall_with_the_power_of_the_step_that_the_order_says(solver):
    steps = np.geomspace(0.02, 0.1, 5)
    for sigma in (10.0, 1.0, 0.4):
        costs = [cost_by_quadrature(BIMODAL, BIMODAL, sigma, sigma * math.exp(-h), solver) for h in steps]
        slope = np.polyfit(np.log(steps), np.log(costs), 1)[0]
        assert slope == pytest.approx(PREDICTOR_ORDERS[solver], abs=0.35)


# --- iterative solves and probes against the dense Jacobian -----------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("dim", [2, 6, 16])
def test_iterative_solves_with_as_many_probes_as_dimensions_reproduce_the_dense_jacobian(dim, solver):
    mixture = several(dim)
    data = mixture.sample(500, seeded(0), torch.float64)
    for sigma in (60.0, 5.0, 1.0, 0.2, 0.01):
        dense, probed = (
            predictor_costs(mixture, data, at([sigma, 0.85 * sigma]), 64, 64, solver, probes, generator=seeded(2)).each
            for probes in (None, dim)
        )
        torch.testing.assert_close(probed.mean(), dense.mean(), rtol=0.005, atol=0)


def test_fewer_probes_stay_within_five_percent_of_the_dense_jacobian():
    mixture = several(16)
    data = mixture.sample(5000, seeded(0), torch.float64)
    for sigma in (60.0, 0.3, 0.1, 0.01):
        dense, probed = (
            predictor_costs(mixture, data, at([sigma, 0.85 * sigma]), 1500, 1500, probes=probes, generator=seeded(2)).each[0]
            for probes in (None, 8)
        )
        assert float((probed - dense).std()) / math.sqrt(1500) < 0.02 * float(dense.mean())
        assert float(probed.mean()) == pytest.approx(float(dense.mean()), rel=0.05)


def test_the_probes_noise_does_not_bias_the_square():
    mixture = several(8)
    times = at([1.0, 0.85])
    x = mixture.path.noised(mixture.sample(20, seeded(0), torch.float64), torch.zeros(20, 8), times[0]) + 0.7
    dense = (cost._Step(mixture, x, times, "euler", None).dense_difference() ** 2).sum(1)
    z = torch.linalg.qr(torch.randn(20 * 2000, 8, 2, generator=seeded(3), dtype=torch.float64))[0]
    one, other = cost._Step(mixture, x.repeat_interleave(2000, 0), times, "euler", None).probed_differences(z)
    plain = (((one + other) / 2) ** 2).sum(1).reshape(20, 2000)
    freed = plain - (1 - 2 / 8) * (((one - other) / 2) ** 2).sum(1).reshape(20, 2000)
    assert (plain.mean(1) > 1.25 * dense).any()  # what it would be off by otherwise
    assert (((freed.mean(1) - dense) / (freed.std(1) / math.sqrt(2000))).abs() < 4.5).all()


def test_the_solves_use_the_transpose():
    matrix = torch.eye(5, dtype=torch.float64) + 0.3 * torch.randn(5, 5, generator=seeded(4), dtype=torch.float64)
    score = Pretrained(lambda x, t: x @ matrix.T, VE(), "score")  # its derivative is not symmetric
    data = torch.randn(100, 5, generator=seeded(5), dtype=torch.float64)
    for sigma, solver in ((0.5, "euler"), (0.5, "heun"), (0.1, "euler")):
        dense, probed = (
            predictor_costs(score, data, at([sigma, 0.9 * sigma]), 50, 50, solver, probes, generator=seeded(6)).each
            for probes in (None, 2)
        )
        torch.testing.assert_close(probed, dense, rtol=1e-3, atol=1e-9)


# --- equalising -------------------------------------------------------------------------------------------------------


def quadrature_costs(theta: Tensor, model: Denoiser = BIMODAL) -> Tensor:
    sigma = torch.tan(theta).tolist()
    return torch.tensor([cost_by_quadrature(model, BIMODAL, *pair) for pair in pairwise(sigma)])


def unevenness(costs: Tensor, order: float = 4) -> float:
    """The coefficient of variation of the step lengths."""
    lengths = costs ** (1 / order)
    return float(lengths.std() / lengths.mean())


@pytest.mark.parametrize("start", [log_linear, karras, linear], ids=lambda f: f.__name__)
def test_equalising_with_the_right_exponent_converges_from_any_start(start):
    theta = start(0.05, 20.0).angles(80)[:-1]
    spread = []
    for _ in range(4):
        costs = quadrature_costs(theta)
        spread.append(unevenness(costs))
        theta = equalise(theta, costs, order=PREDICTOR_ORDERS["euler"])
    assert spread[0] > 0.3
    assert spread[-1] < 0.007


def test_the_square_root_oscillates_and_damping_or_the_right_exponent_cures_it():
    spread = {}
    for name, order, keep in (("square root", 2, 0.0), ("damped", 2, 0.5), ("right", 4, 0.0)):
        theta = log_linear(0.05, 20.0).angles(40)[:-1]
        for _ in range(12):
            costs = quadrature_costs(theta)
            new = equalise(theta, costs, order=order)
            theta = torch.atan(torch.exp((1 - keep) * torch.tan(new).log() + keep * torch.tan(theta).log()))
        spread[name] = unevenness(quadrature_costs(theta))
    assert spread["square root"] > 0.1
    assert spread["damped"] < 0.02
    assert spread["right"] < 0.01


class Inconsistent(Denoiser):
    """Like a learned network: its scores at two levels are not those of one diffusing density."""

    path = BIMODAL.path

    def forward(self, x, t, cond=None):
        sigma = self.path.sigma(t)
        return BIMODAL(x, t) + 0.1 * sigma**2 / (1 + sigma**2) * torch.sin(3 * sigma.log()) * torch.cos(x)


def test_an_inconsistent_score_costs_order_two_whatever_the_solver_and_the_solvers_order_still_converges():
    steps = np.geomspace(0.002, 0.01, 4)
    for solver in ("euler", "heun"):
        costs = [cost_by_quadrature(Inconsistent(), BIMODAL, 0.7, 0.7 * math.exp(-h), solver) for h in steps]
        assert np.polyfit(np.log(steps), np.log(costs), 1)[0] == pytest.approx(2, abs=0.2)
    # unevenness shrinks by |1 - true order/order used| per round: 1/2 here, where the solver's order is 4
    theta = log_linear(0.3, 2.0).angles(60)[:-1]
    spread = []
    for _ in range(8):
        costs = quadrature_costs(theta, Inconsistent())
        spread.append(unevenness(costs, 2))
        theta = equalise(theta, costs, order=4)
    assert spread[-1] < spread[0] / 10


# --- networks ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, x, t):
        heads = x.reshape(len(x), 1, 4, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).reshape(x.shape) / (1 + t[:, None] ** 2)


@pytest.mark.parametrize("probes", [None, 8])
def test_networks_with_attention_have_the_second_derivative_that_is_needed(probes):
    data = torch.randn(30, 8, generator=seeded(0))
    model = Pretrained(Attention(), VE(), "x0", VE().ratio)
    found = predictor_costs(model, data, at([1.0, 0.9, 0.8]), 16, 16, probes=probes, generator=seeded(1))
    exact = predictor_costs(model, data.double(), at([1.0, 0.9, 0.8]), 16, 16, generator=seeded(1))
    assert torch.isfinite(found.each).all()
    assert (found.each > 0).all()
    assert found.each.mean() == pytest.approx(float(exact.each.mean()), rel=0.8)  # other draws


class Telling(Denoiser):
    """Counts the samples, and refuses a condition that is another datum's."""

    path = VE()

    def __init__(self):
        super().__init__()
        self.samples = 0

    def forward(self, x, t, cond=None):
        self.samples += len(x)
        assert torch.equal((x[:, 0] / 1000).round(), cond["label"])
        return 1000 * cond["label"][:, None] + torch.sin(x - 1000 * cond["label"][:, None]) / 2


def test_conditions_follow_their_data_and_passes_are_counted():
    label = torch.arange(20, dtype=torch.float64)
    model = Telling()
    data = 1000 * label[:, None].expand(20, 3)
    found = predictor_costs(model, data, at([1.0, 0.9, 0.8]), 10, 4, cond={"label": label}, generator=seeded(0))
    assert found.each.shape == (2, 10)
    assert model.samples == 2 * 2 * 10
    assert found.evaluations == 2 * 10 * (2 + 3 + 1)  # two forward, a row of J each, and the determinant's gradient


def test_batches_do_not_bias_and_the_generator_repeats():
    data = BIMODAL.sample(1000, seeded(0), torch.float64)
    runs = [
        predictor_costs(BIMODAL, data, at([0.8, 0.7]), 4000, size, generator=seeded(1)).each[0] for size in (4000, 4000, 33)
    ]
    assert torch.equal(runs[0], runs[1])
    error = math.hypot(float(runs[0].std()), float(runs[2].std())) / math.sqrt(4000)
    assert abs(float(runs[0].mean() - runs[2].mean())) < 4 * error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"solver": "dpmpp_2m"}, "one-step deterministic one, euler, ddim, heun; got 'dpmpp_2m'"),
        ({"solver": "ancestral"}, "one-step"),
        ({"probes": 3}, "must be even"),
        ({"probes": 6}, "to the dimension 4"),
        ({"probes": 0}, "from 2"),
    ],
)
def test_what_has_no_predictor_cost_is_refused(arguments, says):
    mixture = several(4)
    with pytest.raises(ValueError, match=says):
        predictor_costs(mixture, mixture.sample(10, seeded(0)), at([1.0, 0.9]), 4, 4, **arguments)


def test_a_solve_that_does_not_converge_is_reported():
    mixture = several(6)
    step = cost._Step(mixture, mixture.sample(10, seeded(0), torch.float64), at([0.5, 0.1]), "euler", None)
    right = torch.randn(10, 6, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(step.back(step.solve(right)), right, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="could not be inverted"):
        step.solve(right, most=1)


@pytest.mark.parametrize("probes", [None, 2])
def test_a_score_that_is_not_finite_is_reported_with_its_levels(probes):
    broken = Pretrained(lambda x, t: x / 0, VE(), "x0")
    with pytest.raises(ValueError, match=r"not finite between sigma/alpha 0\.9 and 0\.8"):
        predictor_costs(broken, torch.randn(10, 2), at([0.9, 0.8]), 4, 4, probes=probes)


# --- corrector cost with controls -------------------------------------------------------------------------------------


def test_a_gaussians_cost_is_exact_with_its_own_controls():
    gaussian = Mixture(torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[0.5, 0.2, 1.0]]))
    data = gaussian.sample(2000, seeded(0), torch.float64)
    moments = data_moments(data)
    variances, basis = torch.linalg.eigh(torch.cov(data.T, correction=0))

    class Fitted(Denoiser):
        path = VE()

        def forward(self, x, t, cond=None):
            s2 = self.path.sigma(t)[:, None] ** 2
            z = (x - data.mean(0)) @ basis
            return data.mean(0) + (z * variances / (variances + s2)) @ basis.T

    times = at([50.0, 30.0, 2.0, 1.8, 0.5, 0.3, 0.02, 0.01])
    each = corrector_costs(Fitted(), data, times, 32, 1000, generator=seeded(1), moments=moments)
    s2 = VE().sigma(times)[:, None] ** 2
    high, low = variances + s2[:-1], variances + s2[1:]
    exact = (s2[1:] * high * (1 / low - 1 / high) ** 2).sum(1)
    torch.testing.assert_close(each, exact[:, None].expand(each.shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("full_up_to", [2048, 0])
def test_controls_have_expectation_zero_on_any_data(full_up_to):
    data = torch.distributions.Exponential(1.0).icdf(torch.rand(300, 3, generator=seeded(0), dtype=torch.float64))
    data[:, 1] += data[:, 0] ** 2
    moments = data_moments(data, full_up_to)
    for sigma in (10.0, 1.0, 0.1):
        noise = torch.randn(1000, 300, 3, generator=seeded(1), dtype=torch.float64)
        x = (data + sigma * noise).flatten(0, 1)
        levels = torch.tensor([sigma, 0.8 * sigma], dtype=torch.float64)[:, None].expand(2, len(x))
        found = controls(x, noise.flatten(0, 1), *levels, moments)
        assert (found.mean(0).abs() < 4 * found.std(0) / math.sqrt(len(x))).all()


def test_controls_save_draws_without_bias_and_leave_the_reported_error_true():
    mixture = ring()
    data = mixture.sample(5000, seeded(0), torch.float64)
    times = at(np.geomspace(40, 0.05, 12))
    truth = corrector_costs(mixture, data, times, 50_000, 1 << 16, generator=seeded(1)).mean(1)
    runs = {}
    for name, moments in (("plain", None), ("controls", data_moments(data))):
        each = torch.stack(
            [corrector_costs(mixture, data, times, 64, 1 << 16, generator=seeded(i), moments=moments) for i in range(60)]
        )
        runs[name] = each.mean(2) / truth
        reported = each.std(2).mean(0) / 8 / truth
        torch.testing.assert_close(runs[name].std(0), reported, rtol=0.45, atol=0)
        assert (((runs[name].mean(0) - 1) / (runs[name].std(0) / math.sqrt(60) + 0.005)).abs() < 4).all()
    saved = (runs["plain"].var(0) / runs["controls"].var(0)).log().mean().exp()
    assert saved > 2.5


def test_controls_want_enough_draws():
    data = ring().sample(100, seeded(0))
    with pytest.raises(ValueError, match="at least 16, got 15"):
        corrector_costs(ring(), data, at([1.0, 0.9]), 15, 100, moments=data_moments(data))


# --- how many draws ---------------------------------------------------------------------------------------------------


def test_draws_are_doubled_until_the_error_is_small_or_the_budget_is_spent():
    asked = []

    def block(n: int) -> Tensor:
        asked.append(n)
        return torch.ones(5, n)

    def error(each: Tensor) -> float:
        return 1 / math.sqrt(each.shape[1])

    assert draws_until(block, error, 0.07, first=16).shape == (5, 256)
    assert asked == [16, 16, 32, 64, 128]
    assert draws_until(block, error, 0.0, first=16, most=100).shape == (5, 100)
    assert draws_until(block, error, 1.0, first=16).shape == (5, 16)
