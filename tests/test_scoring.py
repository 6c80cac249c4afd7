"""Which samples are strange: both scores against closed forms, the files, the command and its mistakes."""

import json

import numpy as np
import pytest
import torch

from fewstep import cli
from fewstep.data import load_samples
from fewstep.energy import Value, denoising_error, mean_energy
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser, load_sampler
from fewstep.path import VE, VP
from fewstep.scoring import read_table, score


@pytest.mark.parametrize("path", [VE(0.01, 10.0), VP(sigma_min=0.01)])
def test_the_denoising_error_of_a_gaussian_is_its_closed_form(path):
    std, sigma = 0.7, 0.5
    model = Mixture([[0.0, 0.0]], std, path=path)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, -4.0]])
    kept = std**2 / (std**2 + sigma**2)  # of x + sigma n
    expected = ((1 - kept) ** 2 * x.double() ** 2 + kept**2 * sigma**2).mean(1)
    torch.testing.assert_close(denoising_error(model, x, sigma, 20_000).double(), expected, rtol=0.03, atol=0)


def test_the_mean_energy_of_a_parabola_is_its_closed_form_and_of_classes_the_lowest_one():
    class Parabolas(Value):
        def energy(self, x, cond=None):
            centre = 0.0 if cond is None else 2.0 * cond["class_labels"][:, None]
            return ((x - centre) ** 2).sum(1)

    x, std = torch.tensor([[0.0, 0.0], [2.0, 2.0], [1.9, 2.0]]), 0.3
    plain = mean_energy(Parabolas((2,), torch.ones(3)), x, std, 20_000)
    torch.testing.assert_close(plain, (x**2).sum(1) + 2 * std**2, rtol=0.01, atol=0.01)
    of_classes = mean_energy(Parabolas((2,), torch.ones(3), classes=2), x, std, 20_000)
    torch.testing.assert_close(of_classes, torch.tensor([0.0, 0.0, 0.01]) + 2 * std**2, rtol=0.02, atol=0.005)


def test_a_score_is_the_samples_own_whatever_it_is_scored_with(generator):
    model, x = ring(), ring().sample(40, generator)
    together = denoising_error(model, x)
    torch.testing.assert_close(denoising_error(model, x.flip(0)[:7]), together.flip(0)[:7])


def test_samples_are_read_in_their_order_from_arrays_pictures_and_run_folders(tmp_path):
    from PIL import Image

    grey = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4)
    np.save(tmp_path / "bytes.npy", grey)
    torch.testing.assert_close(load_samples(str(tmp_path / "bytes.npy"))[:, 0], torch.from_numpy(grey / 127.5 - 1).float())
    (tmp_path / "pictures").mkdir()
    for k, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{k}.png")
    from_pictures = load_samples(str(tmp_path / "pictures"))
    assert from_pictures.shape == (5, 3, 4, 4)
    torch.testing.assert_close(from_pictures[:, 1], load_samples(str(tmp_path / "bytes.npy"))[:, 0])
    assert load_samples(str(tmp_path / "pictures"), size=2).shape == (5, 3, 2, 2)
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / "samples.npz", x=np.ones((2, 3)))
    assert load_samples(str(tmp_path / "run")).tolist() == [[1.0] * 3] * 2
    np.save(tmp_path / "nan.npy", np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"nan.npy: 1 of 2 samples hold NaN .*first in row 1"):
        load_samples(str(tmp_path / "nan.npy"))
    with pytest.raises(ValueError, match="no samples 'nowhere': give a folder"):
        load_samples("nowhere")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with points of a ring, a model of them, samplers with each kind of density, points inside the ring and on it."""
    root, g = tmp_path_factory.mktemp("scores"), torch.Generator().manual_seed(0)
    np.save(root / "points.npy", ring().sample(900, g).numpy())
    np.save(root / "middle.npy", (0.1 * torch.randn(50, 2, generator=g)).numpy())
    np.save(root / "more.npy", ring().sample(400, g).numpy())
    data, small = ("--data", root / "points.npy", "--threads", 1), ("--width", 64, "--depth", 2)
    cli.main([str(a) for a in ("train", *data, "--out", root / "model", "--iterations", 1500, "--sigma-min", 0.1, *small)])
    tuning = ("--steps", 2, "--iterations", 10, "--density-iterations", 400, "--schedule", "karras")
    for name, density in (("sampler", "scalar"), ("other", "reconstruction")):
        tuned = ("finetune", "--model", root / "model", *data, "--out", root / name, *tuning, "--density", density)
        cli.main([str(a) for a in tuned])
    return root


@pytest.mark.parametrize(("model", "kind"), [("model", "denoising error"), ("sampler", "energy"), ("other", "energy")])
def test_the_command_scores_samples_beside_held_out_data(trained, tmp_path, model, kind, capsys):
    sets = ("--samples", trained / "middle.npy", "--samples", trained / "more.npy")
    run = ("score", "--model", trained / model, "--data", trained / "points.npy", *sets, "--out", tmp_path / "s")
    cli.main([str(a) for a in run])
    known, scores = read_table(tmp_path / "s"), np.load(tmp_path / "s" / "scores.npz")
    rows = {row["samples"]: row for row in known["rows"]}
    assert known["score"] == kind
    assert rows["middle"]["auroc"] > 0.9
    assert rows["middle"]["flagged"] > 0.5
    assert 0.4 < rows["more"]["auroc"] < 0.6  # as plausible as what was held out
    assert rows["held_out"]["flagged"] == pytest.approx(0.05, abs=1 / 150)
    assert rows["more"]["flagged"] == pytest.approx(float((scores["more"] > known["threshold"]).mean()))
    x = load_samples(str(trained / "middle.npy"))
    if model == "model":
        expected = denoising_error(load_denoiser(str(trained / model)), x)
    else:
        sampler, value = load_sampler(trained / model)
        expected = mean_energy(value, x, float(sampler.last_std))
    np.testing.assert_allclose(scores["middle"], expected.numpy(), rtol=1e-4)
    assert "AUROC against held-out" in (tmp_path / "s" / "report.html").read_text()
    before = (tmp_path / "s" / "scores.npz").stat().st_mtime_ns
    cli.main([str(a) for a in run])  # a finished one is left as it is
    assert (tmp_path / "s" / "scores.npz").stat().st_mtime_ns == before
    assert "AUROC against held-out" in capsys.readouterr().out


def test_mistakes_are_one_line_and_leave_nothing_behind(trained, tmp_path, capsys):
    np.save(tmp_path / "wide.npy", np.zeros((4, 3), np.float32))
    odd = ("--samples", trained / "middle.npy")

    def mistake(*arguments, model="model"):
        run = ("score", "--model", trained / model, "--data", trained / "points.npy", "--out", tmp_path / "s", *arguments)
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in run])
        assert stop.value.code == 2
        assert not (tmp_path / "s").exists()
        return capsys.readouterr().err

    assert "wide has samples of shape (3,), the data of (2,)" in mistake("--samples", tmp_path / "wide.npy")
    assert "leave --sigma out" in mistake(*odd, "--sigma", 1, model="sampler")
    assert "--sigma must lie among the model's levels" in mistake(*odd, "--sigma", 1000)
    assert "cannot be told apart" in mistake(*odd, *odd)
    assert "no samples" in mistake("--samples", tmp_path / "missing.npy")


def test_a_sampler_of_classes_scores_with_the_class_that_fits_best(tmp_path):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 2
    x = 4.0 * y[:, None] - 2 + 0.3 * torch.randn(600, 2, generator=g)
    np.savez(tmp_path / "points.npz", x=x.numpy(), y=y.numpy())
    np.savez(tmp_path / "between.npz", x=0.2 * torch.randn(40, 2, generator=g).numpy())
    data = ("--data", tmp_path / "points.npz", "--threads", 1)
    train = ("train", *data, "--labels", "--iterations", 300, "--width", 32, "--depth", 1, "--sigma-min", 0.1)
    cli.main([str(a) for a in (*train, "--out", tmp_path / "model")])
    tuning = ("--steps", 2, "--iterations", 10, "--density-iterations", 400, "--schedule", "karras")
    cli.main([str(a) for a in ("finetune", "--model", tmp_path / "model", *data, "--out", tmp_path / "sampler", *tuning)])
    from fewstep.config import Source

    source = Source(str(tmp_path / "points.npz"))
    for model in ("sampler", "model"):
        _, rows = score(str(tmp_path / model), source, [str(tmp_path / "between.npz")], tmp_path / f"scores of {model}")
        assert json.loads(json.dumps(rows))[1]["auroc"] > 0.95
