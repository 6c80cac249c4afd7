import math

import pytest
import torch
from torch import Tensor

from counting import Counting
from fewstep import noises
from fewstep.denoiser import Denoiser, Guided
from fewstep.endpoint import Midway, Reference, Runs, reference, squared_errors, steps_of_reference
from fewstep.mixture import Mixture, ring
from fewstep.noises import PIECES, POINTS, evaluations_on_arcs, reference_on_arcs
from fewstep.path import VE, VP, Cosine, Linear, Path
from fewstep.schedule import karras
from fewstep.verdict import on_each_arc, squares_of

PATHS = {"VE": VE(), "VP": VP(), "Linear": Linear(), "Cosine": Cosine()}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
FEW = karras(0.002, 80.0).angles(6)[:-1]


def pairs(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_arcs(model: Denoiser, n: int, d: int, seed: int = 0, **about) -> Reference:
    g = torch.Generator().manual_seed(seed + 1)
    return reference_on_arcs(model, pairs(n, d, seed), levels=about.pop("levels", 96), generator=g, **about)


def mean_and_error(values: Tensor, known: Reference) -> tuple[float, float]:
    """The mean of values (m,) over noises, and its standard error, arcs being independent."""
    each = on_each_arc(values, known)
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))


def two_modes() -> Mixture:
    """In one dimension, so that every noise is known to end in the one or the other."""
    return Mixture([[-3.0], [3.0]], 0.1, [0.8, 0.2])


def exact(model: Mixture, theta: Tensor, reach: float = 6.0, points: int = 40_001) -> float:
    """The mean square endpoint error of Euler's steps on these levels, by quadrature over the noise."""
    z = torch.linspace(-reach, reach, points, dtype=torch.float64)[:, None]
    squares = squared_errors(Runs(model, "euler", z, batch_size=points)(theta)[0], reference(model, z, levels=96).ends)
    return float((squares * torch.exp(-(z[:, 0] ** 2) / 2)).sum() * 2 * reach / (points - 1)) / math.sqrt(2 * math.pi)


@on_every_path
def test_the_weighted_noises_are_standard_normal(path: Path):
    known = on_arcs(Mixture([[0.5, -1.0], [2.0, 1.0]], 0.3, path=path), 400, 2, levels=4)
    z = known.noise
    one = torch.ones(len(z))
    for values, expected in ((one, 1), (z[:, 0], 0), (z[:, 1] ** 2, 1), (z[:, 0] * z[:, 1], 0), (z[:, 0] ** 4, 3)):
        mean, error = mean_and_error(values, known)
        assert abs(mean - expected) < 4 * error


def test_a_change_of_mode_that_one_noise_in_a_thousand_meets_is_measured():
    """Euler's border between two modes lies next to the ODE's; the noises between make all of the error. Of 512 independent
    ones more than half of the verdicts would meet none."""
    model, seeds = two_modes(), 20
    theta = karras(0.002, 80.0).angles(200)[:-1]
    truth = exact(model, theta)
    assert truth / 36 == pytest.approx(1e-3, rel=0.1)  # the modes are 6 apart
    runs = [on_arcs(model, 32, 1, seed) for seed in range(seeds)]
    found = [mean_and_error(squared_errors(Runs(model, "euler", k.noise)(theta)[0], k.ends), k) for k in runs]
    means, errors = (torch.tensor(part) for part in zip(*found, strict=True))
    assert abs(float(means.mean()) - truth) < 4 * float(errors.square().mean().sqrt()) / math.sqrt(seeds)
    independent = 6 * math.sqrt(truth / (32 * POINTS))  # the standard error of m squares of 36 with probability truth/36
    assert float((means - truth).square().mean().sqrt()) < independent / 2
    assert float(means.min()) > 0.2 * truth


def test_small_pieces_lie_at_the_border():
    known = on_arcs(two_modes(), 64, 1)
    z = torch.linspace(-4, 4, 80_001, dtype=torch.float64)[:, None]
    border = float(z[reference(two_modes(), z, levels=96).ends.diff(dim=0).abs().argmax()])
    near = (known.noise[:, 0] - border).abs() < 0.02
    crossed = torch.bincount(known.arc[near], minlength=64) > 0
    sides = torch.zeros(64, dtype=torch.int64).index_add(0, known.arc, (known.noise[:, 0] > border).long())
    through = (sides > 0) & (sides < POINTS)
    assert through.sum() > 15
    assert (crossed & through).sum() >= 0.9 * through.sum()
    assert near.double().mean() > 4 * float((known.weight * near).mean())  # far more of them than their share


@pytest.mark.parametrize("start", [None, 3.0], ids=["from noise", "image to image"])
@pytest.mark.parametrize("path", [VE(), Linear()], ids=["VE", "Linear"])
def test_it_takes_what_it_says(path, start):
    model, seen = Counting(ring(path=path)), []
    about = {"sigma_min": 0.01, "sigma_max": 50.0}
    asked = model if start is None else Midway(model, start, **about)
    known = on_arcs(asked, 5, 2, levels=20, batch_size=7, tick=seen.append, **({} if start else about))
    assert known.evaluations == model.samples == sum(seen)
    assert known.evaluations == evaluations_on_arcs(5, 20, steps_of_reference(asked, 0))
    assert model.most <= 7
    assert known.noise.shape == known.ends.shape == (5 * POINTS, 2)


def test_both_halves_of_guidance_are_counted():
    label = {"label": torch.ones(3)}
    guided, seen = Guided(ByLabel(), 2.0, {"label": torch.tensor([0.0])}), []
    known = on_arcs(guided, 3, 2, cond=label, levels=5, tick=seen.append)
    assert known.evaluations == sum(seen) == 2 * evaluations_on_arcs(3, 5)


def test_arcs_are_halved_in_parts_that_fit_and_give_the_same(monkeypatch):
    whole = on_arcs(ring(), 7, 2, levels=5)
    monkeypatch.setattr(noises, "MEMORY", 2 * PIECES * 2)  # two arcs' pictures
    model = Counting(ring())
    parts = on_arcs(model, 7, 2, levels=5)
    assert model.most <= 7 * POINTS
    torch.testing.assert_close(parts.noise, whole.noise, rtol=1e-12, atol=1e-12)


def test_the_size_of_batches_does_not_change_the_noises():
    one, other = on_arcs(ring(), 6, 2, batch_size=7), on_arcs(ring(), 6, 2)
    for a, b in ((one.noise, other.noise), (one.ends, other.ends), (one.weight, other.weight)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.equal(on_arcs(ring(), 6, 2, seed=5).noise, other.noise)


class ByLabel(Denoiser):
    """A point mass at the row's label."""

    path, shape = VE(0.01, 10.0), (2,)

    def forward(self, x, t, cond=None):
        return cond["label"][:, None].to(x).expand_as(x)


def test_an_arc_has_one_condition_and_the_verdict_deals_it_out_alike():
    label = {"label": torch.tensor([5.0, -2.0, 9.0])}
    known = on_arcs(ByLabel(), 7, 2, cond=label, levels=5, batch_size=10)
    assert known.arc.tolist() == [i for i in range(7) for _ in range(POINTS)]
    torch.testing.assert_close(known.ends[:, 0], label["label"][known.arc % 3].double(), rtol=0, atol=0.02)
    grids = {3: {"learned": karras(0.01, 10.0).angles(3)[:-1]}}
    squares, _ = squares_of(ByLabel(), "euler", grids, known, cond=label, batch_size=9)
    assert squares[3]["learned"].shape == (7,)
    assert float(squares[3]["learned"].max()) < 1e-3  # 9 and more with another's label


def test_the_mean_on_an_arc_weighs_its_noises():
    known = reference(ring(), torch.zeros(5, 2), levels=3)
    known = known._replace(arc=torch.tensor([0, 1, 0, 1, 1]), weight=torch.tensor([0.5, 1.0, 1.5, 2.0, 0.0]).double())
    squares = torch.tensor([4.0, 3.0, 2.0, 6.0, 100.0]).double()
    assert on_each_arc(squares, known).tolist() == pytest.approx([2.5, 5.0])
    overflows = on_each_arc(torch.tensor([math.nan, 3.0, 2.0, math.inf, 1.0]).double(), known)
    assert overflows.tolist() == [math.inf, math.inf]


def test_single_noises_count_as_they_are():
    known = reference(ring(), pairs(6, 2)[:, 0])
    squares = squared_errors(Runs(ring(), "euler", known.noise)(FEW)[0], known.ends)
    torch.testing.assert_close(on_each_arc(squares, known), squares)
