import math

import numpy as np
import pytest
import torch
from torch import Tensor

from counting import Counting
from fewstep.cost import corrector_costs
from fewstep.denoiser import Denoiser, Guided, Pretrained
from fewstep.learn import learn_schedule, step_costs
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP, Cosine, Linear, Path, Tabulated
from fewstep.schedule import Schedule, karras, log_linear

TEN_STEP_OPTIMUM = [80, 49.66, 30.82, 19.13, 11.86, 7.348, 4.536, 2.774, 1.653, 0.9007, 0.002]  # of N(0, 0.5^2)
BIG = {"batch_size": 1 << 16}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(path: Path | None = None, std: float = 0.5) -> Mixture:
    return Mixture([[0.0]], std, path=path)


def gaussian_data(n: int = 20_000, std: float = 0.5) -> Tensor:
    """Data of N(0, std^2) without sampling noise: its quantiles."""
    return std * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


class Warped(Path):
    """Another path with its clock replaced: t -> t^2."""

    def __init__(self, path: Path):
        self.path, self.sigma_min, self.sigma_max = path, path.sigma_min, path.sigma_max

    def alpha(self, t):
        return self.path.alpha(torch.as_tensor(t).double() ** 2)

    def sigma(self, t):
        return self.path.sigma(torch.as_tensor(t).double() ** 2)

    def rates(self, t):
        t = torch.as_tensor(t).double()
        return tuple(2 * t * rate for rate in self.path.rates(t**2))

    def time(self, theta):
        return self.path.time(theta).sqrt()


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_a_gaussian() -> Schedule:
    return learn_schedule(gaussian(), gaussian_data(), probes=200, draws=4096, generator=seeded(0), **BIG)


def test_a_gaussians_schedule_has_its_closed_form_length_and_levels(of_a_gaussian):
    assert of_a_gaussian.provenance["Lambda"] == pytest.approx(9.5367, rel=0.01)
    assert of_a_gaussian.sigmas(11)[:-1].tolist() == pytest.approx(TEN_STEP_OPTIMUM, rel=0.02)
    assert of_a_gaussian.sigmas(11)[-1] == 0
    assert not of_a_gaussian.pure_noise


def test_the_errors_that_are_reported_are_of_the_size_of_the_true_ones(of_a_gaussian):
    about = of_a_gaussian.provenance
    levels = np.geomspace(80, 0.002, 200)  # the finite cost of the probes themselves, in closed form
    s, cleaner = levels[:-1], levels[1:]
    second_moment = float((gaussian_data() ** 2).mean())  # of the data that were drawn, not of their distribution
    exact = (cleaner * np.sqrt(second_moment + s**2) * (1 / (0.25 + cleaner**2) - 1 / (0.25 + s**2))).sum()
    assert 0 < about["Lambda_error"] < 0.02
    assert abs(about["Lambda"] - exact) < 4 * about["Lambda_error"] + 1e-5
    assert 0 < about["split_half_error"] < 0.03


def test_the_standard_error_of_the_length_is_its_spread_over_seeds():
    runs = [
        learn_schedule(gaussian(), gaussian_data(), probes=30, draws=64, generator=seeded(i), **BIG).provenance
        for i in range(40)
    ]
    spread = np.std([run["Lambda"] for run in runs], ddof=1)
    assert np.mean([run["Lambda_error"] for run in runs]) == pytest.approx(spread, rel=0.4)


def test_a_point_mass_gives_log_uniform_levels():
    mean = torch.linspace(-0.7, 0.7, 8, dtype=torch.float64)
    schedule = learn_schedule(Mixture(mean[None], 0.0), mean.expand(10, 8), draws=2048, generator=seeded(1), **BIG)
    for steps in (3, 10, 40):
        torch.testing.assert_close(schedule.sigmas(steps), log_linear().sigmas(steps), rtol=0.01, atol=0)
    # sqrt(delta) = 2 sqrt(d)/s, up to the width of a probe step
    assert schedule.provenance["Lambda"] == pytest.approx(2 * math.sqrt(8) * math.log(80 / 0.002), rel=0.01)
    assert schedule.provenance["probe_step_variation"] < 0.02


def test_an_anisotropic_gaussians_lengths_add_up_over_its_spectrum():
    spectrum = torch.tensor([4.0, 1.0, 0.09, 0.0004], dtype=torch.float64)
    mixture = Mixture(torch.zeros(1, 4), spectrum.sqrt()[None])
    data = mixture.sample(50_000, seeded(2), torch.float64)
    schedule = learn_schedule(mixture, data, probes=150, draws=2048, generator=seeded(3), **BIG)
    fine = np.geomspace(80, 0.002, 20_001)
    density = np.sqrt((4 * fine[:, None] ** 4 / (spectrum.numpy() + fine[:, None] ** 2) ** 3).sum(1))
    length = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * -np.diff(fine))])
    assert schedule.provenance["Lambda"] == pytest.approx(length[-1], rel=0.01)
    shares = np.interp(-torch.tan(schedule.theta).log().numpy(), -np.log(fine), length / length[-1])
    np.testing.assert_allclose(schedule.u.numpy(), shares, atol=0.005)
    gaps = np.diff(np.interp(-schedule.sigmas(15)[:-1].log().numpy(), -np.log(fine), length))
    np.testing.assert_allclose(gaps, length[-1] / 14, rtol=0.03)


@pytest.mark.parametrize(("s", "cleaner"), [(10.0, 9.0), (1.0, 0.8), (0.5, 0.1), (0.05, 0.04)])
def test_the_cost_of_a_step_is_the_gaussians_closed_form_weighted_at_the_cleaner_level(s, cleaner):
    path = VE(0.002, 80.0)
    times = path.time(torch.atan(torch.tensor([s, cleaner], dtype=torch.float64)))
    data = Mixture(torch.zeros(1, 3), 0.5).sample(40_000, seeded(5), torch.float64)
    each = corrector_costs(Mixture(torch.zeros(1, 3), 0.5), data, times, 40_000, 1 << 16, generator=seeded(4))
    exact = 3 * cleaner**2 * (0.25 + s**2) * (1 / (0.25 + cleaner**2) - 1 / (0.25 + s**2)) ** 2
    assert each.shape == (1, 40_000)
    assert each.dtype == torch.float64
    assert float(each.mean()) == pytest.approx(exact, rel=5 * math.sqrt(2 / 3 / 40_000))


# --- invariances ------------------------------------------------------------------------------------------------------

SAME_LEVELS = {
    "VE": VE(),
    "VP": VP(),
    "Cosine": Cosine(),
    "Linear": Linear(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
}
RANGE = {"sigma_min": 0.02, "sigma_max": 60.0}


@pytest.mark.parametrize("path", SAME_LEVELS.values(), ids=SAME_LEVELS.keys())
def test_warping_a_paths_clock_leaves_the_learned_levels_where_they_are(path):
    same, other = (
        learn_schedule(ring(path=p), ring().sample(4000, seeded(0), torch.float64), generator=seeded(1), **BIG, **RANGE)
        for p in (path, Warped(path))
    )
    torch.testing.assert_close(same.angles(20), other.angles(20), rtol=1e-6, atol=0)


def test_warping_the_clock_is_harmless_with_other_draws_too():
    data = gaussian_data()
    grids = [
        torch.tan(learn_schedule(gaussian(p), data, draws=8192, generator=seeded(i), **BIG, **RANGE).angles(11)[:-1])
        for i, p in enumerate((Linear(), Warped(Linear())))
    ]
    torch.testing.assert_close(grids[0][1:], grids[1][1:], rtol=0.01, atol=0)


@pytest.mark.parametrize("path", SAME_LEVELS.values(), ids=SAME_LEVELS.keys())
def test_the_path_on_which_a_model_was_trained_does_not_matter(path):
    data = ring().sample(4000, seeded(0), torch.float64)
    here, reference = (learn_schedule(ring(path=p), data, generator=seeded(1), **BIG, **RANGE) for p in (path, VE()))
    torch.testing.assert_close(here.u, reference.u, rtol=1e-6, atol=1e-9)
    assert here.provenance["Lambda"] == pytest.approx(reference.provenance["Lambda"], rel=1e-6)


def test_scaling_data_and_levels_together_changes_nothing_but_the_units():
    data = gaussian_data()
    one = learn_schedule(gaussian(VE(0.01, 50.0)), data, generator=seeded(5), **BIG)
    ten = learn_schedule(gaussian(VE(0.1, 500.0), std=5.0), 10 * data, generator=seeded(5), **BIG)
    torch.testing.assert_close(10 * one.sigmas(20), ten.sigmas(20), rtol=1e-4, atol=0)
    assert one.provenance["Lambda"] == pytest.approx(ten.provenance["Lambda"], rel=1e-6)


def test_the_size_of_batches_does_not_bias_the_costs():
    runs = [
        learn_schedule(gaussian(), gaussian_data(), probes=40, draws=2048, batch_size=size, generator=seeded(6)).provenance
        for size in (777, 1 << 16)
    ]
    error = math.hypot(*(run["Lambda_error"] for run in runs))
    assert abs(runs[0]["Lambda"] - runs[1]["Lambda"]) < 4 * error < 0.05 * runs[0]["Lambda"]


def test_a_schedule_repeats_with_its_generator():
    one, two, three = (learn_schedule(gaussian(), gaussian_data(500), probes=20, generator=seeded(i)) for i in (7, 7, 8))
    assert torch.equal(one.u, two.u)
    assert one.provenance == two.provenance
    assert not torch.equal(one.u, three.u)


def test_single_precision_data_give_the_same_levels():
    runs = [
        learn_schedule(gaussian(), gaussian_data().to(d), draws=4096, generator=seeded(9), **BIG)
        for d in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(runs[0].sigmas(11), runs[1].sigmas(11), rtol=0.02, atol=0)


# --- what is reported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probes", "draws", "batch_size"), [(3, 4, 512), (20, 10, 7), (11, 33, 100)])
def test_evaluations_are_counted_truly(probes, draws, batch_size):
    counting = Counting(gaussian())
    schedule = learn_schedule(counting, gaussian_data(100), probes=probes, draws=draws, batch_size=batch_size)
    assert schedule.provenance["evaluations"] == counting.samples == 2 * (probes - 1) * draws


def test_the_default_costs_what_its_documentation_says():
    counting = Counting(gaussian())
    learn_schedule(counting, gaussian_data(100))
    assert counting.samples == 12_672


def test_both_halves_of_guidance_are_counted():
    class Labelled(Counting):
        def forward(self, x, t, cond=None):
            assert cond["label"].shape == (len(x),)
            return super().forward(x, t)

    counting = Labelled(gaussian())
    guided = Guided(counting, 2.0, {"label": torch.tensor([0])})
    schedule = learn_schedule(guided, gaussian_data(50), probes=5, draws=8, cond={"label": torch.ones(50)})
    assert schedule.provenance["evaluations"] == counting.samples == 2 * 2 * 4 * 8


def test_progress_sees_every_batch_once():
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    learn_schedule(gaussian(), gaussian_data(50), probes=5, draws=10, batch_size=12, progress=progress)
    assert seen == [12, 12, 12, 4]


def test_the_split_half_error_falls_with_the_number_of_draws():
    errors = [
        np.median(
            [
                learn_schedule(gaussian(), gaussian_data(), probes=40, draws=draws, generator=seeded(i), **BIG).provenance[
                    "split_half_error"
                ]
                for i in range(8)
            ]
        )
        for draws in (16, 256, 4096)
    ]
    # a sixteenth of the variance each: a quarter of the error
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] > 0


def test_the_range_is_the_paths_own_unless_given():
    path = VE(0.05, 20.0)
    own = learn_schedule(gaussian(path), gaussian_data(100), probes=10)
    given = learn_schedule(gaussian(path), gaussian_data(100), probes=10, sigma_min=0.1, sigma_max=5.0)
    for schedule, limits in ((own, (20.0, 0.05)), (given, (5.0, 0.1))):
        assert [float(schedule.sigmas(4)[0]), float(schedule.sigmas(4)[3])] == pytest.approx(limits, rel=1e-9)
        assert (schedule.provenance["sigma_max"], schedule.provenance["sigma_min"]) == limits
    assert repr(path) == own.provenance["learned_on"]


@pytest.mark.parametrize("path", [Linear(), Cosine(), Tabulated(torch.linspace(0.9999, 0, 100, dtype=torch.float64))], ids=repr)
def test_a_schedule_learned_where_the_path_ends_in_pure_noise_starts_there(path):
    schedule = learn_schedule(gaussian(path), gaussian_data(100), probes=20, generator=seeded(0))
    assert schedule.pure_noise
    with pytest.raises(ValueError, match="pure noise"):
        schedule.sigmas(10)
    times = schedule.times(path, 10)
    assert times[0] == 1
    assert path.alpha(times[0]) == 0
    assert (times.diff() < 0).all()


# --- the costs of a grid's own steps ----------------------------------------------------------------------------------


def variation(lengths: Tensor) -> float:
    return float(lengths.std() / lengths.mean())


@pytest.mark.parametrize("path", [VE(0.02, 60.0), Linear(0.02, 60.0)], ids=["VE", "Linear"])
def test_the_steps_of_a_learned_grid_cost_the_same_and_those_of_the_free_ones_do_not(path):
    model, data = gaussian(path), gaussian_data()
    schedule = learn_schedule(model, data, draws=2048, generator=seeded(0), **BIG)

    def lengths(of: Schedule) -> Tensor:
        costs = step_costs(model, data, of, 60, draws=8192, generator=seeded(1), **BIG)
        assert costs.shape == (59,)
        return costs.sqrt()

    # but for the learned grid's last one, which spans so many octaves that its cost is no longer its length squared
    learned = lengths(schedule)[:-1]
    assert variation(learned) < 0.05
    assert float(learned.sum()) == pytest.approx(schedule.provenance["Lambda"], rel=0.05)
    assert variation(lengths(log_linear(0.02, 60.0))) > 0.5
    assert variation(lengths(karras(0.02, 60.0))) > 0.25


def test_the_steps_of_a_log_linear_grid_cost_the_same_on_a_point_mass():
    mean = torch.full((1, 16), 0.7, dtype=torch.float64)
    costs = step_costs(Mixture(mean, 0.0), mean.expand(4, 16), log_linear(), 21, draws=4096, generator=seeded(2), **BIG)
    ratio = (80 / 0.002) ** (1 / 20)
    np.testing.assert_allclose(costs.numpy(), 16 * (ratio - 1 / ratio) ** 2, rtol=0.02)


def test_a_grid_of_one_step_has_no_step_between_levels():
    assert step_costs(gaussian(), gaussian_data(10), log_linear(), 1).shape == (0,)


# --- conditions -------------------------------------------------------------------------------------------------------


class Told(Denoiser):
    """Point masses at 1000 label: knows the datum only from its label, and refuses a label that is another datum's."""

    path = VE(0.01, 10.0)

    def forward(self, x, t, cond=None):
        assert set(cond) == {"label"}
        nearest = (x[:, 0] / 1000).round()
        assert torch.equal(nearest, cond["label"]), "a condition went with another datum"
        return 1000 * cond["label"][:, None].expand(x.shape)


def test_conditions_follow_their_data():
    label = torch.arange(50, dtype=torch.float64)
    data = 1000 * label[:, None].expand(50, 2)
    schedule = learn_schedule(Told(), data, cond={"label": label}, probes=30, draws=1024, generator=seeded(3), batch_size=1000)
    torch.testing.assert_close(schedule.sigmas(10), log_linear(0.01, 10.0).sigmas(10), rtol=0.03, atol=0)
    costs = step_costs(Told(), data, schedule, 10, cond={"label": label}, generator=seeded(4))
    assert variation(costs) < 0.2


def test_the_labels_of_that_test_are_checked():
    label = torch.arange(50, dtype=torch.float64)
    with pytest.raises(AssertionError, match="another datum"):
        learn_schedule(Told(), 1000 * label[:, None].expand(50, 2), cond={"label": label.flip(0)}, probes=5, draws=8)


# --- errors -----------------------------------------------------------------------------------------------------------

DATA = gaussian_data(10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"x0": torch.tensor([[0.0], [math.nan], [1.0]])}, "not finite"),
        ({"x0": torch.tensor([[0.0], [math.inf], [1.0]])}, "not finite"),
        ({"x0": DATA[:1]}, "at least 2 data points, got 1"),
        ({"x0": DATA[:0]}, "at least 2 data points, got 0"),
        ({"cost": "predictor"}, "'predictor' needs a solver"),
        ({"cost": "corector"}, "'corrector' or 'predictor', got 'corector'"),
        ({"cost": "endpoint"}, "needs a solver"),
        ({"steps": (5,)}, "leave steps out"),
        ({"start": 1.0}, "leave start out"),
        ({"cond": {"label": torch.zeros(9)}}, r"cond\['label'\] has 9 rows for 10"),
        ({"cond": {"label": torch.zeros(1)}}, "1 rows for 10"),
        ({"probes": 2}, "at least 3 probes"),
        ({"draws": 3}, "4 draws"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_at_once(arguments, says):
    counting = Counting(gaussian())
    with pytest.raises(ValueError, match=says):
        learn_schedule(counting, **({"x0": DATA} | arguments))
    assert counting.samples == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_reported_with_its_levels(value):
    path = VE(0.01, 100.0)
    below = float(path.time(math.atan(1.5)))
    net = lambda x, t: torch.where((t < below)[:, None], value, 0.0) + 0 * x  # noqa: E731
    with pytest.raises(ValueError, match="not finite between") as error:
        learn_schedule(Pretrained(net, path, "x0"), DATA, probes=5, draws=8)  # probes at 100, 10, 1, 0.1, 0.01
    assert " 10 and 1" in str(error.value)
    assert "0.1" not in str(error.value)


def test_a_model_that_ignores_the_level_is_refused():
    frozen = Pretrained(lambda x, t: 0 * x, VE(), "score")  # the same score, 0, at every level
    with pytest.raises(ValueError, match="does not depend on the level"):
        learn_schedule(frozen, DATA, probes=5, draws=8)
