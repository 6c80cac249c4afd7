import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from counting import Counting
from fewstep.denoiser import Denoiser
from fewstep.endpoint import Reference, Runs, mean_square, reference
from fewstep.free import free_schedules
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP, Linear
from fewstep.refine import bounds_of, descend
from fewstep.schedule import Schedule, bend, karras, log_linear, unbend
from fewstep.solvers import evaluations_of
from fewstep.tailor import LEARNED_CURVES, fit_curve, learned_curves
from fewstep.verdict import REPETITIONS, entrants, guard, interval, ratio, sentences, settle, squares_of

LIMITS = {"sigma_min": 0.002, "sigma_max": 80.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


class Overflowing(Denoiser):
    """Another denoiser that overflows just at one level."""

    def __init__(self, denoiser: Denoiser, level: float):
        super().__init__()
        self.denoiser, self.path, self.shape, self.level = denoiser, denoiser.path, denoiser.shape, level

    def forward(self, x, t, cond=None):
        y = self.denoiser(x, t, cond)
        return y * math.inf if abs(float(self.path.ratio(t)) / self.level - 1) < 1e-6 else y


def settled(schedule: Schedule, **more) -> Schedule:
    """With the provenance that a tailored schedule has."""
    return replace(schedule, name="learned (euler)", provenance=LIMITS | more)


def judge(
    model: Denoiser, solver: str, schedule: Schedule, steps: list[int], known: Reference, *, default=None, **about
) -> dict:
    """The verdict of one round, on these noises."""

    def squares(k: int, count: int, grids: dict) -> tuple[dict, int]:
        assert (k, count) == (0, len(known.noise))
        found, spent = squares_of(model, solver, grids, known, **about)
        return found, known.evaluations + spent

    return settle(entrants(schedule, steps, default), squares, solver, len(known.noise), 0)


GOOD = settled(free_schedules(0.002, 80.0)["kl_optimal to data"])  # the best free one, of Euler on the ring
BAD = settled(Schedule([0.0, 1.0], torch.atan(torch.tensor([0.3, 0.002])), to_data=True))


@pytest.fixture(scope="module")
def known() -> Reference:
    return reference(ring(), noise(48))


# --- the interval -----------------------------------------------------------------------------------------------------


def paired(m: int, trial: int) -> tuple[Tensor, Tensor]:
    """Squared errors of two schedules on the same noises: shared difficulty, and a true ratio of root mean squares of 0.8."""
    rng = np.random.default_rng(trial)
    hard = rng.gamma(2.0, 1.0, m)
    ours, theirs = 0.64 * hard * rng.gamma(4.0, 0.25, m), hard * rng.gamma(4.0, 0.25, m)
    return torch.from_numpy(ours), torch.from_numpy(theirs)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    found = [ratio(*paired(100, trial), resamplings=500) for trial in range(250)]
    covered = np.mean([each["low"] <= 0.8 <= each["high"] for each in found])
    assert 0.90 <= covered <= 0.98
    assert np.mean([each["ratio"] for each in found]) == pytest.approx(0.8, rel=0.01)
    # no wider than the spread of the ratio over trials asks for
    width = np.mean([each["high"] - each["low"] for each in found])
    assert width == pytest.approx(2 * 1.96 * np.std([each["ratio"] for each in found]), rel=0.15)
    assert all(each["low"] < each["ratio"] < each["high"] for each in found)


def test_the_pairs_are_resampled_together():
    ours, theirs = paired(100, 0)
    together = ratio(ours, theirs)
    apart = ratio(ours, theirs[torch.randperm(100, generator=seeded(0))])
    assert together["ratio"] == pytest.approx(apart["ratio"], rel=1e-12)
    assert together["high"] - together["low"] < 0.8 * (apart["high"] - apart["low"])
    # of errors in one fixed ratio nothing is uncertain
    exact = ratio(0.25 * theirs, theirs)
    assert (exact["low"], exact["ratio"], exact["high"]) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)


def test_more_noises_narrow_the_interval_by_the_root():
    widths = [np.mean([np.diff([*map(ratio(*paired(m, i)).get, ("low", "high"))]) for i in range(10)]) for m in (50, 800)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_the_ratio_is_of_root_mean_squares_and_has_a_direction():
    ours, theirs = torch.tensor([1.0, 3.0]).double(), torch.tensor([16.0, 16.0]).double()
    assert ratio(ours, theirs)["ratio"] == pytest.approx(math.sqrt(2 / 16))
    assert ratio(theirs, ours)["ratio"] == pytest.approx(math.sqrt(16 / 2))
    assert ratio(ours, torch.zeros(2).double())["ratio"] > 1e100  # no division by zero


# --- the judgement of a deterministic solver --------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VE(), VP(), Linear()], ids=["VE", "VP", "Linear"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_errors_are_the_endpoint_errors_of_every_grid_and_are_counted(path, solver):
    model, ticks = Counting(ring(path=path)), []
    pure = path.ends_in_pure_noise()
    own = {"sigma_min": path.sigma_min, "sigma_max": path.sigma_max}
    grid = torch.tensor([float(path.angle(1.0)), 0.9, 0.3], dtype=torch.float64)
    schedule = replace(log_linear(**own), grids={3: grid}, provenance=own, pure_noise=pure)
    known = reference(model.denoiser, noise(20))
    verdict = judge(model, solver, schedule, [3, 5], known, tick=ticks.append)
    free = free_schedules(**own, steps=[3, 5], pure_noise=pure)
    assert len(free) == 13
    assert verdict["measure"] == "endpoint error"
    assert verdict["noises"] == 20
    assert list(verdict["steps"]) == ["3", "5"]
    spent = sum(len(known.noise) * 14 * evaluations_of(solver, n) for n in (3, 5))
    spent -= 20 * 2 * 14 * (pure and solver == "heun")  # which asks once on a step from pure noise
    assert verdict["evaluations"] - known.evaluations == model.samples == sum(ticks) == spent
    runs = Runs(ring(path=path), solver, known.noise)
    for n in (3, 5):
        row = verdict["steps"][str(n)]
        assert set(row["errors"]) == {"learned", *free}
        for name, s in {"learned": schedule, **free}.items():
            exact = math.sqrt(mean_square(runs, s.angles(n)[:-1], known.ends))
            assert row["errors"][name] == pytest.approx(exact, rel=1e-9)
        best = min(free, key=lambda name: row["errors"][name])
        assert row["best_free"] == best
        assert row["against_best_free"]["ratio"] == pytest.approx(row["errors"]["learned"] / row["errors"][best], rel=1e-9)
        assert "against_default" not in row


def test_the_models_default_is_judged_as_it_is_called(known):
    asked = []

    def default(n: int) -> Tensor:
        asked.append(n)
        return karras(0.02, 60.0).angles(n)[:-1]

    model = Counting(ring())
    verdict = judge(model, "euler", GOOD, [4, 7], known, default=default)
    assert asked == [4, 7]
    assert model.samples == 48 * 15 * 11
    runs = Runs(ring(), "euler", known.noise)
    for n in (4, 7):
        row = verdict["steps"][str(n)]
        exact = math.sqrt(mean_square(runs, default(n), known.ends))
        assert row["errors"]["default"] == pytest.approx(exact, rel=1e-9)
        assert row["against_default"]["ratio"] == pytest.approx(row["errors"]["learned"] / exact, rel=1e-9)
        assert row["best_free"] != "default"
    assert "of the model's default's" in sentences(verdict)[0]


def test_the_models_default_does_not_stand_in_for_the_best_free_schedule(known):
    verdict = judge(ring(), "euler", BAD, [4], known, default=lambda n: GOOD.angles(n)[:-1] * 0.98)
    assert verdict["steps"]["4"]["best_free"] in free_schedules(**LIMITS, steps=[4])


def test_free_schedules_are_judged_over_the_range_that_was_learned(known):
    narrow = settled(log_linear(0.02, 40.0), sigma_min=0.02, sigma_max=40.0)
    row = judge(ring(), "euler", narrow, [4], known)["steps"]["4"]
    runs = Runs(ring(), "euler", known.noise)
    expected = math.sqrt(mean_square(runs, karras(0.02, 40.0).angles(4)[:-1], known.ends))
    assert row["errors"]["karras"] == pytest.approx(expected, rel=1e-9)
    assert row["errors"]["learned"] == pytest.approx(row["errors"]["log_linear"], rel=1e-9)
    # without provenance, the curve's own
    other = judge(ring(), "euler", log_linear(0.02, 40.0), [4], known)["steps"]["4"]
    assert other["errors"] == pytest.approx(row["errors"], rel=1e-9)


def test_conditions_and_batches_do_not_matter_to_whom_they_should_not(known):
    one, two = (judge(ring(), "dpmpp_2m", GOOD, [4], known, batch_size=size)["steps"]["4"] for size in (512, 7))
    assert one["errors"] == pytest.approx(two["errors"], rel=1e-9)


class Labelled(Denoiser):
    """A Gaussian at 50 times the row's label."""

    path, shape = VE(), (2,)

    def forward(self, x, t, cond=None):
        assert cond["label"].shape == (len(x),)
        far = 50 * cond["label"][:, None].to(x)
        return Mixture([[0.3, -0.2]], 0.5)(x - far, t) + far


@pytest.mark.parametrize("solver", ["euler", "ancestral"])
def test_conditions_are_dealt_out_as_in_the_reference(solver):
    label = {"label": torch.tensor([0.0, 1.0, 2.0])}
    known = reference(Labelled(), noise(50), label)
    row = judge(Labelled(), solver, settled(log_linear()), [12], known, cond=label, batch_size=9)["steps"]["12"]
    assert row["errors"]["log_linear"] < 3  # 20 and more with the wrong ones


# --- of a stochastic one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "path"), [("ancestral", VE()), ("ancestral", Linear()), ("dpmpp_2m_sde", VE())])
def test_a_stochastic_solver_is_judged_by_its_samples_distance_and_counted(solver, path):
    model, ticks = Counting(ring(path=path)), []
    known = reference(model.denoiser, noise(40))
    own = settled(replace(log_linear(), pure_noise=path.ends_in_pure_noise()))
    verdict = judge(model, solver, own, [2, 12], known, seed=3, tick=ticks.append)
    assert verdict["measure"] == "energy distance"
    assert verdict["evaluations"] - known.evaluations == model.samples == sum(ticks) == 40 * 14 * REPETITIONS * 14
    few, many = (verdict["steps"][n]["errors"]["log_linear"] for n in ("2", "12"))
    assert many < 0.5 * few


def test_every_schedule_meets_the_same_noises_of_a_stochastic_solver(known):
    own = settled(log_linear())
    row = judge(ring(), "ancestral", own, [5], known, seed=1)["steps"]["5"]
    assert row["errors"]["learned"] == row["errors"]["log_linear"]
    again = judge(ring(), "ancestral", own, [5], known, seed=1)["steps"]["5"]
    assert again == row
    other = judge(ring(), "ancestral", own, [5], known, seed=2)["steps"]["5"]
    assert other["errors"]["learned"] != row["errors"]["learned"]


def test_a_bad_schedule_of_a_stochastic_solver_is_replaced_and_a_good_one_kept(known):
    # a start at sigma = 0.3 misses most of the ring
    bad = judge(ring(), "ancestral", BAD, [6], known)
    assert bad["steps"]["6"]["against_best_free"]["low"] > 1
    kept = guard(BAD, bad)
    assert kept.provenance["verdict"]["kept"]["6"] == bad["steps"]["6"]["best_free"]


# --- the guard --------------------------------------------------------------------------------------------------------


def test_a_grid_that_loses_is_replaced_exactly_by_the_best_free_one_and_the_verdict_says_so(known):
    schedule = replace(BAD, grids={4: torch.atan(torch.tensor([0.2, 0.1, 0.05, 0.01]))})
    verdict = judge(ring(), "euler", schedule, [4, 6], known)
    kept = guard(schedule, verdict)
    free = free_schedules(**LIMITS, steps=[4, 6])
    for n, line in zip((4, 6), sentences(kept.provenance["verdict"]), strict=True):
        best = verdict["steps"][str(n)]["best_free"]
        assert kept.provenance["verdict"]["kept"][str(n)] == best
        assert torch.equal(kept.angles(n), free[best].angles(n))
        assert line.startswith(f"{n} steps of euler: endpoint error ")
        assert f"best free schedule's ({best})" in line
        error = verdict["steps"][str(n)]["errors"][best]
        assert line.endswith(f"; it does not win, so the file keeps {best}, {error:.4g}")
    # the other numbers of steps and what went in stay as they were
    assert torch.equal(kept.angles(5), schedule.angles(5))
    assert set(schedule.grids) == {4}
    assert "verdict" not in schedule.provenance
    assert "kept" not in verdict
    # judged again, it is as good as the best
    again = judge(ring(), "euler", kept, [4, 6], known)
    for n in ("4", "6"):
        assert again["steps"][n]["against_best_free"]["ratio"] == pytest.approx(1, rel=1e-12)


def test_a_learned_curve_that_does_best_of_all_is_kept_in_the_schedules_place():
    model = Mixture([[0.0, 0.0]], 0.1)  # far from the unit variance that free schedules are made for
    known = reference(model, noise(48))
    schedule = replace(fit_curve(model, "euler", known, budget=7000), u=BAD.u, theta=BAD.theta)
    verdict = judge(model, "euler", schedule, [6], known)
    row, curves = verdict["steps"]["6"], learned_curves(schedule)
    runs = Runs(model, "euler", known.noise)
    for name in LEARNED_CURVES:
        expected = math.sqrt(mean_square(runs, curves[name].angles(6)[:-1], known.ends))
        assert row["errors"][name] == pytest.approx(expected, rel=1e-9)
    kept = guard(schedule, verdict)
    best = min(row["errors"], key=row["errors"].get)
    assert best in LEARNED_CURVES
    assert row["best_free"] in free_schedules(**LIMITS, steps=[6])
    assert kept.provenance["verdict"]["kept"] == {"6": best} == {"6": row["best_rival"]}
    assert torch.equal(kept.angles(6), curves[best].angles(6))
    assert sentences(kept.provenance["verdict"])[0].endswith(
        f"; better still, so the file keeps the curve of {best}, {row['errors'][best]:.4g}"
    )


def test_another_refinement_that_does_best_of_all_is_kept_in_the_schedules_place(known):
    note = {"evaluations": 0, "from": "karras", "moved": True, "others": {"karras": winning(known).tolist()}}
    schedule = replace(GOOD, grids={4: BAD.angles(4)[:-1]}, provenance=LIMITS | {"refined": {"4": note}})
    entered = entrants(schedule, [4, 6])
    assert "refined from karras" in entered[4]
    assert "refined from karras" not in entered[6]
    verdict = judge(ring(), "euler", schedule, [4, 6], known)
    row = verdict["steps"]["4"]
    assert row["best_rival"] == "refined from karras"
    assert row["best_free"] in free_schedules(**LIMITS, steps=[4])
    kept = guard(schedule, verdict)
    assert kept.provenance["verdict"]["kept"]["4"] == "refined from karras"
    assert torch.equal(kept.angles(4)[:-1], winning(known))
    error = row["errors"]["refined from karras"]
    assert sentences(kept.provenance["verdict"])[0].endswith(
        f"; better still, so the file keeps the levels refined from karras, {error:.4g}"
    )


def winning(known: Reference) -> Tensor:
    """Four levels for Euler, better than any free ones on these noises."""
    runs = Runs(ring(), "euler", known.noise)
    return unbend(descend(runs, known.ends, bend(GOOD.angles(4)[:-1]), bounds_of(ring(), known.theta), 10_000)[0])


def test_a_schedule_that_wins_is_kept_as_it_is(known):
    grid = winning(known)
    schedule = replace(GOOD, grids={4: grid})
    verdict = judge(ring(), "euler", schedule, [4], known)
    assert verdict["steps"]["4"]["against_best_free"]["ratio"] < 1
    kept = guard(schedule, verdict)
    assert torch.equal(kept.grids[4], grid)
    assert set(kept.grids) == {4}
    assert kept.provenance["verdict"]["kept"] == {"4": "learned"}
    assert kept.provenance["verdict"]["steps"] == verdict["steps"]
    (line,) = sentences(kept.provenance["verdict"])
    assert "keeps" not in line
    assert line.startswith(f"4 steps of euler: endpoint error {verdict['steps']['4']['errors']['learned']:.4g}, ")


def test_each_number_of_steps_is_guarded_on_its_own(known):
    grid = winning(known)
    schedule = replace(BAD, grids={4: grid})
    kept = guard(schedule, judge(ring(), "euler", schedule, [4, 6], known))
    assert kept.provenance["verdict"]["kept"]["4"] == "learned"
    assert kept.provenance["verdict"]["kept"]["6"] != "learned"
    assert torch.equal(kept.grids[4], grid)


def test_a_schedule_that_is_the_best_free_one_is_kept(known):
    verdict = judge(ring(), "euler", GOOD, [5], known)
    assert verdict["steps"]["5"]["best_free"] == "kl_optimal to data"
    assert verdict["steps"]["5"]["against_best_free"] == pytest.approx({"ratio": 1, "low": 1, "high": 1}, rel=1e-12)
    assert guard(GOOD, verdict).provenance["verdict"]["kept"] == {"5": "learned"}


def test_the_guard_keeps_the_start_from_pure_noise():
    model = ring(path=Linear())
    known = reference(model, noise(32))
    bad = replace(BAD, pure_noise=True)
    kept = guard(bad, judge(model, "euler", bad, [5], known))
    assert kept.provenance["verdict"]["kept"]["5"] != "learned"
    times = kept.times(model.path, 5)
    assert times[0] == 1
    free = free_schedules(**LIMITS, steps=[5])[kept.provenance["verdict"]["kept"]["5"]]
    assert torch.equal(kept.angles(5)[1:], free.angles(5)[1:])


def test_the_sentences_tell_the_numbers_of_the_verdict():
    row = {
        "errors": {"learned": 0.012345},
        "best_free": "karras",
        "against_best_free": {"ratio": 0.414, "low": 0.396, "high": 0.447},
        "against_default": {"ratio": 1.5, "low": 1.25, "high": 1.754},
    }
    verdict = {"solver": "heun", "measure": "endpoint error", "steps": {"6": row}}
    assert sentences(verdict) == [
        "6 steps of heun: endpoint error 0.01235, 0.41 [0.40, 0.45] of the best free schedule's (karras), "
        "1.50 [1.25, 1.75] of the model's default's"
    ]


def test_a_guarded_schedule_comes_back_from_its_file_with_its_verdict(known, tmp_path):
    kept = guard(BAD, judge(ring(), "euler", BAD, [4, 6], known))
    kept.save(tmp_path / "s.json")
    back = Schedule.load(tmp_path / "s.json")
    assert back.provenance == kept.provenance
    assert torch.equal(back.angles(6), kept.angles(6))
    assert sentences(back.provenance["verdict"]) == sentences(kept.provenance["verdict"])


# --- overflow ---------------------------------------------------------------------------------------------------------


def test_a_free_schedule_that_overflows_is_not_the_best_and_a_learned_one_that_does_is_not_kept(known):
    level = float(karras().sigmas(6)[3])
    verdict = judge(Overflowing(ring(), level), "euler", GOOD, [6], known)
    assert verdict["steps"]["6"]["errors"]["karras"] == math.inf
    assert verdict["steps"]["6"]["best_free"] == "kl_optimal to data"
    level = float(GOOD.sigmas(6)[3])
    model = Overflowing(ring(), level)
    verdict = judge(model, "euler", GOOD, [6], known)
    kept = guard(GOOD, verdict)
    assert kept.provenance["verdict"]["kept"]["6"] not in ("learned", "kl_optimal to data")
    assert math.isfinite(mean_square(Runs(model, "euler", known.noise), kept.angles(6)[:-1], known.ends))


def test_a_verdict_on_a_free_schedule_that_overflows_can_be_saved(known, tmp_path):
    model = Overflowing(ring(), float(karras().sigmas(6)[3]))
    verdict = judge(model, "euler", GOOD, [6], known)
    guard(GOOD, verdict).save(tmp_path / "s.json")


def test_a_verdict_on_a_learned_grid_that_overflows_reads_the_same_from_its_file(known, tmp_path):
    kept = guard(GOOD, judge(Overflowing(ring(), float(GOOD.sigmas(6)[3])), "euler", GOOD, [6], known))
    kept.save(tmp_path / "s.json")
    (line,) = sentences(Schedule.load(tmp_path / "s.json").provenance["verdict"])
    assert [line] == sentences(kept.provenance["verdict"])
    assert "endpoint error inf" in line


def test_one_grid_that_overflows_does_not_end_the_judgement_of_a_stochastic_solver(known):
    model = Overflowing(ring(), float(karras().sigmas(6)[3]))
    verdict = judge(model, "ancestral", GOOD, [6], known)
    assert verdict["steps"]["6"]["errors"]["karras"] == math.inf


# --- how many noises it takes -----------------------------------------------------------------------------------------


GRIDS = {5: {name: torch.tensor([1.0]) for name in ("learned", "default", "good", "fair", "bad")}}


def scale(name: str, learned: float) -> float:
    """Of a schedule's squared errors."""
    return {"learned": learned, "default": 9.0, "good": 1.0, "fair": 1.3, "bad": 100.0}[name]


def errors(learned: float, heavy: bool = True, asked: list | None = None):
    """Squared errors with shared difficulty, exponential or with tails so heavy that some dozens do not settle a factor."""

    def squares(k: int, count: int, grids: dict) -> tuple[dict, int]:
        rng = np.random.default_rng(k)
        hard = rng.pareto(1.2, count) if heavy else np.ones(count)
        found = {n: {} for n in grids}
        for n, entered in grids.items():
            for name in ("learned", "default", "good", "fair", "bad"):
                own = rng.gamma(0.3, 1 / 0.3, count) if heavy else rng.gamma(400.0, 1 / 400, count)
                if name in entered:
                    found[n][name] = torch.from_numpy(scale(name, learned) * hard * own)
        if asked is not None:
            asked.append((count, {n: set(entered) for n, entered in grids.items()}))
        return found, count

    return squares


@pytest.mark.parametrize("learned", [0.25, 4.0, 1.0], ids=["wins", "loses", "a narrow tie"])
def test_a_verdict_that_decides_asks_once(learned):
    asked: list = []
    verdict = settle(GRIDS, errors(learned, heavy=False, asked=asked), "euler", 64, 3)
    assert asked == [(64, {5: set(GRIDS[5])})]
    row = verdict["steps"]["5"]
    assert (verdict["noises"], verdict["evaluations"], row["best_free"]) == (64, 64, "good")
    assert row["against_best_free"]["ratio"] == pytest.approx(math.sqrt(learned), rel=0.02)
    assert row["against_default"]["ratio"] == pytest.approx(math.sqrt(learned / 9), rel=0.02)
    assert "given_up" not in row


def test_a_verdict_goes_on_while_it_is_open_which_alternative_is_the_best():
    """The learned levels have lost after the first round; which of two free ones to keep is not known by then."""
    asked: list = []
    verdict = settle(GRIDS, errors(50.0, asked=asked), "euler", 64, 3)
    assert [count for count, _ in asked] == [64, 64, 128, 256]
    assert all({"learned", "good", "fair"} <= names[5] for _, names in asked)
    assert verdict["steps"]["5"]["against_best_free"]["low"] > 1
    asked.clear()
    settle(GRIDS, errors(50.0, heavy=False, asked=asked), "euler", 64, 3)
    assert len(asked) == 1


def test_an_undecided_verdict_doubles_its_noises_to_a_limit_keeps_the_earlier_ones_and_counts_all():
    asked: list = []
    squares = errors(1.0, asked=asked)
    verdict = settle(GRIDS, squares, "euler", 64, 3)
    assert [count for count, _ in asked] == [64, 64, 128, 256]
    assert (verdict["noises"], verdict["evaluations"]) == (512, 512)
    rounds = [squares(k, count, GRIDS)[0][5] for k, count in enumerate((64, 64, 128, 256))]
    row = verdict["steps"]["5"]
    for name in ("learned", "good"):
        together = torch.cat([each[name] for each in rounds])
        assert row["errors"][name] == pytest.approx(math.sqrt(float(together.mean())), rel=1e-12)
    assert row["against_best_free"] == ratio(
        *(torch.cat([each[name] for each in rounds]) for name in ("learned", row["best_free"]))
    )


def test_what_is_clearly_worse_leaves_the_race_and_its_error_is_of_the_noises_that_it_saw():
    asked: list = []
    verdict = settle(GRIDS, errors(1.0, asked=asked), "euler", 64, 3)
    first, *later = (set(entered[5]) for _, entered in asked)
    assert first == set(GRIDS[5])
    assert all("bad" not in names and {"learned", "default", "good"} <= names for names in later)
    row = verdict["steps"]["5"]
    assert row["given_up"]["bad"] == 64
    assert row["best_free"] in ("good", "fair")
    assert row["errors"]["bad"] == pytest.approx(math.sqrt(float(errors(1.0)(0, 64, GRIDS)[0][5]["bad"].mean())), rel=1e-12)


def test_the_best_free_schedule_hardly_ever_leaves_the_race():
    def stayed(trial: int) -> list[bool]:
        asked: list = []
        squares = errors(1.0, asked=asked)
        settle(GRIDS, lambda k, m, g: squares(10 * trial + k, m, g), "euler", 64, 4)
        return ["good" in names[5] for _, names in asked[1:]][-1:]

    found = [last for trial in range(80) for last in stayed(trial)]
    assert len(found) > 40
    assert sum(found) >= 0.93 * len(found)


def test_each_number_of_steps_leaves_when_it_is_decided():
    asked: list = []
    both = {4: GRIDS[5], 5: GRIDS[5]}
    sure, unsure = errors(0.25, heavy=False), errors(1.0)

    def squares(k: int, count: int, grids: dict) -> tuple[dict, int]:
        asked.append(set(grids))
        return {n: (sure if n == 4 else unsure)(k, count, {n: grids[n]})[0][n] for n in grids}, count

    verdict = settle(both, squares, "euler", 64, 2)
    assert asked == [{4, 5}, {5}, {5}]
    assert verdict["steps"]["4"]["against_best_free"]["high"] < 1
    assert (verdict["steps"]["4"]["noises"], verdict["steps"]["5"]["noises"], verdict["noises"]) == (64, 256, 256)


def test_an_entrant_that_overflows_leaves_the_race():
    asked: list = []
    squares = errors(1.0, asked=asked)

    def wild(k: int, count: int, grids: dict) -> tuple[dict, int]:
        found, spent = squares(k, count, grids)
        if "fair" in found[5]:
            found[5]["fair"][0] = math.inf
        return found, spent

    verdict = settle(GRIDS, wild, "euler", 64, 2)
    assert verdict["steps"]["5"]["given_up"]["fair"] == 64
    assert verdict["steps"]["5"]["errors"]["fair"] == math.inf


def test_a_schedule_is_made_for_the_range_of_its_provenance_or_else_of_its_curve():
    assert log_linear(0.02, 40.0).made_for() == (0.02, 40.0)
    bare = Schedule([0.0, 1.0], torch.atan(torch.tensor([30.0, 0.1])))
    assert bare.made_for() == pytest.approx((0.1, 30.0), rel=1e-6)
    assert settled(bare, sigma_max=80.0).made_for()[1] == 80.0


def test_a_ratio_of_distances_that_are_next_to_nothing_is_no_number_of_a_hundred_digits():
    some, nothing = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([-1.0, 0.5, -0.1]).double()
    assert ratio(nothing, some)["ratio"] == 0
    assert ratio(some, nothing)["ratio"] == math.inf
    assert ratio(nothing, nothing)["ratio"] == 1
    row = {"ratio": math.inf, "low": 0.5, "high": math.inf}
    assert interval(row) == "inf [0.50, inf]"
    assert 0 < ratio(some, nothing)["low"] <= ratio(some, nothing)["high"] == math.inf
