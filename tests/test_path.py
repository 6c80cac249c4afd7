import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.path import VE, VP, Cosine, Linear, Path, Tabulated, as_time, broadcast

ANY_TIME = st.floats(0, 1, allow_subnormal=False)


def ddpm_table(size: int = 1000) -> Tensor:
    """The linear-beta table of Ho et al. 2020."""
    return (1 - torch.linspace(1e-4, 0.02, size, dtype=torch.float64)).cumprod(0)


def zero_snr_table(size: int = 1000) -> Tensor:
    """Stable Diffusion's table, rescaled to end in pure noise (Lin et al. 2024, Algorithm 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, size, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


TABLES = {
    "ddpm": ddpm_table(),
    "zero terminal SNR": zero_snr_table(),
    "49 entries": (1 - torch.linspace(1e-3, 0.3, 49, dtype=torch.float64)).cumprod(0),  # 49 * (1/49) < 1 in floating point
    "two entries": torch.tensor([0.9, 0.2], dtype=torch.float64),
    "two entries, zero terminal SNR": torch.tensor([0.9, 0.0], dtype=torch.float64),
    "nearly clean entry, then pure noise": torch.tensor([0.99999, 0.0], dtype=torch.float64),
}
PATHS: dict[str, Path] = {
    "VE": VE(),
    "VE of a latent model": VE(0.03, 14.6),
    "VP": VP(),
    "VP of other betas": VP(0.5, 12.0, sigma_min=0.02),
    "Cosine": Cosine(),
    "Linear": Linear(),
    **{f"Tabulated, {name}": Tabulated(table) for name, table in TABLES.items()},
}
PURE_NOISE = {"Cosine", "Linear"} | {f"Tabulated, {name}" for name, table in TABLES.items() if table[-1] == 0}

on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
on_every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())


def inside_cells(path: Path) -> Tensor:
    """Times away from 0, 1 and the knots of a table (where the rate jumps), and in a table's first and last cells."""
    if isinstance(path, Tabulated):
        size = len(path._theta) - 1
        cells = torch.unique(torch.linspace(0, size - 1, 30).round())
        return torch.cat([(cells + part) / size for part in (0.11, 0.5, 0.83)]).double()
    return torch.linspace(0.02, 0.99, 60, dtype=torch.float64)


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_as", [float, lambda t: [t], np.float64, lambda t: np.array([t])], ids=["float", "list", "numpy", "array"]
)
def test_a_time_keeps_its_double_precision_however_it_is_given(given_as):
    assert float(as_time(given_as(0.3))) == 0.3


@on_every_path
def test_a_python_number_and_a_double_tensor_name_the_same_level(path):
    t = 1 / 3
    tensor = torch.tensor(t, dtype=torch.float64)
    for coefficient in (path.alpha, path.sigma, path.angle, path.ratio):
        assert float(coefficient(t)) == float(coefficient(tensor))


def test_a_coefficient_per_sample_multiplies_whole_samples_in_their_precision():
    x = torch.ones(3, 2, 4, 5)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert broadcast(c, x).dtype == torch.float32
    assert (broadcast(c, x) * x).mean((1, 2, 3)).tolist() == [1.0, 2.0, 3.0]
    assert float((broadcast(c[1], x) * x).mean()) == 2.0


# --- the coefficients -------------------------------------------------------------------------------------------------


@on_every_path
def test_time_zero_is_data_exactly(path):
    assert float(path.sigma(0.0)) == 0
    assert float(path.alpha(0.0)) == 1
    assert float(path.angle(0.0)) == 0
    assert float(path.time(0.0)) == 0
    x0, eps = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(path.noised(x0, eps, 0.0), x0)


@on_every_path
def test_time_undoes_angle_all_along_the_path(path):
    t = torch.linspace(0, 1, 1999, dtype=torch.float64)
    assert (path.time(path.angle(t)) - t).abs().max() <= 1e-9


@on_every_path
@settings(deadline=None, max_examples=100)
@given(t=ANY_TIME)
def test_time_undoes_angle_anywhere(path, t):
    t = torch.tensor(t, dtype=torch.float64)
    assert abs(float(path.time(path.angle(t)) - t)) <= 1e-9


@on_every_path
def test_angle_undoes_time_and_is_the_angle_of_the_ratio(path):
    theta = torch.linspace(0, float(path.angle(1.0)), 777, dtype=torch.float64)
    assert (path.angle(path.time(theta)) - theta).abs().max() <= 1e-12
    t = torch.linspace(0, 1, 333, dtype=torch.float64)[:-1]
    torch.testing.assert_close(torch.tan(path.angle(t)), path.ratio(t), rtol=1e-10, atol=0)
    torch.testing.assert_close(path.ratio(t), path.sigma(t) / path.alpha(t), rtol=1e-12, atol=0)


@on_every_path
def test_noise_grows_strictly_with_time_and_signal_never_does(path):
    t = torch.linspace(0, 1, 500, dtype=torch.float64)
    assert (path.angle(t).diff() > 0).all()
    assert (path.sigma(t).diff() > -1e-15).all()
    assert (path.alpha(t).diff() <= 1e-15).all()


@on_every_path
def test_rates_are_the_finite_differences_of_the_coefficients(path):
    t = inside_cells(path)
    h = 1e-3 / (len(path._theta) - 1) if isinstance(path, Tabulated) else 1e-6
    for rate, coefficient in zip(path.rates(t), (path.alpha, path.sigma), strict=True):
        numeric = (coefficient(t + h) - coefficient(t - h)) / (2 * h)
        torch.testing.assert_close(rate, numeric, rtol=2e-6, atol=3e-8)


@on_every_path
def test_the_gradient_of_the_coefficients_flows_through_time(path):
    t = inside_cells(path).requires_grad_()
    rates = path.rates(t.detach())
    for weights in ((1.0, 1.0), (-2.0, 0.5)):
        (gradient,) = torch.autograd.grad((weights[0] * path.alpha(t) + weights[1] * path.sigma(t)).sum(), t)
        expected = weights[0] * rates[0] + weights[1] * rates[1]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@on_every_path
def test_the_gradient_of_the_inverse_is_one_over_the_rate_of_the_angle(path):
    t = inside_cells(path)
    theta = path.angle(t).requires_grad_()
    (gradient,) = torch.autograd.grad(path.time(theta).sum(), theta)
    (da, ds), a, s = path.rates(t), path.alpha(t), path.sigma(t)
    torch.testing.assert_close(gradient, (a**2 + s**2) / (a * ds - s * da), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", PATHS.keys())
def test_the_signal_vanishes_exactly_at_the_end_where_claimed_and_nowhere_else(name):
    path = PATHS[name]
    assert (float(path.alpha(1.0)) == 0) == (name in PURE_NOISE)
    assert path.ends_in_pure_noise() == (name in PURE_NOISE)
    if name in PURE_NOISE:
        assert float(path.sigma(1.0)) == 1
        assert float(path.time(math.pi / 2)) == 1
        assert math.isinf(float(path.ratio(1.0)))


@settings(deadline=None, max_examples=200)
@given(first=st.floats(1e-6, 1 - 1e-6))
def test_a_zero_terminal_snr_table_ends_in_pure_noise_whatever_its_first_entry(first):
    path = Tabulated(torch.tensor([first, 0.0], dtype=torch.float64))
    assert path.ends_in_pure_noise()
    assert float(path.sigma(1.0)) == 1


@on_every_path
def test_sigma_min_and_sigma_max_are_ratios_that_the_path_reaches(path):
    for level in (path.sigma_min, path.sigma_max):
        t = path.time(math.atan(level))
        assert 0 < float(t) <= 1
        assert float(path.ratio(t)) == pytest.approx(level, rel=1e-9)
    if not path.ends_in_pure_noise():
        assert float(path.ratio(1.0)) == pytest.approx(path.sigma_max, rel=1e-12)


@on_every_path
def test_angles_beyond_the_noisiest_level_give_time_one(path):
    beyond = torch.linspace(float(path.angle(1.0)), math.pi / 2, 9, dtype=torch.float64)
    assert path.time(beyond).tolist() == pytest.approx([1.0] * 9, abs=1e-12)
    assert float(path.time(math.pi / 2)) == 1


# --- formulas from elsewhere ------------------------------------------------------------------------------------------


def test_ve_has_unit_signal_and_the_tangent_as_noise():
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert torch.equal(VE(0.01, 50.0).alpha(t), torch.ones_like(t))
    assert VE(0.01, 50.0).sigma(t).tolist() == pytest.approx(np.tan(t.numpy() * np.arctan(50.0)).tolist())


@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.1, 20.0), (0.5, 12.0)])
def test_vp_is_the_integral_of_its_linear_beta(beta_min, beta_max):
    path, t = VP(beta_min, beta_max), np.linspace(0, 1, 20001)
    beta = beta_min + t * (beta_max - beta_min)
    integral = np.concatenate([[0], np.cumsum((beta[1:] + beta[:-1]) / 2 * np.diff(t))])  # exact: beta is linear
    np.testing.assert_allclose(path.alpha(torch.from_numpy(t)).numpy(), np.exp(-integral / 2), rtol=1e-9)


@pytest.mark.parametrize("name", [n for n in PATHS if n not in ("VE", "VE of a latent model", "Linear")])
def test_variance_preserving_paths_have_coefficients_on_the_unit_circle(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(PATHS[name].alpha(t) ** 2 + PATHS[name].sigma(t) ** 2, torch.ones_like(t), rtol=1e-12, atol=0)


def test_linear_interpolates_between_data_and_noise():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    x0, eps = torch.randn(11, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    torch.testing.assert_close(Linear().noised(x0, eps, t), torch.lerp(x0, eps, t[:, None]))


@on_every_table
def test_a_tabulated_path_passes_through_every_entry_of_its_table(table):
    path = Tabulated(table)
    t = (torch.arange(len(table), dtype=torch.float64) + 1) / len(table)
    torch.testing.assert_close(path.alpha(t) ** 2, table, rtol=1e-10, atol=1e-30)
    torch.testing.assert_close(path.sigma(t) ** 2, 1 - table, rtol=1e-10, atol=0)
    torch.testing.assert_close(path.index(t), torch.arange(len(table), dtype=torch.float64), rtol=0, atol=1e-9)


@on_every_table
def test_between_entries_a_table_is_log_linear_as_in_diffusers_euler_scheduler(table):
    sigmas = np.sqrt((1 - table.numpy()) / np.maximum(table.numpy(), 1e-300))
    finite = int((table > 0).sum())  # the last cell of a zero-terminal-SNR table is infinite in this coordinate
    index = np.linspace(0, finite - 1, 1234)
    theirs = np.exp(np.interp(index, np.arange(finite), np.log(sigmas[:finite])))
    path = Tabulated(table)
    ours = path.ratio(torch.from_numpy((index + 1) / len(table)))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)
    # and the way back, which is diffusers' _sigma_to_t
    back = path.index(path.time(torch.from_numpy(np.arctan(theirs))))
    np.testing.assert_allclose(back.numpy(), np.interp(np.log(theirs), np.log(sigmas[:finite]), np.arange(finite)), atol=1e-7)


@on_every_table
def test_the_cells_that_are_infinite_in_log_sigma_are_linear_in_the_angle(table):
    path, size = Tabulated(table), len(table)
    part = torch.linspace(0, 1, 17, dtype=torch.float64)
    first = torch.atan2((1 - table[0]).sqrt(), table[0].sqrt())
    torch.testing.assert_close(path.angle(part / size), part * first, rtol=1e-9, atol=1e-15)
    if table[-1] == 0:
        before = torch.atan2((1 - table[-2]).sqrt(), table[-2].sqrt())
        expected = before + part * (math.pi / 2 - before)
        torch.testing.assert_close(path.angle((size - 1 + part) / size), expected, rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2, 400), t=ANY_TIME, zero=st.booleans())
@example(size=41, t=0.5, zero=False)
@example(size=41, t=0.5, zero=True)
def test_a_table_of_any_size_has_an_inverse(size, t, zero):
    table = torch.linspace(0.9999, 0.0 if zero else 0.01, size, dtype=torch.float64)
    path, t = Tabulated(table), torch.tensor(t, dtype=torch.float64)
    knots = torch.arange(size + 1, dtype=torch.float64) / size
    for times in (t, (knots[:-1] + knots[1:]) / 2, knots):
        assert float((path.time(path.angle(times)) - times).abs().max()) <= 1e-9


@settings(deadline=None, max_examples=100)
@example(size=1000, betas=(1e-4, 0.02), zero=False)
@given(size=st.integers(2, 1000), betas=st.tuples(st.floats(1e-4, 0.03), st.floats(1e-4, 0.03)), zero=st.booleans())
def test_no_level_of_a_table_is_given_a_time_beyond_one(size, betas, zero):
    table = (1 - torch.linspace(*sorted(betas), size, dtype=torch.float64)).cumprod(0)
    if zero:
        table[-1] = 0
    path = Tabulated(table)
    assert float(path.time(math.pi / 2)) == 1
    near = float(path.angle(1.0)) * torch.tensor([1 - 1e-9, 1 - 1e-15, 1.0, 1 + 1e-15], dtype=torch.float64)
    assert float(path.time(near).max()) <= 1


def test_a_table_given_as_a_list_is_as_precise_as_a_tensor():
    table = ddpm_table(50)
    t = torch.linspace(0, 1, 77, dtype=torch.float64)
    assert torch.equal(Tabulated(table.tolist()).angle(t), Tabulated(table).angle(t))


# --- noising and starting ---------------------------------------------------------------------------------------------


@on_every_path
def test_noised_samples_have_the_mean_and_the_spread_of_their_level(path, generator):
    n, t = 40_000, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0 = torch.tensor([-1.5, 2.0, 0.25])[:, None].expand(3, n)
    eps = torch.randn(3, n, generator=generator)
    x = path.noised(x0, eps, t).double()
    a, s = path.alpha(t), path.sigma(t)
    assert ((x.mean(1) - a * x0[:, 0]).abs() < 5 * s / math.sqrt(n)).all()
    torch.testing.assert_close(x.std(1), s, rtol=5 / math.sqrt(2 * n), atol=1e-5)


@on_every_path
def test_one_level_per_image_equals_noising_the_images_one_by_one(path, generator):
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    together = path.noised(x0, eps, t)
    assert together.dtype == torch.float32
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], path.noised(x0[i : i + 1], eps[i : i + 1], t[i]), rtol=0, atol=0)


@on_every_path
@pytest.mark.parametrize("t", [1.0, 0.4])
def test_starts_are_noise_of_the_level_asked_for_and_repeat_with_the_generator(path, t):
    draws = [path.start(4000, (2, 5), torch.Generator().manual_seed(3), t, dtype=torch.float64) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (4000, 2, 5)
    sigma = float(path.sigma(t))
    assert float(draws[0].std()) == pytest.approx(sigma, rel=0.02)
    assert abs(float(draws[0].mean())) < 5 * sigma / 200


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VE, Cosine, Linear])
@pytest.mark.parametrize("levels", [(0.0, 80.0), (-1.0, 80.0), (80.0, 0.002), (1.0, 1.0), (0.002, math.inf), (math.nan, 80.0)])
def test_levels_that_are_no_range_are_refused(kind, levels):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        kind(*levels)


@pytest.mark.parametrize("betas", [(0.0, 20.0), (20.0, 0.1), (-1.0, 5.0), (1.0, 1.0)])
def test_vp_refuses_betas_that_do_not_rise_from_above_zero(betas):
    with pytest.raises(ValueError, match="beta_min < beta_max"):
        VP(*betas)


def test_vp_refuses_a_sigma_min_above_its_noisiest_level():
    with pytest.raises(ValueError, match="sigma_min"):
        VP(sigma_min=1e4)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([0.5], "at least 2"),
        ([[0.9, 0.5]], "shape"),
        ([0.5, 0.9], "fall strictly"),
        ([0.9, 0.5, 0.5], "fall strictly"),
        ([1.0, 0.5], "below 1"),
        ([0.9, -0.1], "at least 0"),
        ([0.9, math.nan, 0.1], "fall strictly"),
        ([math.nan, 0.1], "fall strictly"),
    ],
)
def test_a_table_that_does_not_fall_from_below_one_is_refused(table, says):
    with pytest.raises(ValueError, match=says):
        Tabulated(table)
