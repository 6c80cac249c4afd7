"""Solvers are held to diffusers' schedulers, step for step, to their orders of convergence, and to closed forms."""

import math
from functools import cache
from typing import get_args

import pytest
import torch

from fewstep.denoiser import Denoiser, Guided, Pretrained, to_eps
from fewstep.mixture import Mixture, ring
from fewstep.path import VE, VP, Cosine, Linear, Tabulated
from fewstep.schedule import karras
from fewstep.solvers import ORDER, SOLVERS, STOCHASTIC, solve

DETERMINISTIC = [solver for solver in SOLVERS if solver not in STOCHASTIC]
F64 = torch.float64


def bump(path):
    """Smooth in x and t: three broad Gaussians in the plane."""
    return Mixture([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], [0.6, 0.8, 0.5], [0.5, 0.3, 0.2], path=path)


def log_uniform(path, high, low, steps):
    return path.time(torch.atan(torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=F64)))


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max())


# --- step for step against diffusers ------------------------------------------------------------------------------


def states(mixture, times, solver, noise, generator=None):
    return solve(mixture, noise, times, solver, keep_trajectory=True, generator=generator).trajectory


@pytest.fixture
def grid():
    """A mixture on the path of DDPM's table, 12 levels and 0 as sigma/alpha, their times, and a start of unit scale."""
    from diffusers import DDPMScheduler

    path = Tabulated(DDPMScheduler().alphas_cumprod)
    sigmas = karras(0.03, 14.0).sigmas(12)
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    return ring(path=path), sigmas, path.time(torch.atan(sigmas)), noise


def test_euler_is_euler_discrete(grid):
    from diffusers import EulerDiscreteScheduler

    mixture, sigmas, times, noise = grid
    scheduler = EulerDiscreteScheduler(prediction_type="epsilon")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas  # the very levels
    alphas, ours = mixture.path.alpha(times), states(mixture, times, "euler", noise)
    x = noise / alphas[0]
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t).double()
        eps = to_eps(mixture(model_input, times[i]), model_input, mixture.path, times[i])
        x = scheduler.step(eps, t, x).prev_sample  # in VE coordinates, rounded to float32 by diffusers
        assert relative(ours[i + 1], x * alphas[i + 1]) < 1e-6, i


@pytest.mark.parametrize("solver", ["euler", "ancestral"])
def test_euler_is_ddim_and_ancestral_is_ddpm(solver):
    from diffusers import DDIMScheduler, DDPMScheduler

    kind = DDIMScheduler if solver == "euler" else DDPMScheduler
    scheduler = kind(clip_sample=False, prediction_type="epsilon")
    scheduler.set_timesteps(20)  # indices 950, 900, .. 0, then exact data
    mixture = ring(path=Tabulated(scheduler.alphas_cumprod))
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    ours = states(mixture, times, solver, x, torch.Generator().manual_seed(5))
    theirs = torch.Generator().manual_seed(5)  # both draw one batch a step, and none on the last
    for i, t in enumerate(scheduler.timesteps):
        eps = to_eps(mixture(x, times[i]), x, mixture.path, times[i])
        x = scheduler.step(eps, int(t), x, generator=theirs).prev_sample
        assert relative(ours[i + 1], x) < 1e-5, i


def test_dpmpp_2m_is_dpm_solver_multistep(grid):
    from diffusers import DPMSolverMultistepScheduler

    mixture, sigmas, times, noise = grid
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", prediction_type="sample"
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    ours, x = states(mixture, times, "dpmpp_2m", noise), noise
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(mixture(x.double(), times[i]), t, x).prev_sample
        assert relative(ours[i + 1], x) < 1e-6, i
    # that this could fail: a first-order solver is far away
    assert relative(states(mixture, times, "euler", noise)[-1], x) > 1e-2


def test_heun_is_heun_discrete(grid):
    from diffusers import HeunDiscreteScheduler

    mixture, sigmas, times, noise = grid
    scheduler = HeunDiscreteScheduler(prediction_type="epsilon")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])  # its two stages per step
    scheduler.set_begin_index(0)
    assert len(scheduler.timesteps) == 2 * (len(sigmas) - 1) - 1
    alphas, ours = mixture.path.alpha(times), states(mixture, times, "heun", noise)
    x = noise / alphas[0]
    for call, t in enumerate(scheduler.timesteps):
        i = (call + 1) // 2  # the level that the network is asked at
        seen = x.double() * alphas[i]
        x = scheduler.step(to_eps(mixture(seen, times[i]), seen, mixture.path, times[i]), t, x).prev_sample
        if call % 2 == 1 or call == len(scheduler.timesteps) - 1:
            done = i if call % 2 == 1 else i + 1
            assert relative(ours[done], x * alphas[done]) < 1e-6, call


def test_unipc_is_unipc_multistep(grid):
    from diffusers import UniPCMultistepScheduler

    mixture, sigmas, times, noise = grid
    scheduler = UniPCMultistepScheduler(solver_order=2, solver_type="bh2", prediction_type="sample")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    ours, x = states(mixture, times, "unipc", noise), noise
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(mixture(x, times[i]), t, x).prev_sample
        assert relative(ours[i + 1], x) < 1e-11, i
    # that this could fail: without the corrector it is DPM-Solver++(2M)
    assert relative(states(mixture, times, "dpmpp_2m", noise)[-1], x) > 1e-2


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers calls np.log on tensors
def test_deis_is_deis_multistep(grid):
    from diffusers import DEISMultistepScheduler

    mixture, sigmas, times, noise = grid
    scheduler = DEISMultistepScheduler(solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    ours, x = states(mixture, times, "deis", noise), noise
    for i, t in enumerate(scheduler.timesteps[:-1]):  # it cannot step to exact data
        x = scheduler.step(to_eps(mixture(x, times[i]), x, mixture.path, times[i]), t, x).prev_sample
        assert relative(ours[i + 1], x) < 1e-11, i
    assert relative(states(mixture, times, "euler", noise)[-2], x) > 1e-2


@pytest.mark.parametrize("top", [14.0, math.inf], ids=["from sigma/alpha = 14", "from pure noise"])
def test_ipndm_is_ipndm(top):
    from diffusers import IPNDMScheduler

    path = Cosine()  # its network predicts v on a path of unit radius
    mixture = ring(path=path)
    times = path.time(torch.atan(torch.cat([torch.tensor([top], dtype=F64), karras(0.03, 10.0).sigmas(11)])))
    x = path.start(64, (2,), torch.Generator().manual_seed(3), t=times[0], dtype=F64)
    ours = states(mixture, times, "ipndm", x)
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(len(times) - 1)
    scheduler.alphas, scheduler.betas = path.alpha(times), path.sigma(times)
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps):
        a, s = path.alpha(times[i]), path.sigma(times[i])
        x0 = mixture(x, times[i])
        if a == 0:  # it divides by 1e-8 there, so take its Euler step for it
            scheduler.ets.append(x / s)
            scheduler._init_step_index(t)
            scheduler._step_index += 1
            x = path.alpha(times[i + 1]) * x0 + path.sigma(times[i + 1]) * x / s
        else:
            x = scheduler.step(a * to_eps(x0, x, path, times[i]) - s * x0, t, x).prev_sample
        assert relative(ours[i + 1], x) < 1e-11, i
    assert relative(states(mixture, times, "euler", ours[0])[-1], x) > 1e-2


def test_ancestral_is_euler_ancestral_discrete(grid):
    from diffusers import EulerAncestralDiscreteScheduler

    mixture, sigmas, times, noise = grid
    scheduler = EulerAncestralDiscreteScheduler(prediction_type="epsilon")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    alphas = mixture.path.alpha(times)
    ours = states(mixture, times, "ancestral", noise, torch.Generator().manual_seed(5))
    theirs, x = torch.Generator().manual_seed(5), noise / alphas[0]
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        eps = to_eps(mixture(model_input, times[i]), model_input, mixture.path, times[i])
        x = scheduler.step(eps, t, x, generator=theirs).prev_sample  # in VE coordinates, rounded to float32
        assert relative(ours[i + 1], x * alphas[i + 1]) < 1e-6, i


def test_dpmpp_2m_sde_is_sde_dpm_solver_multistep(grid):
    from diffusers import DPMSolverMultistepScheduler

    mixture, sigmas, times, noise = grid
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, final_sigmas_type="zero", prediction_type="sample"
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    ours, x = states(mixture, times, "dpmpp_2m_sde", noise, torch.Generator().manual_seed(5)), noise
    theirs = torch.Generator().manual_seed(5)
    for i, t in enumerate(scheduler.timesteps):
        drawn = torch.randn(x.shape, generator=theirs, dtype=F64)
        x = scheduler.step(mixture(x, times[i]), t, x, variance_noise=drawn).prev_sample  # rounded to float32
        assert relative(ours[i + 1], x) < 1e-6, i
    assert relative(states(mixture, times, "ancestral", noise, torch.Generator().manual_seed(5))[-1], x) > 1e-2


# --- orders and invariances ---------------------------------------------------------------------------------------


def slope(counts, errors):
    """-d log error / d log count, by least squares."""
    x, y = torch.tensor(counts, dtype=F64).log(), torch.tensor(errors, dtype=F64).log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


HIGH, LOW = 80.0, 0.02  # levels between which orders are measured; at HIGH a multistep solver's Euler start costs nothing


def graded(path, steps, high=HIGH, low=LOW):
    """Times whose levels fall by a ratio that is not constant."""
    return path.time(torch.atan(torch.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1, dtype=F64) ** 7))


@cache
def truth(path):
    """Noise at HIGH and where it ends at LOW: Heun's method and Richardson's extrapolation."""
    noise = path.start(64, (2,), torch.Generator().manual_seed(1), t=path.time(math.atan(HIGH)), dtype=F64)
    with torch.no_grad():
        coarse, fine = (solve(bump(path), noise, log_uniform(path, HIGH, LOW, n), "heun").x for n in (600, 1200))
    return noise, fine + (fine - coarse) / 3


@pytest.mark.parametrize("path", [VE(0.002, 80.0), Linear()], ids=repr)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_order_of_convergence(solver, path):
    """The slope of log error over log N, between two positive levels."""
    noise, exact = truth(path)
    counts, errors = (12, 24, 48, 96), []
    with torch.no_grad():
        for steps in counts:
            error = solve(bump(path), noise, graded(path, steps), solver).x - exact
            errors.append(float(error.square().mean().sqrt()))
    assert slope(counts, errors) == pytest.approx(ORDER[solver], abs=0.3)


@pytest.mark.parametrize("path", [VE(0.02, 20.0), VP(), Cosine()], ids=repr)
@pytest.mark.parametrize("solver", sorted(STOCHASTIC))
def test_order_of_the_variance(solver, path):
    """On a Gaussian x is linear in the start and in every draw: their unit vectors give its exact variance."""
    gaussian = Mixture([[0.0]], STD, path=path)

    def marginal(t):
        return (path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2

    counts, errors = (24, 48, 96, 192), []
    for steps in counts:
        times, units = graded(path, steps, 3.0, 0.2), iter(torch.eye(steps + 1, dtype=F64)[:, :, None])
        x = next(units) * marginal(times[0]).sqrt()
        *_, x = SOLVERS[solver](gaussian, x, path, times, lambda x, units=units: next(units))
        errors.append(float(abs(x.square().sum() / marginal(times[-1]) - 1)))
    assert slope(counts, errors) == pytest.approx(ORDER[solver], abs=0.2)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_the_same_on_every_path(solver):
    """At equal angles, x/alpha does not depend on the path."""
    sigmas = karras(0.05, 8.0).sigmas(9)
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    ends = []
    for path in (VE(0.002, 80.0), VP(), Cosine(), Linear()):
        times = path.time(torch.atan(sigmas))
        generator = torch.Generator().manual_seed(0)
        ends.append(solve(ring(path=path), noise * path.sigma(times[0]), times, solver, generator=generator).x)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-8, atol=1e-8)


# --- closed forms -------------------------------------------------------------------------------------------------

MEAN, STD = 2.0, 0.7


@pytest.mark.parametrize("path", [VE(0.02, 20.0), VP(), Linear()], ids=repr)
def test_ancestral_moments_of_a_gaussian_are_the_closed_form(path):
    """Few steps: the linear recursion of q(x_s | x_t, x_0) (Ho et al. 2020, Eq. 7) with E[x_0 | x_t] for x_0."""
    times = torch.cat([log_uniform(path, 8.0, 0.1, 4), torch.zeros(1, dtype=F64)])
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    noise = path.start(n, (1,), generator, t=times[0], dtype=F64)
    got = solve(Mixture([[MEAN]], STD, path=path), noise, times, "ancestral", generator=generator, keep_trajectory=True)
    mean, variance = 0.0, float(path.sigma(times[0]) ** 2)
    for i in range(len(times) - 1):
        (a, b), (s, r) = ((float(f(times[i])), float(f(times[i + 1]))) for f in (path.alpha, path.sigma))
        between = s**2 - (a / b * r) ** 2  # the variance of x_t given x_s
        by_x, by_x0 = a / b * r**2 / s**2, b * between / s**2
        gain = a * STD**2 / (a**2 * STD**2 + s**2)  # E[x_0 | x] = MEAN + gain (x - a MEAN)
        mean = (by_x + by_x0 * gain) * mean + by_x0 * (1 - gain * a) * MEAN
        variance = (by_x + by_x0 * gain) ** 2 * variance + between * r**2 / s**2
        x = got.trajectory[i + 1]
        assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n)), i
        assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n)), i


@pytest.mark.parametrize("solver", sorted(STOCHASTIC))
def test_noise_reaches_the_gaussian_with_many_steps(solver, generator):
    path = VP()
    times = torch.cat([log_uniform(path, path.sigma_max, 0.01, 300), torch.zeros(1, dtype=F64)])
    n = 20_000
    noise = path.start(n, (1,), generator)
    states = solve(Mixture([[MEAN]], STD, path=path), noise, times, solver, generator=generator, keep_trajectory=True)
    for i in (100, 200, 300, 301):  # x_t ~ N(alpha MEAN, alpha^2 STD^2 + sigma^2) all the way
        a, s = float(path.alpha(times[i])), float(path.sigma(times[i]))
        variance = (a * STD) ** 2 + s**2
        x = states.trajectory[i]
        assert float(x.mean()) == pytest.approx(a * MEAN, abs=4 * math.sqrt(variance / n) + 0.01)
        assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n) + 0.02)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path", [Linear(), Cosine(), Tabulated([0.999, 0.9, 0.5, 0.1, 0.0])], ids=repr)
def test_from_pure_noise_to_data(solver, path, generator):
    mixture = ring(path=path)
    times = torch.linspace(1, 0, 101, dtype=F64)
    x = solve(mixture, path.start(1000, (2,), generator, dtype=F64), times, solver, generator=generator).x
    assert bool(torch.isfinite(x).all())
    exact = mixture.sample(1000, generator, dtype=F64)
    assert float(mixture.energy(x).mean()) == pytest.approx(float(mixture.energy(exact).mean()), abs=0.15)
    assert float((x - exact).mean(0).abs().max()) < 0.4  # all eight modes, not one


# --- bookkeeping --------------------------------------------------------------------------------------------------


class Counted(Denoiser):
    """The ring, counting the samples that pass through it, and noting when."""

    def __init__(self):
        super().__init__()
        self.ring = ring(path=Cosine())
        self.path, self.rows, self.asked = self.ring.path, 0, []

    def forward(self, x, t, cond=None):
        self.rows += len(x)
        self.asked.append(t)
        return self.ring(x, t)


@pytest.mark.parametrize(("solver", "per_sample"), [(solver, 11 if solver == "heun" else 6) for solver in SOLVERS])
def test_evaluations_are_the_samples_through_the_network(solver, per_sample, generator):
    times = torch.linspace(0.9, 0, 7, dtype=F64)
    noise = torch.randn(5, 2, generator=generator)
    counted = Counted()
    solution = solve(counted, noise, times, solver, generator=generator)
    assert solution.evaluations == per_sample == counted.rows / len(noise)
    assert solution.trajectory is None
    if per_sample == 6:  # at the very times, in order, so that a prefix can be replayed
        assert torch.equal(torch.stack(counted.asked), times[:-1])

    counted = Counted()
    guided = Guided(counted, 2.0, {"label": torch.zeros(1)})
    cond = {"label": torch.ones(5)}
    solution = solve(guided, noise, times, solver, cond=cond, generator=generator, keep_trajectory=True)
    assert solution.evaluations == 2 * per_sample == counted.rows / len(noise)
    assert solution.trajectory.shape == (7, 5, 2)
    assert torch.equal(solution.trajectory[0], noise)
    assert torch.equal(solution.trajectory[-1], solution.x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_looks_ahead(solver):
    mixture, times = ring(path=Cosine()), torch.linspace(1, 0, 8, dtype=F64)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    whole, part = (states(mixture, t, solver, noise, torch.Generator().manual_seed(0)) for t in (times, times[:6]))
    assert torch.equal(whole[:6], part)


@pytest.mark.parametrize("solver", SOLVERS)
def test_differentiable_in_the_noise(solver):
    mixture = bump(Cosine())
    times = torch.linspace(0.9, 0, 5, dtype=F64)
    noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)

    def run(x):
        return solve(mixture, x, times, solver, generator=torch.Generator().manual_seed(0)).x

    assert torch.autograd.gradcheck(run, (noise,))


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_is_repeatable_and_deterministic_solvers_draw_none(solver):
    mixture, times = ring(path=Cosine()), torch.linspace(0.9, 0, 5, dtype=F64)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(4))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    ends = [solve(mixture, noise, times, solver, generator=generator).x for generator in generators]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2]) == (solver not in STOCHASTIC)
    drew = not torch.equal(generators[0].get_state(), torch.Generator().manual_seed(0).get_state())
    assert drew == (solver in STOCHASTIC)


def test_the_facts_cover_every_solver():
    from fewstep.cli import Solver

    assert set(ORDER) == set(SOLVERS) == set(get_args(Solver))


@pytest.mark.parametrize(
    ("times", "solver", "message"),
    [
        ([1.0, 0.5, 0.0], "rk4", f"solver must be one of {', '.join(SOLVERS)}, got 'rk4'"),
        ([1.0, 0.5, 0.5, 0.0], "euler", r"times must strictly decrease; times\[2\]=0.5 >= times\[1\]=0.5"),
        ([0.0, 0.5, 1.0], "euler", r"times\[1\]=0.5 >= times\[0\]=0"),
        ([1.1, 0.5, 0.0], "euler", r"must lie in \[0, 1\], got 1.1 to 0"),
        ([1.0, 0.5, -0.1], "euler", r"must lie in \[0, 1\], got 1 to -0.1"),
        ([1.0], "euler", r"at least 2 entries, got shape \(1,\)"),
        ([[1.0, 0.0]], "euler", r"got shape \(1, 2\)"),
        ([1.0, math.nan, 0.0], "euler", r"times must.*nan"),
    ],
)
def test_errors(times, solver, message):
    with pytest.raises(ValueError, match=message):
        solve(ring(path=Cosine()), torch.zeros(1, 2), times, solver)


def test_a_state_that_is_not_finite_names_its_level():
    broken = Pretrained(lambda x, t: torch.where(t[:, None] < 0.6, torch.nan, x), Linear(), "x0")
    with pytest.raises(ValueError, match=r"non-finite in step 1, from sigma/alpha = 1"):
        solve(broken, torch.ones(2, 2), [0.75, 0.5, 0.25, 0.0])
