import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Guided, OnPath, Pretrained, to_eps, to_score, to_velocity, to_x0
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP, Cosine, Linear, Path, Tabulated

PATHS: dict[str, Path] = {
    "VE": VE(),
    "VP": VP(),
    "Cosine": Cosine(),
    "Linear": Linear(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "Tabulated, zero terminal SNR": Tabulated(torch.linspace(0.999, 0.0, 250, dtype=torch.float64)),
}
PREDICTIONS = ["x0", "eps", "v", "flow", "score"]
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())

MEANS = torch.tensor([[-1.0, 0.5, 2.0], [1.5, -0.3, 0.0], [0.2, 0.8, -1.2]], dtype=torch.float64)
STDS = torch.tensor([[0.3, 0.7, 0.2], [0.5, 0.1, 1.0], [0.05, 0.4, 0.6]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def lopsided(path: Path) -> Mixture:
    """Three Gaussians of unequal weight with a std per dimension."""
    return Mixture(MEANS, STDS, WEIGHTS, path)


def times_between(path: Path, low: float = 0.02, high: float = 60.0, n: int = 40) -> Tensor:
    """Times whose sigma/alpha is log-uniform in a range that every path has."""
    return path.time(torch.atan(torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)))


def noisy(mixture: Mixture, t: Tensor, seed: int = 0) -> Tensor:
    """One double-precision draw of p_t for each of the times (b,)."""
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.sample(len(t), generator, torch.float64)
    return mixture.path.noised(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t)


def score_by_autograd(mixture: Mixture, x: Tensor, t: Tensor | float) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(mixture.log_prob(x, t).sum(), x)[0]


class ExactNet:
    """A network of the given prediction type without error; it is told t itself."""

    def __init__(self, mixture: Mixture, predicts: str):
        self.mixture, self.predicts = mixture, predicts

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        path, x0 = self.mixture.path, self.mixture(x, t)
        column = [c[:, None] for c in (path.alpha(t), path.sigma(t), *path.rates(t))]
        alpha, sigma, alpha_rate, sigma_rate = column
        eps = (x - alpha * x0) / sigma
        return {
            "x0": lambda: x0,
            "eps": lambda: eps,
            "v": lambda: alpha * eps - sigma * x0,
            "flow": lambda: alpha_rate * x0 + sigma_rate * eps,
            "score": lambda: score_by_autograd(self.mixture, x, t),
        }[self.predicts]()


# --- what a network predicts ------------------------------------------------------------------------------------------


@on_every_path
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_every_prediction_type_becomes_the_exact_posterior_mean(path, predicts):
    mixture = lopsided(path)
    t = times_between(path)
    x = noisy(mixture, t)
    model = Pretrained(ExactNet(mixture, predicts), path, predicts)
    torch.testing.assert_close(model(x, t), mixture(x, t), rtol=0, atol=1e-8)
    for i in (0, 17, 39):  # one level for the whole batch
        torch.testing.assert_close(model(x, t[i]), mixture(x, t[i]), rtol=0, atol=1e-8)
        torch.testing.assert_close(model(x, float(t[i])), mixture(x, float(t[i])), rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", [Cosine(), Linear(), PATHS["Tabulated, zero terminal SNR"]], ids=repr)
@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
def test_x0_v_and_flow_predictions_are_exact_at_pure_noise_too(path, predicts):
    mixture = lopsided(path)
    x = torch.randn(5, 3, dtype=torch.float64)
    model = Pretrained(ExactNet(mixture, predicts), path, predicts)
    expected = (WEIGHTS[:, None] * MEANS).sum(0).expand(5, 3)  # pure noise says nothing about the data
    torch.testing.assert_close(model(x, 1.0), expected, rtol=0, atol=1e-10)


@on_every_path
def test_beliefs_turn_back_into_noise_score_and_velocity(path):
    mixture = lopsided(path)
    t = times_between(path)
    x = noisy(mixture, t)
    x0 = mixture(x, t)
    for predicts, back in (("eps", to_eps), ("score", to_score), ("flow", to_velocity)):
        y = back(x0, x, path, t)
        torch.testing.assert_close(y, ExactNet(mixture, predicts)(x, t), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(to_x0(predicts, y, x, path, t), x0, rtol=0, atol=1e-8)


@on_every_path
def test_the_velocity_moves_a_noised_point_along_the_path(path):
    x0, eps = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, h = times_between(path, 0.1, 20.0, 7), 1e-7
    numeric = (path.noised(x0, eps, t + h) - path.noised(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(to_velocity(x0, path.noised(x0, eps, t), path, t), numeric, rtol=1e-4, atol=1e-5)


CLOCKS = {
    "t itself": (Linear(), None, lambda t: t),
    "a thousand times t": (Linear(), lambda t: 1000 * t, lambda t: 1000 * t),
    "reversed": (Linear(), lambda t: 1 - t, lambda t: 1 - t),
    "sigma of EDM": (VE(), VE().ratio, lambda t: np.tan(t * np.arctan(80.0))),
    "fractional index": (PATHS["Tabulated"], PATHS["Tabulated"].index, lambda t: 1000 * t - 1),
}


@pytest.mark.parametrize(("path", "clock", "formula"), CLOCKS.values(), ids=CLOCKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_is_told_its_own_clock_number_for_every_sample(path, clock, formula, dtype):
    told = []

    def net(x, number):
        told.append(number)
        return x

    x, precision = torch.zeros(4, 2, dtype=dtype), 1e-12 if dtype == torch.float64 else 1e-6
    t = torch.tensor([0.9, 0.35, 0.1234567, 0.01], dtype=torch.float64)
    model = Pretrained(net, path, "x0", clock)
    model(x, t)
    model(x, t[2])
    model(x, float(t[1]))
    for number, expected in zip(told, (t, t[2].expand(4), t[1].expand(4)), strict=True):
        assert number.dtype == dtype
        assert number.shape == (4,)
        assert number.tolist() == pytest.approx(formula(expected.numpy()).tolist(), rel=precision)


def test_conditions_reach_the_network_verbatim_and_a_misspelt_one_raises():
    seen = {}

    def net(x, t, label=None):
        seen["label"] = label
        return x

    model, x, label = Pretrained(net, Linear(), "x0"), torch.zeros(3, 2), torch.arange(3)
    model(x, 0.5, {"label": label})
    assert seen["label"] is label
    with pytest.raises(TypeError, match="lable"):
        model(x, 0.5, {"lable": label})


def test_unknown_predictions_and_outputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="epsilon"):
        Pretrained(lambda x, t: x, VE(), "epsilon")
    with pytest.raises(ValueError, match="noise"):
        to_x0("noise", torch.zeros(1, 2), torch.zeros(1, 2), VE(), 0.5)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 2\)"):
        Pretrained(lambda x, t: torch.cat([x, x], 1), VE(), "x0")(torch.zeros(3, 2), 0.5)


# --- the same model on another path -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), list(itertools.permutations(PATHS, 2)))
def test_a_model_seen_on_another_path_keeps_its_posterior_mean(theirs, ours):
    seen, exact = OnPath(lopsided(PATHS[theirs]), PATHS[ours]), lopsided(PATHS[ours])
    t = times_between(PATHS[ours])
    x = noisy(exact, t)
    torch.testing.assert_close(seen(x, t), exact(x, t), rtol=0, atol=1e-8)
    torch.testing.assert_close(seen(x, t[20]), exact(x, t[20]), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("theirs", "ours"), [("Linear", "Cosine"), ("Cosine", "Tabulated, zero terminal SNR")])
def test_pure_noise_is_pure_noise_on_another_path(theirs, ours):
    seen, exact = OnPath(lopsided(PATHS[theirs]), PATHS[ours]), lopsided(PATHS[ours])
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(seen(x, 1.0), exact(x, 1.0), rtol=0, atol=1e-12)


def test_levels_beyond_the_models_noisiest_are_asked_at_that_level():
    asked = []

    class Recording(Denoiser):
        path = VE(0.002, 10.0)

        def forward(self, x, t, cond=None):
            asked.append((x, t))
            return x

    wide, x = VE(0.002, 1000.0), torch.ones(2, 3, dtype=torch.float64)
    OnPath(Recording(), wide)(x * 500, wide.time(math.atan(500.0)))
    (given, t), spread = asked[0], math.hypot(1, 10.0) / math.hypot(1, 500.0)
    assert float(t) == 1
    torch.testing.assert_close(given, 500 * spread * x)  # of the spread that the model knows there


def test_a_new_path_hands_conditions_on_and_counts_the_same_evaluations():
    model = Guided(Choice(Linear()), 2.0, {"label": torch.tensor([0])})
    seen, x, label = OnPath(model, VE()), torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    assert seen.evaluations == 2
    expected = Guided(Choice(VE()), 2.0, {"label": torch.tensor([0])})
    torch.testing.assert_close(seen(x, 0.3, {"label": label}), expected(x, 0.3, {"label": label}), rtol=0, atol=1e-9)


def test_wrapping_keeps_the_number_of_classes():
    model = Pretrained(lambda x, t: x, VE(), "x0", classes=3)
    assert Guided(OnPath(model, Cosine()), 2.0, {"class_labels": torch.tensor([3])}).classes == 3
    assert OnPath(Mixture([[0.0]], 1.0), VE()).classes is None


# --- guidance ---------------------------------------------------------------------------------------------------------


class Choice(Denoiser):
    """One of two mixtures, row by row: cond["label"] (b,) holds 0 or 1."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.either = torch.nn.ModuleList(
            [Mixture([[0.0, 1.0], [2.0, -1.0]], 0.5, path=path), Mixture([[-3.0, 0.5]], 0.2, path=path)]
        )

    def forward(self, x, t, cond=None):
        label = cond["label"]
        assert label.shape == (len(x),)
        return torch.where(label[:, None] == 0, self.either[0](x, t), self.either[1](x, t))


@on_every_path
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, -0.5])
def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_model(path, scale):
    choice, t = Choice(path), times_between(path, n=6)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, zero = choice.either[1](x, t), choice.either[0](x, t)
    row = torch.tensor([1])
    for given, nothing in itertools.product((row, row.expand(6)), (0 * row, 0 * row.expand(6))):
        guided = Guided(choice, scale, {"label": nothing})
        assert guided.evaluations == 2
        torch.testing.assert_close(guided(x, t, {"label": given}), (1 - scale) * zero + scale * one, rtol=0, atol=1e-10)
    # every row its own condition
    label = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = torch.where(label[:, None] == 1, (1 - scale) * zero + scale * one, zero)
    torch.testing.assert_close(Guided(choice, scale, {"label": 0 * row})(x, t, {"label": label}), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "cond", [None, {}, {"lable": torch.tensor([1])}, {"label": torch.tensor([1]), "size": torch.tensor([1])}]
)
def test_guidance_refuses_conditions_of_other_names(cond):
    with pytest.raises(ValueError, match="label"):
        Guided(Choice(VE()), 2.0, {"label": torch.tensor([0])})(torch.zeros(3, 2), 0.5, cond)


@pytest.mark.parametrize(("given", "nothing"), [(2, 1), (1, 2), (4, 3)])
def test_guidance_refuses_conditions_that_are_neither_one_row_nor_one_per_sample(given, nothing):
    guided = Guided(Choice(VE()), 2.0, {"label": torch.zeros(nothing)})
    with pytest.raises(ValueError, match="rows"):
        guided(torch.zeros(3, 2), 0.5, {"label": torch.zeros(given)})


# --- the exact mixture: everything above and elsewhere is held to it, so it is held to first principles -------------------


@on_every_path
def test_the_mixtures_posterior_mean_obeys_tweedies_formula(path):
    mixture, t = lopsided(path), times_between(path)
    x = noisy(mixture, t)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    by_score = (x + sigma**2 * score_by_autograd(mixture, x, t)) / alpha
    torch.testing.assert_close(mixture(x, t), by_score, rtol=0, atol=1e-9)


@pytest.mark.parametrize("level", [0.3, 1.0, 3.0])
def test_the_mixtures_posterior_mean_is_the_weighted_mean_of_its_own_samples(level, generator):
    mixture = lopsided(VE())
    t = mixture.path.time(math.atan(level))
    x0 = mixture.sample(200_000, generator, torch.float64)
    for x in noisy(mixture, t.expand(4), seed=5):
        weight = torch.softmax(-((x - x0) ** 2).sum(1) / (2 * level**2), 0)
        estimate = (weight[:, None] * x0).sum(0)
        error = ((weight[:, None] * (x0 - estimate)) ** 2).sum(0).sqrt()
        assert ((mixture(x[None], t)[0] - estimate).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("t", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("path", [VP(), Linear()], ids=["VP", "Linear"])
def test_the_density_integrates_to_one_in_one_dimension(path, t):
    mixture = Mixture([[-1.0], [0.5], [2.0]], [0.1, 0.5, 0.3], [1.0, 2.0, 3.0], path)
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    assert float(torch.trapezoid(mixture.log_prob(grid[:, None], t).exp(), grid)) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.4])
def test_the_density_integrates_to_one_in_two_dimensions(t):
    mixture = ring(path=Linear())
    grid = torch.linspace(-7, 7, 401, dtype=torch.float64)
    density = mixture.log_prob(torch.cartesian_prod(grid, grid), t).exp().reshape(401, 401)
    assert float(torch.trapezoid(torch.trapezoid(density, grid), grid)) == pytest.approx(1, abs=1e-8)


@on_every_path
def test_the_density_is_scipys(path):
    mixture, t = lopsided(path), times_between(path, n=5)
    x = noisy(mixture, t)
    for i in range(5):
        a, s = float(path.alpha(t[i])), float(path.sigma(t[i]))
        parts = [
            w * scipy.stats.multivariate_normal(a * m, np.diag(a**2 * c**2 + s**2)).pdf(x[i].numpy())
            for w, m, c in zip(WEIGHTS.numpy(), MEANS.numpy(), STDS.numpy(), strict=True)
        ]
        assert float(mixture.log_prob(x, t)[i]) == pytest.approx(math.log(sum(parts)), abs=1e-9)
    x0 = mixture.sample(3, dtype=torch.float64)
    assert torch.equal(mixture.energy(x0), -mixture.log_prob(x0, 0.0))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1, 1)], ids=str)
def test_samples_have_the_moments_of_the_mixture(shape, generator):
    mixture = Mixture(MEANS.reshape(3, *shape), STDS.reshape(3, *shape), 10 * WEIGHTS)
    n = 200_000
    x = mixture.sample(n, generator, torch.float64)
    assert x.shape == (n, *shape)
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    spread = MEANS - mean
    covariance = (WEIGHTS[:, None] * STDS**2).sum(0).diag() + torch.einsum("k,ki,kj->ij", WEIGHTS, spread, spread)
    torch.testing.assert_close(x.flatten(1).mean(0), mean, rtol=0, atol=5 * float(covariance.max().sqrt()) / math.sqrt(n))
    torch.testing.assert_close(x.flatten(1).T.cov(), covariance, rtol=0, atol=0.03)
    nearest = torch.cdist(x.flatten(1), MEANS).argmin(1)
    assert len(nearest.unique()) == 3


@on_every_path
def test_a_single_gaussian_has_the_linear_posterior_mean(path):
    m, c, t = torch.tensor([0.4, -1.0], dtype=torch.float64), 0.6, times_between(path)
    mixture = Mixture(m[None], c, path=path)
    x = noisy(mixture, t)
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    torch.testing.assert_close(mixture(x, t), (s**2 * m + a * c**2 * x) / (a**2 * c**2 + s**2), rtol=1e-10, atol=1e-12)


@on_every_path
def test_a_point_mass_is_believed_in_whatever_is_seen(path):
    m, t = torch.tensor([0.7, -2.0], dtype=torch.float64), times_between(path)
    mixture = Mixture(m[None], 0.0, path=path)
    x = 10 * torch.randn(40, 2, dtype=torch.float64)
    torch.testing.assert_close(mixture(x, t), m.expand(40, 2), rtol=1e-12, atol=0)
    normal = torch.distributions.Normal(path.alpha(t)[:, None] * m, path.sigma(t)[:, None].expand(40, 2))
    torch.testing.assert_close(mixture.log_prob(x, t), normal.log_prob(x).sum(1), rtol=1e-10, atol=0)
    assert torch.equal(mixture.sample(5, dtype=torch.float64), m.expand(5, 2))


def test_point_masses_are_weighed_by_their_likelihood():
    mixture, level = Mixture([[-1.0], [1.0]], 0.0, [1.0, 3.0]), 0.8
    x = torch.linspace(-3, 3, 21, dtype=torch.float64)[:, None]
    odds = torch.log(torch.tensor(3.0, dtype=torch.float64)) + 2 * x / level**2
    torch.testing.assert_close(mixture(x, mixture.path.time(math.atan(level))), torch.tanh(odds / 2), rtol=0, atol=1e-9)


@on_every_path
def test_image_shaped_means_give_what_flat_ones_give(path):
    generator = torch.Generator().manual_seed(4)
    means, stds = torch.randn(4, 2, 3, 3, generator=generator), 0.1 + torch.rand(4, 2, 3, 3, generator=generator)
    images, flat = Mixture(means, stds, path=path), Mixture(means.flatten(1), stds.flatten(1), path=path)
    t = times_between(path, n=8)
    x = noisy(images, t)
    assert torch.equal(images(x, t), flat(x.flatten(1), t).reshape(x.shape))
    assert torch.equal(images.log_prob(x, t), flat.log_prob(x.flatten(1), t))


@pytest.mark.parametrize(
    "stds", [0.3, [0.3, 0.3], [[0.3, 0.3, 0.3], [0.3, 0.3, 0.3]]], ids=["number", "per part", "per number"]
)
def test_stds_may_be_a_number_or_one_per_component_or_one_per_dimension(stds):
    mixture, t = Mixture(MEANS[:2], stds), torch.tensor([0.2, 0.5], dtype=torch.float64)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = Mixture(MEANS[:2], torch.full((2, 3), 0.3, dtype=torch.float64))(x, t)
    torch.testing.assert_close(mixture(x, t), expected, rtol=1e-12, atol=0)


def test_one_level_per_sample_equals_one_sample_at_a_time():
    mixture, t = lopsided(VP()), times_between(VP(), n=6)
    x = noisy(mixture, t)
    for i in range(6):
        torch.testing.assert_close(mixture(x, t)[i], mixture(x[i : i + 1], t[i])[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(mixture.log_prob(x, t)[i], mixture.log_prob(x[i : i + 1], t[i])[0], rtol=1e-12, atol=0)


def test_the_ring_lies_on_its_circle_with_equal_weights():
    mixture = ring(5, radius=3.0, std=0.2)
    assert mixture.means.norm(dim=1).tolist() == pytest.approx([3.0] * 5)
    gaps = (mixture.means - mixture.means.roll(1, 0)).norm(dim=1)
    assert gaps.tolist() == pytest.approx([6 * math.sin(math.pi / 5)] * 5)
    assert mixture.weights.tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([0.0, 1.0], 0.5), "shape"),
        (([[0.0], [1.0]], -0.5), "negative"),
        (([[0.0], [1.0]], 0.5, [1.0, 0.0]), "positive"),
        (([[0.0], [1.0]], 0.5, [1.0]), "2 positive"),
    ],
)
def test_a_mixture_refuses_what_is_no_mixture(arguments, says):
    with pytest.raises(ValueError, match=says):
        Mixture(*arguments)
