"""The examples do what they say, with somebody else's weights where those are at hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.data import load_data
from fewstep.schedule import Schedule
from fewstep.solvers import solve

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def slim(shared_data):
    file = shared_data / "pretrained" / "slim_mnist_ddpm.pt"
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIM_MNIST", str(file))
        return load("mnist_slim").denoiser().requires_grad_(False)


@pytest.fixture(scope="module")
def classify(shared_data):
    """Images in [-1, 1] (n, 1, 32, 32) -> probabilities of the ten digits (n, 10)."""
    file = shared_data / "pretrained" / "mnist_classifier.pth"
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    features = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    )
    net = nn.Sequential()
    net.features, net.flatten = features, nn.Flatten()
    net.classifier = nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    net.requires_grad_(False)

    def probabilities(x):
        pixels = nn.functional.interpolate((x.clamp(-1, 1) + 1) / 2, size=28, mode="bilinear", antialias=True)
        return net((pixels - 0.1307) / 0.3081).softmax(1)

    return probabilities


def looks_like_digits(probabilities):
    """The classifier is sure, and sees many digits; of noise it is less sure, and sees a 2 or a 5."""
    sure, seen = float(probabilities.max(1).values.mean()), len(probabilities.argmax(1).unique())
    return sure > 0.97 and seen >= 6


def times(steps):
    return torch.cat([torch.linspace(1, 2 / 200, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def test_slim_mnist_draws_digits(slim, classify, generator):
    noise = slim.path.start(16, slim.shape, generator)
    for solver, steps in (("ancestral", 50), ("euler", 15)):
        assert looks_like_digits(classify(solve(slim, noise, times(steps), solver, generator=generator).x)), solver
    assert not looks_like_digits(classify(noise))
    assert not looks_like_digits(classify(torch.rand(16, 1, 32, 32, generator=generator) * 2 - 1))


def test_slim_mnist_knows_the_noise_in_real_digits(slim, shared_data, generator):
    """E|eps - eps_theta|^2 per dimension, where knowing nothing costs 1: seen 0.52, 0.091 and 0.018."""
    import gzip

    import numpy as np

    file = shared_data / "mnist" / "t10k-images-idx3-ubyte.gz"
    if not file.is_file():
        pytest.skip(f"no digits at {file}")
    with gzip.open(file) as stream:
        raw = np.frombuffer(stream.read(16 + 64 * 784), np.uint8, offset=16).reshape(64, 1, 28, 28)
    x0 = nn.functional.interpolate(torch.from_numpy(raw.copy()) / 127.5 - 1, size=32, mode="bilinear", antialias=True)
    eps = torch.randn(x0.shape, generator=generator)
    for index, most in ((20, 0.6), (100, 0.11), (199, 0.022)):
        t = (index + 1) / 200
        x = slim.path.noised(x0, eps, t)
        told = torch.full((64,), float(index))
        assert float((slim.net(x, told) - eps).square().mean()) < most


def test_slim_mnist_time_is_linear_between_rows_and_stops_at_1(slim):
    table = slim.net.time_embendding.weight[:, 0]
    got = slim.net.time(torch.tensor([7.25, 198.5, 199.0])).flatten()
    torch.testing.assert_close(got, torch.stack([0.75 * table[7] + 0.25 * table[8], table[198:].mean(), table[199]]))
    told = slim.clock(torch.tensor([0.0, 1 / 200, 2 / 200, 0.5, 1.0], dtype=torch.float64))
    assert told.tolist() == pytest.approx([1, 1, 1, 99, 199])


def test_slim_mnist_says_what_to_do_without_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIM_MNIST", str(tmp_path / "absent.pt"))
    with pytest.raises(FileNotFoundError, match="set SLIM_MNIST"):
        load("mnist_slim").denoiser()


@pytest.mark.timeout(400)
def test_the_command_line_learns_the_models_schedule_and_draws_digits_in_10_evaluations(
    slim, classify, shared_data, tmp_path, monkeypatch
):
    """`fewstep schedule`, with few draws, and `fewstep sample --steps 10` on its curve, end in a picture of digits."""
    from fewstep import cli

    monkeypatch.setenv("SLIM_MNIST", str(shared_data / "pretrained" / "slim_mnist_ddpm.pt"))
    x = load_data("mnist", shared_data, size=32).test[:300]
    np.save(tmp_path / "mnist.npy", x.numpy())
    model = ["--model", f"{EXAMPLES / 'mnist_slim.py'}:denoiser"]
    learn = ["--data", f"{tmp_path / 'mnist.npy'}", "--sigma-min", "0.05", "--probes", "30", "--draws", "8"]
    learn += ["--solver", "euler", "--cost", "corrector", "--verdict-noises", "32"]
    cli.main(["schedule", *model, *learn, "--out", f"{tmp_path / 's'}"])
    assert Schedule.load(tmp_path / "s" / "schedule.json").provenance["split_half_error"] < 0.1
    draw = ["--schedule", f"{tmp_path / 's'}", "--solver", "ancestral", "--steps", "10", "--count", "20"]
    cli.main(["sample", *model, *draw, "--out", f"{tmp_path / 'x'}"])
    samples = torch.from_numpy(np.load(tmp_path / "x" / "samples.npz")["x"])
    assert (tmp_path / "x" / "samples.png").stat().st_size > 2000
    assert looks_like_digits(classify(samples))
