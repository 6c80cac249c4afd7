import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from fewstep.metrics import (
    auroc,
    class_coverage,
    energy_distance,
    energy_distance_shares,
    frechet_distance,
    precision_recall,
    sliced_wasserstein,
)

DISTANCES = {"sliced Wasserstein": sliced_wasserstein, "energy": energy_distance, "Frechet": frechet_distance}
on_every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def quantiles(n: int) -> Tensor:
    """The standard normal without sampling noise, in one dimension: (n, 1)."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def with_moments(n: int, mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Samples whose sample mean and sample covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def random_covariance(d: int, seed: int) -> Tensor:
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


# --- properties that every distance has ---------------------------------------------------------------------------------


@on_every_distance
def test_a_distance_is_symmetric(distance):
    x, y = normal(300, 3), 0.5 * normal(300, 3, seed=1) + 1
    extra = {"generator": seeded(5)} if distance is sliced_wasserstein else {}
    again = {"generator": seeded(5)} if distance is sliced_wasserstein else {}
    assert distance(x, y, **extra) == pytest.approx(distance(y, x, **again), rel=1e-9)


@on_every_distance
def test_a_distance_ignores_the_order_of_samples_and_the_shape_of_each(distance):
    x, y = normal(200, 6), normal(150, 6, seed=1) + 0.3
    extra = [{"generator": seeded(5)} if distance is sliced_wasserstein else {} for _ in range(2)]
    shuffled = distance(
        x[torch.randperm(200, generator=seeded(2))].reshape(200, 1, 2, 3), y.flip(0).reshape(150, 1, 2, 3), **extra[0]
    )
    assert shuffled == pytest.approx(distance(x, y, **extra[1]), rel=1e-9)


@on_every_distance
def test_a_distance_ignores_where_both_sets_are(distance):
    x, y, shift = normal(200, 4), normal(200, 4, seed=1) + 0.7, torch.tensor([3.0, -8.0, 0.0, 20.0])
    extra = [{"generator": seeded(5)} if distance is sliced_wasserstein else {} for _ in range(2)]
    assert distance(x + shift, y + shift, **extra[0]) == pytest.approx(distance(x, y, **extra[1]), rel=1e-8)


@on_every_distance
def test_a_distance_grows_as_two_gaussians_are_pulled_apart(distance):
    x, y = normal(500, 3), normal(500, 3, seed=1)
    values = [distance(x, y + shift) for shift in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert values == sorted(values)
    assert values[-1] > 10 * abs(values[0])


@on_every_distance
@pytest.mark.parametrize("sizes", [(1, 10), (10, 1), (0, 10), (1, 1)])
def test_too_few_samples_are_refused(distance, sizes):
    with pytest.raises(ValueError, match=f"too few samples.* got {sizes[0]} and {sizes[1]}"):
        distance(torch.zeros(sizes[0], 3), torch.zeros(sizes[1], 3))


@on_every_distance
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_samples_that_are_not_finite_are_refused(distance, value, which):
    pair = [normal(5, 3), normal(5, 3, seed=1)]
    pair[which][2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        distance(*pair)


@on_every_distance
def test_samples_of_different_sizes_are_refused(distance):
    with pytest.raises(ValueError, match="of 3 and of 4 numbers"):
        distance(normal(5, 3), normal(5, 4))


# --- sliced Wasserstein -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 10])
def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d(d):
    x, shift = normal(400, d), normal(d, seed=3)
    expected = float(shift.norm()) / math.sqrt(d)
    assert sliced_wasserstein(x, x + shift, 8000, seeded(4)) == pytest.approx(expected, rel=0.03)
    assert sliced_wasserstein(x, x, 100, seeded(4)) == 0


@pytest.mark.parametrize(("a", "b", "shift"), [(1.0, 3.0, 0.0), (0.5, 0.5, 2.0), (2.0, 0.3, -1.0)])
@pytest.mark.parametrize("sizes", [(4000, 4000), (4000, 1501)])
def test_sliced_wasserstein_of_gaussians_in_one_dimension_is_the_closed_form(a, b, shift, sizes):
    value = sliced_wasserstein(a * quantiles(sizes[0]), b * quantiles(sizes[1]) + shift, 4, seeded(0))
    assert value == pytest.approx(math.hypot(a - b, shift), rel=4e-3)


def test_sliced_wasserstein_of_scaled_gaussians_is_the_difference_of_their_stds():
    x, y = 0.5 * normal(20_000, 5), 2 * normal(20_000, 5, seed=1)
    assert sliced_wasserstein(x, y, 100, seeded(0)) == pytest.approx(1.5, rel=0.02)


def test_sliced_wasserstein_is_the_square_root_of_the_mean_square_over_directions():
    x, y = normal(150, 2), 0.3 * normal(150, 2, seed=1) + torch.tensor([1.0, 0.0])
    angles = (np.arange(720) + 0.5) * np.pi / 720
    squares = []
    for u in np.stack([np.cos(angles), np.sin(angles)], 1):
        cost = (np.sort(x.numpy() @ u) - np.sort(y.numpy() @ u)) ** 2
        squares.append(cost.mean())
    assert sliced_wasserstein(x, y, 50_000, seeded(0)) == pytest.approx(math.sqrt(np.mean(squares)), rel=0.01)


def test_one_direction_is_optimal_transport_of_the_projections():
    x, y = normal(60, 1), torch.distributions.Exponential(1.0).icdf(torch.rand(60, 1, generator=seeded(1)).double())
    cost = (x[:, None, 0] - y[None, :, 0]) ** 2
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    assert sliced_wasserstein(x, y, 3, seeded(0)) == pytest.approx(math.sqrt(float(cost[rows, columns].mean())), rel=1e-10)


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_repeating_every_sample_of_one_set_changes_nothing(copies):
    x, y = normal(50, 2), normal(50, 2, seed=1) + 1
    plain = sliced_wasserstein(x, y, 100, seeded(2))
    assert sliced_wasserstein(x.repeat(copies, 1), y, 100, seeded(2)) == pytest.approx(plain, rel=1e-9)
    assert sliced_wasserstein(x, x.repeat(copies, 1), 100, seeded(2)) == pytest.approx(0, abs=1e-9)


def test_more_directions_than_fit_at_once_are_averaged_alike(monkeypatch):
    x, y = normal(300, 3), normal(300, 3, seed=1) + 0.5
    whole = sliced_wasserstein(x, y, 64, seeded(0))
    original = Tensor.split
    monkeypatch.setattr(Tensor, "split", lambda self, size, *a: original(self, min(size, 7), *a))
    assert sliced_wasserstein(x, y, 64, seeded(0)) == pytest.approx(whole, rel=1e-10)


# --- energy distance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 25, 1), (12, 12, 3), (2, 30, 5)])
def test_energy_distance_is_the_brute_force_sum_over_pairs(shape):
    n, m, d = shape
    x, y = normal(n, d), 2 * normal(m, d, seed=1) - 0.3
    between = np.mean([math.dist(a, b) for a in x.tolist() for b in y.tolist()])
    inside = [
        np.mean([math.dist(a, b) for i, a in enumerate(z.tolist()) for j, b in enumerate(z.tolist()) if i != j]) for z in (x, y)
    ]
    assert energy_distance(x, y) == pytest.approx(2 * between - sum(inside), rel=1e-9)


def test_energy_distance_agrees_with_scipys_but_for_its_bias():
    x, y = normal(80, 1), 1.5 * normal(60, 1, seed=1) + 0.4
    inside = [float((z - z.T).abs().mean()) for z in (x, y)]  # with the zeros of a sample against itself, as in scipy
    bias = inside[0] / (len(x) - 1) + inside[1] / (len(y) - 1)
    theirs = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y) == pytest.approx(theirs - bias, rel=1e-9)


def mean_absolute_normal(mean: float, std: float) -> float:
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * math.erf(mean / (std * math.sqrt(2)))


@pytest.mark.parametrize(("shift", "std"), [(0.0, 2.0), (1.0, 1.0), (-2.0, 0.5), (5.0, 3.0)])
def test_energy_distance_of_gaussians_in_one_dimension_is_the_closed_form(shift, std):
    value = energy_distance(quantiles(2000), std * quantiles(1500) + shift)
    exact = 2 * mean_absolute_normal(shift, math.hypot(1, std)) - 2 / math.sqrt(math.pi) * (1 + std)
    assert value == pytest.approx(exact, abs=0.005)


def test_the_shares_of_the_energy_distance_have_its_closed_form_in_the_mean_and_its_error_in_their_spread():
    # x ~ N(1, 1), y ~ N(0, 1): E|x - y| of N(1, 2), E|x - x'| = 2/sqrt(pi)
    half = math.sqrt(2) * math.exp(-1 / 4) * math.sqrt(2 / math.pi) + math.erf(1 / 2)
    exact = 2 * half - 2 * 2 / math.sqrt(math.pi)
    g, means, errors, n = seeded(0), [], [], 60
    for _ in range(400):
        each = energy_distance_shares(1 + torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g))
        means.append(float(each.mean()))
        errors.append(float(each.std()) / math.sqrt(n))
    spread = np.std(means)
    assert np.mean(means) == pytest.approx(exact, abs=4 * spread / 20)
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_few_samples_that_spread_too_little_are_not_favoured():
    g, narrow, right, fooled = seeded(0), [], [], []
    for _ in range(200):
        y, z = torch.randn(20, 30, generator=g), torch.randn(20, 30, generator=g)
        narrow.append(float(energy_distance_shares(0.85 * z, y).mean()))
        right.append(float(energy_distance_shares(z, y).mean()))
        fooled.append(sliced_wasserstein(0.85 * z, y, 50, seeded(1)) < sliced_wasserstein(z, y, 50, seeded(1)))
    assert np.mean(fooled) > 0.6  # the distance of empirical distributions
    assert abs(np.mean(right)) < 4 * np.std(right) / math.sqrt(200)
    assert np.mean(narrow) > 4 * np.std(narrow) / math.sqrt(200)


def test_energy_distance_has_no_bias_between_two_sets_of_the_same_law():
    values = [energy_distance(normal(20, 3, seed=2 * i), normal(30, 3, seed=2 * i + 1)) for i in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert min(values) < 0 < max(values)


# --- Frechet distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 5, 20])
def test_frechet_distance_of_known_moments_is_the_closed_form(d):
    mx, my = normal(d, seed=1), normal(d, seed=2)
    cx, cy = random_covariance(d, 3), random_covariance(d, 4)
    x, y = with_moments(200, mx, cx, 5), with_moments(333, my, cy, 6)
    cross = np.trace(np.real(scipy.linalg.sqrtm((cx @ cy).numpy())))
    exact = float(((mx - my) ** 2).sum() + cx.trace() + cy.trace()) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-8)


def test_frechet_distance_of_commuting_covariances_compares_the_stds():
    rotation = torch.linalg.qr(normal(4, 4)).Q
    a, b = (torch.tensor(s, dtype=torch.float64) for s in ([1.0, 2.0, 0.5, 3.0], [0.3, 2.0, 1.0, 0.1]))
    x, y = (with_moments(100, torch.zeros(4).double(), rotation @ (s**2).diag() @ rotation.T, i) for i, s in enumerate((a, b)))
    assert frechet_distance(x, y) == pytest.approx(float(((a - b) ** 2).sum()), rel=1e-8)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 2.0), (3.0, 1.0), (-1.0, 0.2)])
def test_frechet_distance_in_one_dimension_compares_means_and_stds(shift, scale):
    x, y = normal(50, 1), scale * normal(70, 1, seed=1) + shift
    exact = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(("n", "d"), [(100, 6), (10, 30)], ids=["more samples than features", "fewer samples than features"])
def test_frechet_distance_of_a_set_to_itself_vanishes_and_of_a_shift_is_its_square(n, d):
    x, shift = normal(n, d), normal(d, seed=1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + shift) == pytest.approx(float((shift**2).sum()), rel=1e-5)


def test_frechet_distance_from_a_set_without_spread_is_the_other_sets_size():
    x = normal(40, 3)
    point = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact = float(((x.mean(0) - point) ** 2).sum() + x.var(0).sum())
    for pair in ((x, point.expand(9, 3)), (point.expand(9, 3), x)):
        assert frechet_distance(*pair) == pytest.approx(exact, rel=1e-6)


# --- precision, recall and coverage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 60])
@pytest.mark.parametrize("k", [1, 3])
def test_identical_sets_have_full_precision_and_recall(d, k):
    x = normal(120, d) + 50
    assert precision_recall(x, x, k) == (1, 1)


def test_a_collapsed_set_is_precise_but_recalls_nothing():
    data = normal(400, 2)
    collapsed = data[:1] + 1e-6 * normal(400, 2, seed=1)
    assert precision_recall(collapsed, data) == (1, 0)
    assert precision_recall(data, collapsed) == (0, 1)


def test_a_collapse_to_one_of_two_modes_recalls_half():
    data = torch.cat([normal(300, 2), normal(300, 2, seed=1) + 100])
    precision, recall = precision_recall(normal(600, 2, seed=2), data)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_sets_far_apart_have_neither():
    assert precision_recall(normal(50, 4), normal(60, 4, seed=1) + 1000) == (0, 0)


def test_precision_and_recall_of_a_case_by_hand():
    data = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # nearest neighbours at 1, 1, 2, 4: balls [-1,1] [0,2] [1,5] [3,11]
    samples = torch.tensor([[-2.0], [2.5], [4.0], [20.0]])  # at 4.5, 1.5, 1.5, 16: balls [-6.5,2.5] [1,4] [2.5,5.5] [4,36]
    assert precision_recall(samples, data, k=1) == (0.5, 1.0)
    # at the second: data 3, 2, 3, 6: [-3,3] [-1,3] [0,6] [1,13]; the sample at 20 stays outside
    assert precision_recall(samples, data, k=2) == (0.75, 1.0)
    assert precision_recall(torch.tensor([[5.0], [5.5]]), data, k=1) == (1.0, 0.0)  # balls [4.5,5.5] [5,6] hold no datum


@pytest.mark.parametrize("shape", [(40, 25, 2), (30, 50, 30)])
def test_precision_and_recall_are_the_brute_force_ones_in_any_blocks(shape, monkeypatch):
    n, m, d = shape
    x, y = 1.2 * normal(n, d), normal(m, d, seed=1)

    def share(points: Tensor, centres: Tensor, k: int) -> float:
        reach = [sorted(math.dist(c, other) for other in centres.tolist())[k] for c in centres.tolist()]
        inside = [any(math.dist(p, c) <= r for c, r in zip(centres.tolist(), reach, strict=True)) for p in points.tolist()]
        return float(np.mean(inside))

    expected = share(x, y, 3), share(y, x, 3)
    assert 0 < min(expected) < 1
    assert precision_recall(x, y) == pytest.approx(expected)
    original = Tensor.split
    monkeypatch.setattr(Tensor, "split", lambda self, size, *a: original(self, min(size, 7), *a))
    assert precision_recall(x, y) == pytest.approx(expected)


@pytest.mark.parametrize(("sizes", "k"), [((3, 10), 3), ((10, 3), 3), ((1, 1), 1)])
def test_precision_and_recall_need_k_neighbours(sizes, k):
    with pytest.raises(ValueError, match=f"at least {k + 1} in each set, got {sizes[0]} and {sizes[1]}"):
        precision_recall(torch.zeros(sizes[0], 2), torch.zeros(sizes[1], 2), k)
    with pytest.raises(ValueError, match="from 1"):
        precision_recall(normal(9, 2), normal(9, 2), 0)


@pytest.mark.parametrize(
    ("labels", "covered"), [([0, 1, 2, 3], 1), ([0, 0, 0, 0], 0.25), ([0] * 7 + [1], 0.5), ([3] * 15 + [1], 0.25)]
)
def test_class_coverage_counts_classes_with_half_their_fair_share(labels, covered):
    assert class_coverage(torch.tensor(labels), 4) == covered


# --- AUROC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 10, 1000])
def test_auroc_is_the_share_of_pairs_in_order_with_ties_counted_half(seed, levels):
    normals = torch.randint(0, levels, (37,), generator=seeded(seed)).float()
    anomalies = torch.randint(levels // 3, levels + levels // 3 + 1, (23,), generator=seeded(seed + 100)).float()
    pairs = [1.0 if a > n else 0.5 if a == n else 0.0 for n in normals.tolist() for a in anomalies.tolist()]
    assert auroc(normals, anomalies) == pytest.approx(np.mean(pairs), rel=1e-12)
    u = scipy.stats.mannwhitneyu(anomalies.numpy(), normals.numpy()).statistic
    assert auroc(normals, anomalies) == pytest.approx(u / (37 * 23), rel=1e-12)


def test_anomalies_have_the_higher_energy():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert auroc(low, high) == 1
    assert auroc(high, low) == 0
    assert auroc(low, low) == 0.5


def test_auroc_of_two_gaussians_is_the_closed_form():
    value = auroc(quantiles(4000)[:, 0], quantiles(3000)[:, 0] + 1.0)
    assert value == pytest.approx(scipy.stats.norm.cdf(1 / math.sqrt(2)), abs=1e-3)


def test_auroc_depends_on_the_order_of_energies_only():
    x, y = normal(50), normal(60, seed=1) + 0.5
    assert auroc(x.exp(), y.exp()) == auroc(x, y)
    assert auroc(-y, -x) == pytest.approx(auroc(x, y), rel=1e-12)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_auroc_needs_both_kinds(sizes):
    with pytest.raises(ValueError, match=f"{sizes[0]} normal and {sizes[1]} anomalous"):
        auroc(torch.zeros(sizes[0]), torch.zeros(sizes[1]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_auroc_refuses_energies_that_are_not_finite(value):
    with pytest.raises(ValueError, match=r"(?i)nan|infinit|finite"):
        auroc(torch.tensor([0.0, value]), torch.tensor([1.0, 2.0]))
