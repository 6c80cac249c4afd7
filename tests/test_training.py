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
from fewstep.denoiser import Denoiser, Guided, OnPath
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser
from fewstep.networks import make_denoising_net
from fewstep.path import VE
from fewstep.schedule import karras
from fewstep.training import TrainState, adapt, averaged, dropped, first_schedule, train, training_levels


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


@pytest.mark.parametrize("network", ["mlp", "unet", "dit"])
def test_every_network_learns_which_image_goes_with_which_label(network):
    """Two images: near pure noise the belief is a label's own image, and half-way between them without a label."""
    width, depth, iterations = {"mlp": (64, 2, 100), "unet": (8, 2, 100), "dit": (32, 1, 200)}[network]
    config = TrainConfig(iterations=iterations, batch_size=16, network=network, width=width, depth=depth, lr=5e-3, ema=0.9)
    config = dataclasses.replace(config, labels=True, label_dropout=0.3)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    state = TrainState((1, 8, 8), config, classes=2)
    for _ in train(state, images, torch.tensor([0, 1])):
        pass
    model = state.averaged.module
    x = images[[0, 1, 0, 1]] + 10 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = model.path.time(math.atan(10))
    with torch.no_grad():
        of_label = [model(x, t, {"class_labels": torch.full((4,), k)}) for k in (0, 1, 2)]
        without = model(x, t)
    apart = (images[0] - images[1]).norm()
    share = [float(((belief.mean(0) - images[0]) * (images[1] - images[0])).sum() / apart**2) for belief in of_label]
    assert share == pytest.approx([0, 1, 0.5], abs=0.25)
    assert torch.equal(without, of_label[2])
    with pytest.raises(ValueError, match="no classes"):
        make_denoising_net((1, 8, 8), network, width, depth)(x, torch.ones(4), class_labels=torch.zeros(4, dtype=torch.long))


def test_a_dit_in_training_draws_nothing_of_its_own():
    """Its weights would depend on torch's global generator, and a resumed run would differ from an undisturbed one."""
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = TrainState((1, 8, 8), TrainConfig(iterations=3, batch_size=16, network="dit", width=32, depth=1))
        list(train(state, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))))
        weights.append(run.fingerprint(state.denoiser.state_dict().values()))
    assert weights[0] == weights[1]


PATH = VE(0.1, 10.0)
CLASSES = [Mixture([mean], 0.7, path=PATH) for mean in ([-1.0, 0.5], [1.0, 0.0])]
ALL = Mixture([[-1.0, 0.5], [1.0, 0.0]], 0.7, [0.75, 0.25], path=PATH)


class Exact(Denoiser):
    """What a model of the classes ought to learn: each one's own posterior mean, and under 2 the mixture's."""

    classes, shape, path = 2, (2,), PATH

    def forward(self, x, t, cond=None):
        answers = torch.stack([*(each(x, t) for each in CLASSES), ALL(x, t)])
        return answers[cond["class_labels"], torch.arange(len(x))]


@pytest.fixture(scope="module")
def two_classes():
    """A model of three quarters of one Gaussian and a quarter of another, which overlap."""
    g = torch.Generator().manual_seed(0)
    data = torch.cat([CLASSES[0].sample(6000, g), CLASSES[1].sample(2000, g)])
    config = TrainConfig(iterations=600, width=64, depth=2, sigma_min=0.1, sigma_max=10.0, label_dropout=0.25)
    state = TrainState((2,), config, classes=2)
    for _ in train(state, data, torch.tensor([0, 1]).repeat_interleave(torch.tensor([6000, 2000]))):
        pass
    return state.averaged.module.requires_grad_(False)


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_a_conditional_model_learns_each_class_and_with_no_class_the_mixture(two_classes, sigma):
    g = torch.Generator().manual_seed(1)
    x, t = ALL.sample(400, g) + sigma * torch.randn(400, 2, generator=g), PATH.time(math.atan(sigma))
    exact = [each(x, t) for each in (*CLASSES, ALL)]
    for k, belief in enumerate(exact):
        answer = two_classes(x, t, {"class_labels": torch.full((400,), k)})
        errors = [float((answer - other).abs().mean()) for other in exact]
        assert errors[k] < min(0.12, *(0.25 * e for j, e in enumerate(errors) if j != k)), (k, errors)
        assert float((answer - belief).mean(0).abs().max()) < 0.12
    assert torch.equal(two_classes(x, t), answer)


@pytest.mark.parametrize("scale", [None, 2.0, 3.0])
def test_samples_of_a_class_and_under_guidance_are_those_of_the_exact_model(two_classes, scale):
    """From equal noise; guidance pushes the means apart, away from the other class."""
    times, told = karras(0.1, 10).times(PATH, 10), {"class_labels": torch.tensor([0, 1])}
    means = []
    for model in (two_classes, Exact()):
        guided = Guided(model, scale, {"class_labels": torch.tensor([2])}) if scale else model
        x, evaluations = commands.generate(guided, times, 1000, (2,), "dpmpp_2m", 0, cond=told)
        again, _ = commands.generate(guided, times, 1000, (2,), "dpmpp_2m", 0, batch_size=333, cond=told)
        assert torch.allclose(x, again, atol=1e-4)
        assert evaluations == (20 if scale else 10)
        means.append(torch.stack([x[::2].mean(0), x[1::2].mean(0)]))
    assert torch.allclose(*means, atol=0.12), means
    apart = float(means[0][1, 0] - means[0][0, 0])
    assert apart == pytest.approx({None: 2.0, 2.0: 2.6, 3.0: 2.9}[scale], abs=0.25)


def test_labels_that_do_not_fit_are_refused():
    small, data, good = TrainConfig(iterations=1, width=8, depth=1), torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    for classes, labels, words in (
        (None, good, "without classes"),
        (2, None, "2 classes: give"),
        (2, good[:3], "4 samples"),
        (2, good + 1, r"0 \.\. 1, got 1 \.\. 2"),
        (2, good - 1, r"0 \.\. 1, got -1 \.\. 0"),
    ):
        with pytest.raises(ValueError, match=words):
            next(train(TrainState((2,), small, classes=classes), data, labels))
    with pytest.raises(ValueError, match="number of classes"):
        TrainState((2,), dataclasses.replace(small, labels=True))


def test_the_share_of_labels_that_is_dropped_is_the_one_asked_for(generator):
    labels = torch.arange(20_000) % 3
    left = dropped(labels, 3, 0.2, generator)
    assert float((left == 3).double().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(left[left < 3], labels[left < 3])


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
