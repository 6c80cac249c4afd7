import itertools
import math

import pytest
import torch
from torch import Tensor

from fewstep.commands import generate
from fewstep.denoiser import Denoiser, Guided
from fewstep.energy import Value
from fewstep.mixture import Mixture, ring
from fewstep.networks import MLPDenoiser
from fewstep.path import VE, VP, Cosine, Linear, Path, Tabulated
from fewstep.sampler import Sampler, Transition, in_steps, start_where_data_are
from fewstep.schedule import karras, linear, log_linear
from fewstep.solvers import SOLVERS, ancestral_std, solve
from fewstep.start import FromGaussian, gaussian_of

PATHS: dict[str, Path] = {
    "VE": VE(),
    "VP": VP(),
    "Cosine": Cosine(),
    "Linear": Linear(),
    "Tabulated": Tabulated((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(path: Path, steps: int = 6) -> Tensor:
    """From pure noise where the path has it."""
    return (linear(0.02) if path.ends_in_pure_noise() else karras(0.02, 40.0)).times(path, steps)


class Network(Denoiser):
    """A small trainable denoiser."""

    def __init__(self, path: Path):
        super().__init__()
        torch.manual_seed(0)
        self.path, self.net = path, MLPDenoiser((2,), width=16, depth=1, time_features=8)

    def forward(self, x, t, cond=None):
        return self.net(x, torch.as_tensor(t).to(x).expand(len(x)))


# --- an untrained sampler is the ancestral sampler -----------------------------------------------------------------------


@on_every_path
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_an_untrained_sampler_is_the_ancestral_sampler(path, steps):
    model = ring(path=path)
    sampler = Sampler(model, levels(path, steps))
    start = sampler.start(200, (2,), seeded(1))
    states = sampler.rollout(start, seeded(2))
    ancestral = solve(model, start, sampler.times, "ancestral", generator=seeded(2), keep_trajectory=True)
    assert states.shape == (steps + 1, 200, 2)
    assert torch.equal(states[0], start)
    # the std is kept as the logarithm of a single-precision number
    torch.testing.assert_close(states, ancestral.trajectory, rtol=1e-5, atol=1e-5 * float(start.std()))
    torch.testing.assert_close(states[-1], ancestral.x, rtol=1e-4, atol=1e-4)


@on_every_path
def test_the_initial_std_is_that_of_the_exact_gaussian_posterior_of_a_step(path):
    # x_s given x_t and x_0, by conditioning the joint Gaussian of (x_s, x_t) = (a_s x0 + u, (a_t/a_s) x_s + v)
    times = karras(0.05, 20.0).times(path, 8)[:-1]
    t, s = times[:-1], times[1:]
    scale = path.alpha(t) / path.alpha(s)
    added = path.sigma(t) ** 2 - (scale * path.sigma(s)) ** 2
    variance = path.sigma(s) ** 2 * added / (scale**2 * path.sigma(s) ** 2 + added)
    sampler = Sampler(ring(path=path), torch.cat([times, times.new_zeros(1)]))
    assert sampler.steps == 8
    torch.testing.assert_close(sampler.std()[:-1].double(), variance.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ancestral_std(path, t, s), variance.sqrt(), rtol=1e-9, atol=0)


@on_every_path
def test_a_steps_mean_is_the_posterior_mean_of_a_known_datum(path):
    datum = torch.tensor([[0.7, -1.2]], dtype=torch.float64)
    sampler = Sampler(Mixture(datum, 0.0, path=path), levels(path, 7))
    x = sampler.start(50, (2,), seeded(3)).double()
    for i in range(sampler.steps):
        t, s = sampler.times[i], sampler.times[i + 1]
        a_t, a_s, var_t, var_s = path.alpha(t), path.alpha(s), path.sigma(t) ** 2, path.sigma(s) ** 2
        gain = a_t / a_s * var_s / var_t
        expected = a_s * datum + gain * (x - a_t * datum)  # Ho et al. 2020, Eq. 7, on any path
        law = sampler.step(x, i)
        torch.testing.assert_close(law.mean, expected, rtol=1e-6, atol=1e-6)
        x = law.draw(seeded(i))
    torch.testing.assert_close(x, datum.expand(50, 2), rtol=1e-9, atol=1e-9)


def propagated_variance(sampler: Sampler) -> float:
    """The variance of the samples on Gaussian data centred at 0, where every step is linear in x."""
    variance = float(sampler.path.sigma(sampler.times[0])) ** 2
    with torch.no_grad():
        for i, std in enumerate(sampler.std().tolist()):
            gain = float(sampler.step(torch.ones(1, 1, dtype=torch.float64), i).mean)
            variance = gain**2 * variance + std**2
    return variance


on_three_paths = pytest.mark.parametrize("path", [VE(), VP(), Linear()], ids=["VE", "VP", "Linear"])


@on_three_paths
@pytest.mark.parametrize("steps", [1, 5, 60])
def test_rollouts_have_the_variance_that_linear_propagation_predicts(path, steps):
    n = 100_000 if steps < 60 else 20_000
    sampler = Sampler(Mixture([[0.0]], 0.5, path=path), karras(0.02, 40.0).times(path, steps), last_std=0.05)
    out = sampler.rollout(sampler.start(n, (1,), seeded(6)), seeded(7))[-1]
    assert float(out.var()) == pytest.approx(propagated_variance(sampler), rel=5 * math.sqrt(2 / n))


@on_three_paths
def test_the_variance_of_many_steps_converges_to_that_of_the_data_at_first_order(path):
    model, schedule = Mixture([[0.0]], 0.5, path=path), log_linear(0.002, 80.0)
    errors = [0.25 - propagated_variance(Sampler(model, schedule.times(path, steps))) for steps in (100, 200, 400, 800)]
    assert errors[-1] == pytest.approx(0, abs=0.005)
    assert errors[0] > 0  # with few steps ancestral sampling is too narrow: what training is for
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.1)


@on_every_path
def test_a_sampler_starts_from_noise_of_its_first_level(path):
    times = levels(path)
    sampler = Sampler(ring(path=path), times[1:])
    start = sampler.start(5000, (2, 3), seeded(0))
    assert start.shape == (5000, 2, 3)
    assert start.dtype == torch.float32
    assert float(start.std()) == pytest.approx(float(path.sigma(times[1])), rel=0.02)
    assert torch.equal(start, sampler.start(5000, (2, 3), seeded(0)))


# --- one step ---------------------------------------------------------------------------------------------------------


@on_every_path
def test_a_step_per_sample_equals_step_by_step(path):
    sampler = Sampler(ring(path=path), levels(path), last_std=0.1)
    with torch.no_grad():
        sampler.log_std.add_(0.3 * torch.randn(sampler.steps - 1, generator=seeded(1)))
    sampler.set_noise(sampler.std()[:-1, None] * torch.rand(sampler.steps - 1, 2, generator=seeded(4)))
    x = torch.randn(30, 2, generator=seeded(2), dtype=torch.float64)
    i = torch.randint(sampler.steps, (30,), generator=seeded(3))
    assert len(i.unique()) == sampler.steps
    together = sampler.step(x, i)
    assert together.std.shape == (30,)
    for k in range(30):
        alone = sampler.step(x[k : k + 1], int(i[k]))
        torch.testing.assert_close(together.mean[k], alone.mean[0], rtol=1e-10, atol=1e-12)
        assert torch.equal(together.std[k], alone.std)
        assert torch.equal(together.deviation()[k], alone.deviation())
    torch.testing.assert_close(together.deviation().float(), sampler.noise()[i])
    mean = sampler.step(x, torch.tensor(2)).mean
    torch.testing.assert_close(mean, sampler.step(x, torch.full((30,), 2)).mean, rtol=1e-10, atol=1e-12)


def test_images_take_one_step_index_each():
    means = torch.randn(3, 1, 4, 4, generator=seeded(0))
    sampler = Sampler(Mixture(means, 0.2, path=VP()), levels(VP()), last_std=0.1)
    x, i = torch.randn(6, 1, 4, 4, generator=seeded(1)), torch.arange(6)
    law = sampler.step(x, i)
    drawn = law.draw(seeded(2))
    noise = torch.randn(x.shape, generator=seeded(2))
    torch.testing.assert_close((drawn - law.mean) / law.std[:, None, None, None], noise, rtol=1e-3, atol=1e-3)


def test_learning_the_std_changes_the_noise_and_not_the_mean():
    sampler = Sampler(ring(), levels(VE()), last_std=0.02)
    x = 3 * torch.randn(7, 2, generator=seeded(0))
    before = [sampler.step(x, i) for i in range(sampler.steps)]
    with torch.no_grad():
        sampler.log_std.add_(math.log(2.0))
    for i, old in enumerate(before):
        new = sampler.step(x, i)
        assert torch.equal(new.mean, old.mean)
        factor = 1.0 if i == sampler.steps - 1 else 2.0
        assert new.std.item() == pytest.approx(factor * old.std.item(), rel=1e-5)


@pytest.mark.parametrize("last_std", [0.0, 0.02, 1.5])
def test_the_noise_of_the_last_step_is_fixed(last_std):
    sampler = Sampler(ring(), levels(VE()), last_std)
    gradient = torch.autograd.grad(sampler.std().sum(), sampler.log_std)[0]
    torch.testing.assert_close(gradient, sampler.std()[:-1].detach(), rtol=1e-6, atol=0)
    with torch.no_grad():
        sampler.log_std.fill_(3.0)
    assert sampler.std()[-1].item() == pytest.approx(last_std, rel=1e-6)
    x = torch.randn(20_000, 2, generator=seeded(0))
    law = sampler.step(x, sampler.steps - 1)
    assert (law.draw(seeded(1)) - law.mean).std().item() == pytest.approx(last_std, rel=0.02)
    torch.testing.assert_close(law.mean, sampler.denoiser(x, sampler.times[-2]), rtol=1e-6, atol=1e-6)


def test_the_only_parameters_are_the_networks_and_the_log_stds():
    sampler = Sampler(Network(Linear()), levels(Linear()))
    names = {name for name, _ in sampler.named_parameters()}
    assert names == {"log_std"} | {f"denoiser.{name}" for name, _ in sampler.denoiser.named_parameters()}


def test_a_sampler_comes_back_from_its_state():
    one, two = (Sampler(Network(Linear()), levels(Linear()), last_std=std) for std in (0.1, 0.3))
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(0)))
    two.load_state_dict(one.state_dict())
    start = one.start(5, (2,), seeded(1))
    assert torch.equal(one.rollout(start, seeded(2)), two.rollout(start, seeded(2)))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_draw_is_differentiable_in_mean_and_std(per_sample):
    mean = torch.zeros(4, 3, requires_grad=True)
    std = torch.full((4,) if per_sample else (), 0.5, requires_grad=True)
    weights = torch.randn(4, 3, generator=seeded(1))
    noise = torch.randn(4, 3, generator=seeded(2))
    to_mean, to_std = torch.autograd.grad((weights * Transition(mean, std).draw(seeded(2))).sum(), (mean, std))
    torch.testing.assert_close(to_mean, weights)
    torch.testing.assert_close(to_std, (weights * noise).sum(1) if per_sample else (weights * noise).sum())


def test_draws_have_the_mean_and_the_std_of_their_law():
    law = Transition(torch.full((50_000, 2), 3.0), torch.tensor(0.7))
    x = law.draw(seeded(0))
    assert float(x.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(x.std()) == pytest.approx(0.7, rel=0.01)
    assert torch.equal(x, law.draw(seeded(0)))


@pytest.mark.parametrize("path", [VE(), Linear()], ids=["VE", "Linear"])
@pytest.mark.parametrize("i", [0, 2, 5])
def test_a_step_is_differentiable_in_the_state_and_the_parameters(path, i):
    sampler = Sampler(Network(path), levels(path), last_std=0.1).double()
    x = torch.randn(3, 2, generator=seeded(0), dtype=torch.float64).requires_grad_()
    bias = sampler.denoiser.net.mlp.leave.bias

    def drawn(x: Tensor, shift: Tensor) -> Tensor:
        return torch.func.functional_call(sampler, {"denoiser.net.mlp.leave.bias": bias.detach() + shift}, (x,), strict=False)

    sampler.forward = lambda x: sampler.step(x, i).draw(seeded(1))  # functional_call calls forward
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(drawn, (x, shift))


@pytest.mark.parametrize("path", [VE(), Linear()], ids=["VE", "Linear"])
def test_a_rollout_has_no_gradient_and_a_step_has(path):
    sampler = Sampler(Network(path), levels(path), last_std=0.1)
    start = sampler.start(4, (2,), seeded(0)).requires_grad_()
    states = sampler.rollout(start, seeded(1))
    assert not states.requires_grad
    assert sampler.step(start, 1).mean.requires_grad
    assert sampler.step(start, 1).std.requires_grad


def test_conditions_reach_the_model_in_every_step():
    class Labelled(Denoiser):
        path = VE()

        def forward(self, x, t, cond=None):
            return cond["label"][:, None].expand(x.shape)

    label = torch.tensor([1.0, 2.0, 3.0])
    plain = Sampler(Labelled(), levels(VE()))
    guided = Sampler(Guided(Labelled(), 3.0, {"label": torch.zeros(1)}), levels(VE()))
    start = plain.start(3, (2,), seeded(0))
    torch.testing.assert_close(plain.rollout(start, seeded(1), {"label": label})[-1], label[:, None].expand(3, 2))
    torch.testing.assert_close(guided.rollout(start, seeded(1), {"label": label})[-1], 3 * label[:, None].expand(3, 2))


def test_noise_for_another_number_of_steps_is_refused():
    sampler = Sampler(ring(), levels(VE()))
    with pytest.raises(ValueError, match=f"noise of its own in {sampler.steps - 1}, got 1"):
        sampler.set_noise(torch.full((1, 2), 0.5))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times", [[0.5], [0.5, 0.7], [1.0, 0.5, 0.5, 0.0], [[1.0, 0.0]], [1.2, 0.0], [1.0, math.nan, 0.0], [1.0, 0.5]]
)
def test_times_that_do_not_fall_from_within_1_to_0_are_refused(times):
    with pytest.raises(ValueError, match=r"times must"):
        Sampler(ring(), torch.tensor(times))


def test_a_negative_last_std_is_refused():
    with pytest.raises(ValueError, match="last_std"):
        Sampler(ring(), levels(VE()), last_std=-0.1)


@pytest.mark.parametrize("i", [6, -8])
def test_a_step_that_the_sampler_lacks_is_refused(i):
    with pytest.raises(IndexError):
        Sampler(ring(), levels(VE())).step(torch.zeros(1, 2), i)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)], ids=str)
def test_the_energy_is_the_last_slice_of_the_value(shape):
    torch.manual_seed(0)
    value = Value(shape, torch.ones(6))
    x = torch.randn(8, *shape, generator=seeded(0))
    assert value.energy(x).shape == (8,)
    assert torch.equal(value.energy(x), value(x, 5))
    slices = torch.stack([value(x, i) for i in range(6)])
    assert len(slices[:, 0].unique()) == 6  # each step has its own


def test_a_value_takes_one_step_index_per_sample():
    torch.manual_seed(0)
    value = Value((2,), torch.ones(6))
    x, i = torch.randn(12, 2, generator=seeded(0)), torch.arange(12) % 6
    together = value(x, i)
    for k in range(12):
        torch.testing.assert_close(together[k], value(x[k : k + 1], int(i[k]))[0], rtol=1e-5, atol=1e-6)


def test_a_value_sees_the_states_of_a_ve_path_at_the_datas_size():
    """The same network on the VE path and on the cosine path gives one value, at equal angles."""
    torch.manual_seed(0)
    times = {path: karras(0.1, 10).times(path, 4) for path in (VE(0.1, 10), Cosine())}
    samplers = [Sampler(ring(path=path), t) for path, t in times.items()]
    values = [Value((2,), sampler.radius()) for sampler in samplers]
    values[1].load_state_dict(values[0].state_dict() | {"radius": samplers[1].radius().float()})
    x = torch.randn(7, 2, generator=seeded(1))
    for i in range(5):
        on_ve = x * samplers[0].radius()[i].float()
        torch.testing.assert_close(values[0](on_ve, i), values[1](x, i), rtol=1e-5, atol=1e-6)


def test_a_value_has_no_step_beyond_the_last():
    with pytest.raises(IndexError):
        Value((2,), torch.ones(6))(torch.zeros(1, 2), 6)


def wide_gaussian(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n points of 4 x 4, and their covariance: three wide directions, the others of variance .01; mean 1."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    variance = torch.tensor([9.0, 4.0, 1.0] + [0.01] * 13)
    x = 1 + torch.randn(n, 16, generator=torch.Generator().manual_seed(2)) * variance.sqrt() @ basis.T
    return x.reshape(n, 1, 4, 4), (basis * variance) @ basis.T


@pytest.mark.parametrize("sigma_max", [0.5, 1.5, 4.0])
def test_a_start_where_the_data_are_has_their_moments(sigma_max: float) -> None:
    path = VP(beta_max=2 * math.log(1 + sigma_max**2) - 0.1)  # alpha^2 = 1/(1 + sigma_max^2) at the end
    data, covariance = wide_gaussian(10_000)
    sampler = Sampler(Mixture(torch.zeros(1, 16), 1.0, path=path), karras(0.1, path.sigma_max).times(path, 3))
    t = sampler.times[0]
    assert sampler.shown() == 0
    start_where_data_are(sampler, gaussian_of(data))
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    x = sampler.start(20_000, (1, 4, 4), torch.Generator().manual_seed(0))
    wanted = alpha**2 * covariance + sigma**2 * torch.eye(16)
    assert (x.flatten(1).mean(0) - alpha).abs().max() < 0.1
    assert (torch.cov(x.flatten(1).T) - wanted).abs().max() < 0.06 * float(wanted.max())
    assert sampler.shown() == pytest.approx(9 * (alpha / sigma) ** 2, rel=0.05)
    fresh = Sampler(Mixture(torch.zeros(1, 16), 1.0, path=path), sampler.times)
    fresh.load_state_dict(sampler.state_dict())
    again = fresh.start(20_000, (1, 4, 4), torch.Generator().manual_seed(0))
    assert torch.equal(again, x)
    more = in_steps(sampler, 5).start(20_000, (1, 4, 4), torch.Generator().manual_seed(0))
    assert torch.equal(more, x)


def test_a_start_is_finite_where_some_pixels_never_vary() -> None:
    """sqrt(0 + sigma^2) - sigma is below 0 for one sigma in twelve, and has no root."""
    data = torch.cat([torch.randn(100, 5, generator=seeded()), torch.full((100, 20), -1.0)], 1)
    path, noise = FromGaussian(0.01, 200.0, gaussian_of(data)), torch.randn(50, 25, generator=seeded(1))
    for sigma in (40 * torch.rand(200, generator=seeded(2), dtype=torch.float64) + 0.1).tolist():
        x = path.start_from(noise, path.time(math.atan(sigma)))
        torch.testing.assert_close(x[:, 5:], -1 + sigma * noise[:, 5:], rtol=1e-4, atol=1e-3)


def test_a_start_lies_where_the_ode_of_the_gaussian_leads() -> None:
    """From the same noise: started at level 20 and solved in 200 steps down to 1, or started at 1."""
    data, _ = wide_gaussian(10_000)
    known = gaussian_of(data)
    basis, mean = known.components.flatten(1), known.mean.flatten()

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        weight = known.variances / (known.variances + float(path.sigma(t)) ** 2)
        return (mean + ((x.flatten(1) - mean) @ basis.T * weight) @ basis).reshape(x.shape)

    path = FromGaussian(0.1, 20.0, known)
    noise = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times = path.time(log_linear(1.0, 20.0).angles(200)[:-1])
    *_, x = SOLVERS["heun"](exact, path.start_from(noise, times[0]), path, times, torch.randn_like)
    torch.testing.assert_close(x, path.start_from(noise, times[-1]), rtol=0, atol=2e-3)
    assert (x - noise * path.sigma(times[-1])).abs().max() > 1


def test_samples_of_data_wider_than_the_noisiest_level_need_a_start_where_they_are() -> None:
    """Exact denoiser of N(0, 30^2), noisiest level 10: drawn as `fewstep sample` draws, with that start and without."""
    path = VE(0.1, 10)
    sampler = Sampler(Mixture(torch.zeros(1, 2), 30.0, path=path), karras(0.1, 10).times(path, 100))

    def spread() -> float:
        return float(generate(sampler, sampler.times, 4000, (2,), "", 0)[0].std())

    assert spread() < 15
    start_where_data_are(sampler, gaussian_of(30 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))))
    assert spread() == pytest.approx(30, rel=0.03)
