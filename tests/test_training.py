"""Training: a model whose denoiser is known, and the networks that it may have."""

import math

import pytest
import torch

from fewstep.config import TrainConfig
from fewstep.denoiser import OnPath
from fewstep.mixture import Mixture
from fewstep.networks import make_denoising_net
from fewstep.path import VE
from fewstep.training import TrainState, averaged, train


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
