import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import Counting
from fewstep.denoiser import Guided
from fewstep.dynamic import BLIND, LEAST, MOST, SHARE, TEACHER, best_route, grid_of
from fewstep.endpoint import Midway, Reference, Runs, mean_square, reference
from fewstep.free import free_schedules
from fewstep.mixture import ring
from fewstep.path import VE, Cosine, Linear
from fewstep.schedule import Schedule, karras, log_linear
from fewstep.solvers import SOLVERS, STOCHASTIC, solve

CHOSEN_FOR = sorted(set(SOLVERS) - set(STOCHASTIC) - set(BLIND))
LOW, HIGH = 0.03, 20.0


def known_of(model, count: int = 64) -> Reference:
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return reference(model, noise, sigma_min=LOW, sigma_max=HIGH)


def ends_of(model) -> list[Schedule]:
    return list(free_schedules(LOW, HIGH, pure_noise=model.path.ends_in_pure_noise()).values())


@pytest.fixture(scope="module")
def model():
    return ring(path=VE(LOW, HIGH))


@pytest.mark.parametrize("solver", CHOSEN_FOR)
def test_of_two_steps_none_of_the_levels_has_a_smaller_endpoint_error(model, solver):
    known, starts = known_of(model), ends_of(model)
    chosen, _ = best_route(model, solver, 2, known, starts, budget=100_000)
    theta, (_, place) = grid_of(starts, known, 2, False)
    runs = Runs(model, solver, known.noise[-MOST:])
    errors = {j: mean_square(runs, theta[[0, j]], known.ends[-MOST:]) for j in place}
    assert len(errors) > 5
    torch.testing.assert_close(chosen, theta[[0, min(errors, key=errors.get)]])


@pytest.mark.parametrize("solver", CHOSEN_FOR)
def test_of_more_steps_it_is_the_forward_search_that_asks_the_model_anew(model, solver):
    known, starts, steps = known_of(model), ends_of(model), 4
    chosen, _ = best_route(model, solver, steps, known, starts, budget=100_000)
    theta, places = grid_of(starts, known, steps, False)
    times = torch.cat([model.path.time(theta), torch.zeros(1)])
    noise = model.path.start_from(known.noise[-MOST:], times[0])
    asked = []

    def log(x, t):
        asked.append(x)
        return model(x, t)

    list(SOLVERS[TEACHER](log, noise, model.path, times, torch.randn_like))
    passed = [*asked, known.ends[-MOST:]]
    ways = {0: [0]}
    for place in [*places[1:], [len(theta)]]:
        longer = {}
        for j in place:
            found = [[*way, j] for way in ways.values() if way[-1] < j]
            away = [float(((solve(model, noise, times[way], solver).x - passed[j]) ** 2).sum()) for way in found]
            if found:
                longer[j] = found[away.index(min(away))]
        ways = longer
    torch.testing.assert_close(chosen, theta[ways[len(theta)][:-1]])


def test_the_levels_end_near_the_best_that_all_free_schedules_reach(model):
    known, starts, steps = known_of(model, 528), ends_of(model), 6
    runs = Runs(model, "dpmpp_2m", known.noise[:512])
    chosen, _ = best_route(model, "dpmpp_2m", steps, known, starts, budget=15_000)
    error = mean_square(runs, chosen, known.ends[:512])
    free = min(mean_square(runs, each.angles(steps)[:-1], known.ends[:512]) for each in starts)
    assert math.sqrt(error / free) < 0.8


@pytest.mark.parametrize("budget", [3000, 15_000, 100_000])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("path", [VE(LOW, HIGH), Cosine(), Linear()])
def test_it_keeps_to_its_share_of_the_budget_and_counts_truly(path, steps, budget):
    model = Counting(ring(path=path))
    known, starts, ticks = known_of(model), ends_of(model), []
    before = model.samples
    chosen, spent = best_route(model, "unipc", steps, known, starts, budget=budget, tick=ticks.append)
    assert spent == model.samples - before == sum(ticks) <= SHARE * budget
    assert (chosen is None) == (spent == 0)
    if chosen is not None:
        assert len(chosen) == steps
        assert bool((chosen.diff() < 0).all())
        torch.testing.assert_close(chosen[0], starts[0].angles(steps)[0])


def test_a_budget_that_is_too_small_for_it_is_left_to_others(model):
    known, starts = known_of(model), ends_of(model)
    theta, places = grid_of(starts, known, 6, False)
    least = LEAST * (len(theta) + sum(len(place) for place in places[1:]))
    assert best_route(model, "euler", 6, known, starts, budget=int(least / SHARE) - 10) == (None, 0)
    chosen, spent = best_route(model, "euler", 6, known, starts, budget=int(least / SHARE) + 10)
    assert chosen is not None
    assert 0 < spent <= least


@pytest.mark.parametrize("solver", BLIND)
def test_solvers_whose_steps_ask_where_they_end_have_none(model, solver):
    assert best_route(model, solver, 5, known_of(model), ends_of(model), budget=100_000) == (None, 0)


def test_each_noise_keeps_its_condition_and_guidance_counts_twice():
    class Labelled(Counting):
        def forward(self, x, t, cond=None):
            assert cond is not None
            return super().forward(x, t) + cond["shift"]

    model = Labelled(ring(path=VE(LOW, HIGH)))
    cond = {"shift": torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None].expand(7, 2)}
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = reference(model, noise, cond, sigma_min=LOW, sigma_max=HIGH)
    runs = Runs(model, "euler", noise[-MOST:], {"shift": cond["shift"][torch.arange(64)[-MOST:] % 7]})
    chosen, spent = best_route(model, "euler", 2, known, ends_of(model), cond=cond, budget=100_000)
    theta, (_, place) = grid_of(ends_of(model), known, 2, False)
    errors = [mean_square(runs, theta[[0, j]], known.ends[-MOST:]) for j in place]
    assert mean_square(runs, chosen, known.ends[-MOST:]) == pytest.approx(min(errors))
    guided = Guided(model, 2.0, {"shift": torch.zeros(1, 2, dtype=torch.float64)})
    again = reference(guided, noise, cond, sigma_min=LOW, sigma_max=HIGH)
    assert best_route(guided, "euler", 2, again, ends_of(model), cond=cond, budget=100_000)[1] == 2 * spent


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("which", [0, 1])
def test_levels_at_which_the_model_overflows_are_passed_by(model, solver, which):
    known, starts = known_of(model), ends_of(model)
    theta, places = grid_of(starts, known, 4, False)
    usual, _ = best_route(model, solver, 4, known, starts, budget=100_000)
    broken = theta[places[1][which]]
    assert not bool(torch.isclose(usual, broken).any())

    class Breaking(Counting):
        """At one level, but not when the teacher comes by, who is the first."""

        met = 0

        def forward(self, x, t, cond=None):
            y, there = super().forward(x, t, cond), bool(torch.isclose(self.path.angle(t), broken))
            self.met += there
            return y * math.inf if there and self.met > 1 else y

    breaking = Breaking(model)
    chosen, _ = best_route(breaking, solver, 4, known, starts, budget=100_000)
    assert breaking.met > 1
    torch.testing.assert_close(chosen, usual)


def test_pictures_begin_where_they_are_noised_to(model):
    midway = Midway(model, 2.0, LOW, HIGH)
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = reference(midway, noise, sigma_min=LOW)
    chosen, _ = best_route(midway, "dpmpp_2m", 4, known, list(free_schedules(LOW, 2.0).values()), budget=15_000)
    assert float(torch.tan(chosen[0])) == pytest.approx(2.0)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 40),
    rhos=st.lists(st.floats(0.5, 20), min_size=1, max_size=3),
    lift=st.floats(1, 500),
    pure=st.booleans(),
)
def test_there_is_always_a_route(steps, rhos, lift, pure):
    """Even if all schedules crowd their levels into one cell of the grid."""
    crowded = [karras(LOW * lift, LOW * lift * 1.5, rho) for rho in rhos]
    known = Reference(*[torch.zeros(1)] * 2, log_linear(LOW, HIGH * 30).angles(48)[:-1], (), 0, *[torch.zeros(1)] * 2)
    theta, places = grid_of(crowded, known, steps, pure)
    assert len(places) == steps
    assert places[0] == range(1)
    assert all(0 < place[0] <= place[-1] < len(theta) for place in places[1:])
    stop = 0
    for place in places[1:]:  # the earliest stops make a route if any do
        stop = next(j for j in place if j > stop)
