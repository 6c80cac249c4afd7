"""Training: a model whose denoiser is known, and the networks that it may have."""

import dataclasses
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fewstep import commands, run
from fewstep.config import Source, TrainConfig
from fewstep.denoiser import OnPath
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser
from fewstep.networks import make_denoising_net
from fewstep.path import VE
from fewstep.schedule import karras
from fewstep.training import TrainState, adapt, averaged, first_schedule, train, training_levels


def test_training_learns_a_gaussian_whose_denoiser_is_known():
    """A small network on N(0, 0.5^2): E[x_0 | x] = x c^2/(c^2 + sigma^2) in VE coordinates, within a few percent."""
    exact = Mixture(torch.zeros(1, 1), 0.5)
    config = TrainConfig(iterations=800, width=64, depth=2, batch_size=256, sigma_min=0.15, sigma_max=10.0)
    state = TrainState((1,), config)
    for _ in train(state, exact.sample(20_000, torch.Generator().manual_seed(1))):
        pass
    model, x = OnPath(state.averaged.module, VE(0.15, 10)), torch.linspace(-1, 1, 9)[:, None]
    for sigma in (0.3, 1.0):
        t = model.path.time(math.atan(sigma))
        with torch.no_grad():
            assert torch.allclose(model(x, t), x * 0.25 / (0.25 + sigma**2), atol=0.06)


@pytest.mark.parametrize("network", ["mlp", "unet", "dit"])
def test_every_network_learns_a_few_images_by_heart(network):
    width, depth, iterations = {"mlp": (64, 2, 150), "unet": (8, 2, 100), "dit": (64, 2, 500)}[network]
    config = TrainConfig(iterations=iterations, batch_size=16, network=network, width=width, depth=depth, lr=3e-3, ema=0.9)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    state = TrainState((1, 8, 8), config)
    losses = [metrics["loss"] for metrics in train(state, images)]
    first, last = sum(losses[:10]) / 10, sum(losses[-20:]) / 20
    assert last < 0.7 * first, (first, last)


def test_the_score_of_an_untrained_mlp_does_not_jitter_between_close_levels():
    """Time features are slow: over 1/1000 of it the output moves less than a tenth of its spread over all of it."""
    torch.manual_seed(0)
    net, x = make_denoising_net((2,), "mlp"), torch.zeros(200, 2)
    t = torch.linspace(0.1, 0.9, 200)
    with torch.no_grad():
        whole, step = net(x, t).std(0).mean(), (net(x, t + 1e-3) - net(x, t)).abs().mean()
    assert step < 0.1 * whole


@pytest.mark.parametrize(
    ("shape", "network", "message"),
    [((2,), "unet", "needs images"), ((1, 7, 7), "unet", "divisible by 2"), ((1, 8, 6), "dit", "square")],
)
def test_a_network_that_does_not_fit_the_data_is_refused(shape, network, message):
    with pytest.raises(ValueError, match=message):
        make_denoising_net(shape, network)


def test_the_average_warms_up_and_then_decays_as_told():
    module = torch.nn.Linear(1, 1, bias=False)
    mean, value = averaged(module, 0.5), None
    for n in range(30):
        new = float(n % 7)
        module.weight.data.fill_(new)
        mean.update_parameters(module)
        decay = min(0.5, (1 + n) / (10 + n))
        value = new if value is None else decay * value + (1 - decay) * new
        assert mean.module.weight.item() == pytest.approx(value, abs=1e-5)


def test_states_do_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    TrainState((2,), TrainConfig(seed=3))
    assert torch.equal(torch.rand(1), expected)


def closed_form(sigma, c):
    """Length of the corrector-cost curve up to sigma for data N(0, c^2) in one dimension."""
    return 2 * (torch.asinh(sigma / c) - sigma / torch.sqrt(c**2 + sigma**2))


def share_of_length(schedule, c, steps=10):
    """How much of the true length each step of a grid covers, times the number of steps: all 1 on the optimum."""
    length = closed_form(schedule.sigmas(steps)[:-1], c)
    return (steps - 1) * length.diff() / (length[-1] - length[0])


def test_rounds_of_algorithm_2_reach_the_closed_form_and_keep_their_knots():
    """Exact scores of N(0, 0.5^2): from log-uniform, where they vary by 70 %, to steps of equal true length within 5 %."""
    exact, g = Mixture(torch.zeros(1, 1), 0.5, path=VE(0.05, 10.0)), torch.Generator().manual_seed(0)
    config = TrainConfig(schedule="adaptive", sigma_min=0.05, sigma_max=10.0, schedule_blend=0.1)
    first = running = first_schedule(config)
    variation = []
    for _ in range(80):
        running, metrics = adapt(running, exact, exact.sample(2000, g), config, g)
        variation.append(metrics["cost_variation"])
    before, after = share_of_length(first, 0.5), share_of_length(running, 0.5)
    assert before.std() > 0.5
    assert (after - 1).abs().max() < 0.05, after
    assert variation[0] > 2 * max(variation[-10:])
    assert metrics["Lambda"] == pytest.approx(float(closed_form(torch.tensor(10.0), 0.5)), rel=0.03)
    assert torch.equal(running.u, first.u)


def test_the_first_nonsense_scores_do_not_break_the_adaptive_schedule():
    """Costs that are zero but for one step move the schedule a share of the way only; it recovers from them."""

    class Broken(Mixture):
        def forward(self, x, t, cond=None):
            return torch.where(self.path.sigma(t).reshape(-1, 1) > 1, 100.0, 0.0).to(x) + x

    path, g = VE(0.05, 10.0), torch.Generator().manual_seed(0)
    config = TrainConfig(schedule="adaptive", sigma_min=0.05, sigma_max=10.0)
    exact, broken = (kind(torch.zeros(1, 1), 0.5, path=path) for kind in (Mixture, Broken))
    running = first_schedule(config)
    for k in range(80):
        running, _ = adapt(running, broken if k < 5 else exact, exact.sample(2000, g), config, g)
    assert (share_of_length(running, 0.5) - 1).abs().max() < 0.06


def test_adaptive_levels_are_even_along_the_running_schedule():
    """One level in each b-th of it; fixed levels are log-normal as told."""
    config = TrainConfig(schedule="adaptive", batch_size=64, width=8, depth=1)
    state = TrainState((1,), config)
    state.schedule = karras(config.sigma_min, config.sigma_max)
    ends = torch.tan(state.schedule.at(torch.linspace(0, 1, 65, dtype=torch.float64)))
    levels = training_levels(state)
    assert ((levels <= ends[:-1]) & (levels >= ends[1:])).all()

    state = TrainState((1,), TrainConfig(batch_size=20_000, width=8, depth=1))
    log = training_levels(state).log()
    assert (float(log.mean()), float(log.std())) == pytest.approx((-0.5, 1.4), abs=0.05)


def test_adaptive_training_learns_the_model_and_its_schedule_together():
    """N(0, 0.5^2): the curve within 10 % of the optimum that exact scores give, the denoiser as good as with fixed levels."""
    exact = Mixture(torch.zeros(1, 1), 0.5)
    config = TrainConfig(iterations=1000, width=64, depth=2, sigma_min=0.15, sigma_max=10.0)
    config = dataclasses.replace(config, schedule="adaptive", schedule_every=20)
    state = TrainState((1,), config)
    logged = list(train(state, exact.sample(20_000, torch.Generator().manual_seed(1))))
    assert [k + 1 for k, metrics in enumerate(logged) if "Lambda" in metrics] == list(range(20, 1001, 20))
    assert (share_of_length(state.schedule, 0.5) - 1).abs().max() < 0.1
    model, x = state.averaged.module, torch.linspace(-1, 1, 9)[:, None]
    for sigma in (0.3, 1.0):
        with torch.no_grad():
            belief = model(x, model.path.time(math.atan(sigma)))
        assert torch.allclose(belief, x * 0.25 / (0.25 + sigma**2), atol=0.06)


def test_adaptive_training_continues_bit_for_bit_after_kill_9_and_leaves_its_schedule(tmp_path):
    np.save(tmp_path / "points.npy", ring().sample(600, torch.Generator().manual_seed(0)).numpy())
    source, whole, broken = Source(str(tmp_path / "points.npy")), tmp_path / "whole", tmp_path / "broken"
    config = TrainConfig(iterations=600, batch_size=16, width=16, depth=1, schedule="adaptive", schedule_every=30)
    commands.train(source, whole, config)

    options = "--iterations 600 --batch-size 16 --width 16 --depth 1 --schedule adaptive --schedule-every 30 --threads 1"
    command = [sys.executable, "-m", "fewstep.cli", "train", "--data", source.data, "--out", str(broken), *options.split()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (broken / run.CHECKPOINT).exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "schedule.json").exists()
    commands.train(source, broken, config)
    for name in ("model.safetensors", "checkpoint.safetensors", "metrics.jsonl", "schedule.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name

    model = load_denoiser(str(whole))
    learned = commands.find_schedule(str(whole), model)
    assert learned.provenance["cost"] == "corrector"
    assert learned.provenance["data"].endswith("points.npy")
    assert torch.equal(learned.theta, run.load_tree(whole / run.CHECKPOINT)["schedule"]["theta"])
    assert len(learned.times(model.path, 4)) == 5
