"""The command line: the way from data to samples, and what a user's mistakes give: one line, exit code 2, nothing lost."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep import cli, finetuning, tune
from fewstep.endpoint import Runs, mean_square, reference
from fewstep.free import dmn
from fewstep.mixture import ring
from fewstep.models import load_denoiser, load_sampler
from fewstep.schedule import Schedule, karras

TINY = ["--width", "16", "--depth", "1", "--threads", "1"]
SMALL = ["--noises", 64, "--budget", 7000, "--verdict-noises", 32]


def fewstep(*arguments, expect=0, capsys=None):
    """Run a command in this process; returns its stderr."""
    code = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    err = capsys.readouterr().err if capsys else ""
    assert code == expect, err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with points.npy, a tiny model, its schedule, and a fine-tuned two-step sampler."""
    root = tmp_path_factory.mktemp("cli")
    np.save(root / "points.npy", ring().sample(600, torch.Generator().manual_seed(0)).numpy())
    data = ("--data", root / "points.npy")
    fewstep("train", *data, "--out", root / "model", "--iterations", 200, *TINY)
    fewstep("schedule", "--model", root / "model", "--out", root / "schedule", "--solver", "euler", "--steps", 2, *SMALL)
    tuning = ("--iterations", 20, "--density-iterations", 10, "--batch-size", 32, "--schedule", root / "schedule")
    fewstep("finetune", "--model", root / "model", *data, "--out", root / "sampler", "--steps", 2, *tuning)
    return root


def test_the_way_from_data_to_samples(trained, tmp_path, monkeypatch):
    learned = Schedule.load(trained / "schedule" / "schedule.json")
    assert learned.provenance["solver"] == "euler"
    assert learned.provenance["evaluations"] <= 7000
    assert list(learned.grids) == [2]
    monkeypatch.chdir(trained)  # relative names are kept relative to the run folder
    fewstep("sample", "--model", "model", "--schedule", "schedule", "--steps", 5, "--count", 30, "--out", tmp_path / "a")
    fewstep("sample", "--model", "sampler", "--count", 30, "--out", tmp_path / "b")
    fewstep("sample", "--model", "sampler", "--count", 30, "--steps", 3, "--out", tmp_path / "c")
    for name in ("a", "b", "c"):
        x = np.load(tmp_path / name / "samples.npz")["x"]
        assert x.shape == (30, 2)
        assert np.isfinite(x).all()
        assert (tmp_path / name / "samples.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "c" / "config.json").read_text())["config"]["times"]) == 4


@pytest.mark.timeout(300)
def test_two_processes_of_torchrun_make_one_folder_of_the_same_weights(trained, tmp_path):
    pytest.importorskip("accelerate")
    tuning = ("--iterations", 20, "--density-iterations", 10, "--batch-size", 32)  # on levels that each process learns
    run = ("finetune", "--model", trained / "model", "--data", trained / "points.npy", "--steps", 2, *tuning)
    fewstep(*run, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "fewstep.cli"]
    command += [*run, "--out", tmp_path / "two", "--device", "cpu"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("The sampler and its energy are in") == 1
    one, two = (load_file(tmp_path / name / "sampler.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_fine_tuning_learns_its_levels_where_none_are_given_and_goes_on_with_them(trained, tmp_path, monkeypatch, capsys):
    run = ("finetune", "--model", trained / "model", "--data", trained / "points.npy", "--out", tmp_path / "f", "--steps", 3)
    run += ("--iterations", 4, "--density-iterations", 4, "--batch-size", 32)
    fewstep(*run)
    sampler, _ = load_sampler(tmp_path / "f")
    learned, path = Schedule.load(tmp_path / "f" / "schedule.json"), sampler.path
    torch.testing.assert_close(sampler.times.cpu(), learned.times(path, 3), rtol=0, atol=0)
    about = learned.provenance
    assert (about["solver"], list(about["refined"])) == ("ancestral", ["3"])
    # nearer to the ODE's ends, on noises that the fit has not seen, without the noise of the steps
    model = load_denoiser(str(trained / "model"))
    known = reference(model, torch.randn(500, 2, generator=torch.Generator().manual_seed(9)), levels=96)
    runs = Runs(model, "euler", known.noise)
    usual = karras(path.sigma_min, path.sigma_max).times(path, 3)
    own, usual = (mean_square(runs, path.angle(t)[:-1], known.ends) for t in (sampler.times.cpu(), usual))
    assert own < 0.7 * usual
    # a repeated command takes the levels that are there; other levels belong to another folder
    (tmp_path / "f" / "sampler.safetensors").unlink()
    monkeypatch.setattr(tune, "learn_levels", None)
    fewstep(*run)
    assert "learned_levels was True" in fewstep(*run, "--schedule", "karras", expect=2, capsys=capsys)


def test_dmn_is_a_schedule_by_its_name(trained, tmp_path):
    model = load_denoiser(str(trained / "model"))
    fewstep("sample", "--model", trained / "model", "--schedule", "dmn", "--steps", 6, "--count", 8, "--out", tmp_path / "a")
    times = json.loads((tmp_path / "a" / "config.json").read_text())["config"]["times"]
    sigmas = torch.tan(model.path.angle(torch.tensor(times, dtype=torch.float64)))
    torch.testing.assert_close(sigmas, dmn(model.path.sigma_min, model.path.sigma_max, 6))
    run = ("evaluate", "--model", trained / "model", "--data", trained / "points.npy", "--out", tmp_path / "e")
    fewstep(*run, "--schedule", "dmn", "--schedule", "karras", "--steps", 2, "--steps", 4, "--count", 50, "--seeds", 1)
    rows = [json.loads(line) for line in (tmp_path / "e" / "evaluation.jsonl").read_text().splitlines()]
    assert {(row["method"], row["steps"]) for row in rows} == {(f"{m}, euler", n) for m in ("dmn", "karras") for n in (2, 4)}


FLOW = """
import torch
from fewstep import from_velocity

class Velocity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):  # of data N(0, 4), exactly, at scale 1
        a, t = 4 * self.scale, t[:, None]
        return (t - (1 - t) * a) / ((1 - t) ** 2 * a + t**2) * x

def velocity():
    return from_velocity(Velocity(), sigma_min=0.05, sigma_max=20.0, shape=(2,))
"""


def test_a_flow_model_is_fine_tuned_from_below_pure_noise(tmp_path):
    (tmp_path / "flow.py").write_text(FLOW)
    np.save(tmp_path / "points.npy", 2 * torch.randn(600, 2, generator=torch.Generator().manual_seed(0)).numpy())
    run = ("finetune", "--model", f"{tmp_path}/flow.py:velocity", "--data", tmp_path / "points.npy", "--steps", 3)
    fewstep(*run, "--iterations", 4, "--density-iterations", 4, "--batch-size", 32, "--out", tmp_path / "f")
    sampler, _ = load_sampler(tmp_path / "f")
    assert float(sampler.times[0]) < 20 / 21 + 1e-6  # sigma/alpha = 20 at most, where the path goes on to infinity
    x = sampler.sample(sampler.start(4000, (2,), torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2))
    torch.testing.assert_close(x.std(0), torch.full((2,), 2.0), rtol=0.1, atol=0)
    fewstep("sample", "--model", tmp_path / "f", "--count", 8, "--out", tmp_path / "s")
    assert np.isfinite(np.load(tmp_path / "s" / "samples.npz")["x"]).all()


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A folder with labelled points of two classes far apart, a model of them, and a sampler fine-tuned from it."""
    root, g = tmp_path_factory.mktemp("labels"), torch.Generator().manual_seed(0)
    y = torch.arange(600) % 2
    x = 4.0 * y[:, None] - 2 + 0.3 * torch.randn(600, 2, generator=g)
    np.savez(root / "points.npz", x=x.numpy(), y=y.numpy())
    data = ("--data", root / "points.npz")
    training = ("--iterations", 300, "--label-dropout", 0.2, "--lr", 5e-3, "--ema", 0.99, *TINY)
    fewstep("train", *data, "--labels", "--out", root / "model", *training)
    tuning = ("--iterations", 20, "--density-iterations", 10, "--batch-size", 32, "--steps", 3)
    fewstep("finetune", "--model", root / "model", *data, "--out", root / "sampler", *tuning)
    return root


def sampled(model, out, *options):
    fewstep("sample", "--model", model, "--count", 40, "--out", out, *options)
    return np.load(out / "samples.npz")


def test_samples_with_a_label_land_in_its_class(conditional, tmp_path):
    """Class 0 lies around -2, class 1 around 2; several labels take turns; without one there are both."""
    for model, more in (("model", ()), ("model", ("--guidance", 2)), ("sampler", ())):
        out = tmp_path / f"{model}{len(more)}"
        one = sampled(conditional / model, out / "one", "--label", 1, *more)
        turns = sampled(conditional / model, out / "turns", "--label", 1, "--label", 0, *more)
        assert one["y"].tolist() == [1] * 40
        assert turns["y"].tolist() == [1, 0] * 20
        np.testing.assert_allclose(one["x"].mean(0), 2, atol=0.4)
        for found in (one, turns):
            assert (np.sign(found["x"]) == 2 * found["y"][:, None] - 1).mean() > 0.95
    both = sampled(conditional / "model", tmp_path / "both")
    assert set(both) == {"x"}
    assert 0.2 < (both["x"][:, 0] > 0).mean() < 0.8


def test_a_conditional_model_serves_the_commands_that_know_no_labels(conditional, tmp_path):
    model, data = ("--model", conditional / "model"), ("--data", conditional / "points.npz")
    few = ("--cost", "corrector", "--draws", 16, "--probes", 20, "--verdict-noises", 32)
    fewstep("schedule", *model, *few, "--out", tmp_path / "schedule")
    more = ("--schedule", tmp_path / "schedule", "--steps", 6, "--count", 300, "--seeds", 1, "--out", tmp_path / "e")
    fewstep("evaluate", *model, *data, *more)
    (row,) = map(json.loads, (tmp_path / "e" / "evaluation.jsonl").read_text().splitlines())
    assert row["sw"] < 0.8  # the data's radius is 2.9: both classes are there


def test_evaluation_tells_classes_in_the_shares_of_the_data(conditional, tmp_path, capsys):
    """A quarter of class 0 at -2, all of it first: fewer samples than data, or as many of each, would be 2 or more away."""
    with np.load(conditional / "points.npz") as points:
        order = np.concatenate([np.flatnonzero(points["y"] == 0)[:100], np.flatnonzero(points["y"] == 1)])
        np.savez(tmp_path / "sorted.npz", x=points["x"][order], y=points["y"][order])
    names = ("--model", conditional / "model", "--sampler", conditional / "sampler", "--data", tmp_path / "sorted.npz")
    few = ("--schedule", "karras", "--steps", 6, "--sampler-steps", 2, "--sampler-steps", 3, "--count", 100, "--seeds", 1)
    rows = {}
    for scale in (None, 1, 4):
        out, more = tmp_path / str(scale), ("--guidance", scale) if scale else ()
        fewstep("evaluate", *names, *few, *more, "--out", out)
        rows[scale] = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
        assert all(row["sw"] < 1 for row in rows[scale])
    assert [row["evaluations"] for row in rows[None]] == [6, 2, 3]
    assert [row["evaluations"] for row in rows[4]] == [12, 2, 3]
    assert rows[1][1:] == rows[4][1:] == rows[None][1:]
    assert rows[1][0]["sw"] == pytest.approx(rows[None][0]["sw"], abs=1e-4)  # scale 1 is no guidance
    assert abs(rows[4][0]["sw"] - rows[1][0]["sw"]) > 1e-3
    fewstep("evaluate", *names, *few, "--no-labels", "--out", tmp_path / "untold")  # then in the model's own: half of each
    untold = [json.loads(line) for line in (tmp_path / "untold" / "evaluation.jsonl").read_text().splitlines()]
    assert untold[0]["sw"] > 1
    assert "labels_fingerprint was" in fewstep("evaluate", *names, *few, "--out", tmp_path / "untold", expect=2, capsys=capsys)


def test_an_evaluation_of_before_there_were_labels_in_it_goes_on(trained, tmp_path):
    arguments = ("evaluate", "--model", trained / "model", "--data", trained / "points.npy", "--steps", 2, "--count", 50)
    fewstep(*arguments, "--seeds", 1, "--out", tmp_path / "e")
    document = json.loads((tmp_path / "e" / "config.json").read_text())
    for key in ("guidance", "sampler_steps"):
        del document["config"][key]
    (tmp_path / "e" / "config.json").write_text(json.dumps(document))
    fewstep(*arguments, "--seeds", 1, "--out", tmp_path / "e")


def test_a_run_of_an_older_fewstep_goes_on_if_what_it_did_not_know_is_at_its_default(tmp_path, capsys):
    np.save(tmp_path / "p.npy", np.random.default_rng(0).normal(size=(60, 2)))
    data, model = ("--data", tmp_path / "p.npy", "--batch-size", 8), tmp_path / "m"
    train = ("train", *data, "--iterations", 3, *TINY, "--out", model)
    finetune = ("finetune", *data, "--model", model, "--iterations", 2, "--density-iterations", 2, "--out", tmp_path / "f")
    for arguments, key, other in ((train, "schedule_blend", 0.5), (finetune, "critic_steps", 2)):
        fewstep(*arguments)
        file = arguments[-1] / "config.json"
        document = json.loads(file.read_text())
        del document["config"][key]
        file.write_text(json.dumps(document))
        fewstep(*arguments)
        assert f"{key} was " in fewstep(*arguments, f"--{key.replace('_', '-')}", other, expect=2, capsys=capsys)


def test_a_run_from_before_there_was_a_score_to_choose_followed_the_densitys(tmp_path, capsys):
    np.save(tmp_path / "p.npy", np.random.default_rng(0).normal(size=(60, 2)))
    data = ("--data", tmp_path / "p.npy", "--batch-size", 8)
    fewstep("train", *data, "--iterations", 3, *TINY, "--out", tmp_path / "m")
    run = ("finetune", *data, "--model", tmp_path / "m", "--iterations", 2, "--density-iterations", 2, "--out", tmp_path / "f")
    fewstep(*run, "--score", "density")
    file = tmp_path / "f" / "config.json"
    document = json.loads(file.read_text())
    del document["config"]["score"]
    file.write_text(json.dumps(document))
    assert "score was 'density', now 'model'" in fewstep(*run, expect=2, capsys=capsys)
    fewstep(*run, "--score", "density")


def test_a_labelled_run_continues_where_it_stood_and_notices_other_labels(conditional, tmp_path, capsys):
    with np.load(conditional / "points.npz") as points:
        x, y = points["x"], points["y"]
    np.savez(tmp_path / "p.npz", x=x, y=y)
    arguments = ("train", "--data", tmp_path / "p.npz", "--labels", "--iterations", 5, *TINY, "--out", tmp_path / "m")
    fewstep(*arguments)
    fewstep(*arguments)
    np.savez(tmp_path / "p.npz", x=x, y=1 - y)
    assert "labels_fingerprint was" in fewstep(*arguments, expect=2, capsys=capsys)


def test_mistakes_with_labels_give_one_line(conditional, trained, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(50, 2))
    for name, y in (
        ("three", np.arange(50) % 3),
        ("none", np.arange(50) % 3 - 1),
        ("from1", np.arange(50) % 3 + 1),
        ("gap", np.arange(50) % 3 * 2),
        ("named", np.array(["a", "b"] * 25)),
    ):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    train = ("train", *TINY, "--iterations", 1, "--labels", "--out", tmp_path / "out", "--data")
    judged = ("evaluate", "--out", tmp_path / "out", "--model")
    tuned = ("finetune", "--out", tmp_path / "out", "--model", conditional / "model", "--batch-size", 8)
    plain, model, sampler = (
        ("sample", "--out", tmp_path / "out", "--model", name)
        for name in (trained / "model", conditional / "model", conditional / "sampler")
    )
    for arguments, words in (
        ((*train, trained / "points.npy"), "no labels"),
        ((*train, tmp_path / "named.npz"), "no labels"),
        ((*train, tmp_path / "from1.npz"), "3 different ones from 1 to 3: renumber"),
        ((*train, tmp_path / "gap.npz"), "3 different ones from 0 to 4: renumber"),
        ((*train, conditional / "points.npz", "--label-dropout", 0), "greater than 0"),
        ((*plain, "--label", 1), "knows no classes, so leave --label out"),
        ((*model, "--label", 2), "must lie in 0 .. 1"),
        ((*model, "--label=-1"), "must lie in 0 .. 1"),
        ((*model, "--label", "cat"), "cat"),
        ((*model, "--guidance", 2), "--guidance needs a --label"),
        ((*model, "--label", 1, "--guidance", 0), "greater than 0"),
        ((*sampler, "--label", 2), "must lie in 0 .. 1"),
        ((*sampler, "--label", 1, "--guidance", 2), "without guidance"),
        ((*judged, conditional / "model", "--data", tmp_path / "named.npz", "--guidance", 2), "no labels to guide towards"),
        ((*judged, trained / "model", "--data", conditional / "points.npz", "--guidance", 2), "knows no classes"),
        ((*judged, conditional / "model", "--data", conditional / "points.npz", "--guidance", 2, "--no-labels"), "leave it or"),
        ((*judged, conditional / "model", "--data", tmp_path / "three.npz"), "must lie in 0 .. 1"),
        ((*judged, conditional / "model", "--data", tmp_path / "none.npz"), "got -1 .. 1"),
        ((*tuned, "--data", tmp_path / "three.npz"), "must lie in 0 .. 1"),
    ):
        capsys.readouterr()
        lines = fewstep(*arguments, expect=2, capsys=capsys).strip().splitlines()
        assert len(lines) == 1, (arguments, lines)
        assert words in lines[0], lines
        assert not (tmp_path / "out").exists()
    fewstep("train", "--data", tmp_path / "named.npz", "--out", tmp_path / "out", "--iterations", 1, *TINY)


def test_equal_seeds_give_equal_samples_and_other_seeds_others(trained, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("--count", 20, "--solver", "ancestral", "--seed", seed, "--out", tmp_path / out)
        fewstep("sample", "--model", trained / "model", *arguments)
    a, b, c = (np.load(tmp_path / n / "samples.npz")["x"] for n in "abc")
    assert (a == b).all()
    assert not (a == c).any()


def test_a_moved_folder_still_loads(trained, tmp_path):
    fewstep("sample", "--model", trained / "sampler", "--count", 9, "--out", tmp_path / "before")
    moved = trained.rename(trained.with_name("moved"))
    try:
        fewstep("sample", "--model", moved / "sampler", "--count", 9, "--out", tmp_path / "after")
    finally:
        moved.rename(trained)
    before, after = (np.load(tmp_path / name / "samples.npz")["x"] for name in ("before", "after"))
    assert (before == after).all()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (["train", "--data", "points.npy", "--sigma-min", 50], ["--sigma-min", 0.1]),
        (["schedule", "--model", "model", "--data", "points.npy", "--sigma-min", 100], ["--sigma-min", 0.5]),
        (["sample", "--model", "model", "--schedule", "nothing.json"], ["--schedule", "karras"]),
        (["evaluate", "--model", "model", "--data", "points.npy", "--schedule", "nothing"], ["--schedule", "karras"]),
    ],
    ids=lambda tokens: str(tokens[0]),
)
def test_a_command_that_failed_leaves_its_folder_free_for_the_corrected_one(trained, tmp_path, monkeypatch, wrong, right):
    monkeypatch.chdir(trained)
    few = {"train": ["--iterations", 5, *TINY], "schedule": SMALL, "sample": ["--count", 4]}
    more = few.get(wrong[0], ["--count", 50, "--seeds", 1, "--steps", 2])
    fewstep(*wrong, *more, "--out", tmp_path / "out", expect=2)
    assert not (tmp_path / "out").exists()
    fewstep(*wrong[:-2], *right, *more, "--out", tmp_path / "out")


def test_another_schedule_or_other_data_under_the_same_name_are_noticed(trained, tmp_path, capsys):
    karras(0.1, 10).save(tmp_path / "s.json")
    arguments = (
        "sample",
        "--model",
        trained / "model",
        "--schedule",
        tmp_path / "s.json",
        "--out",
        tmp_path / "o",
        "--count",
        4,
    )
    fewstep(*arguments)
    karras(0.2, 10).save(tmp_path / "s.json")
    assert "times was" in fewstep(*arguments, expect=2, capsys=capsys)


def test_other_levels_for_the_steps_that_were_evaluated_are_noticed_on_the_same_curve(trained, tmp_path, capsys):
    curve, file = karras(0.1, 10), tmp_path / "s.json"
    arguments = ("evaluate", "--model", trained / "model", "--data", trained / "points.npy", "--steps", 2, "--count", 50)
    arguments = (*arguments, "--seeds", 1, "--schedule", file, "--out", tmp_path / "o")
    curve.save(file)
    fewstep(*arguments)
    dataclasses.replace(curve, grids={3: torch.tensor([1.4, 1.0, 0.1])}).save(file)
    fewstep(*arguments)  # levels of another number of steps
    dataclasses.replace(curve, grids={2: torch.tensor([1.4, 0.1])}).save(file)
    assert "schedule: learned was" in fewstep(*arguments, expect=2, capsys=capsys)


def test_a_schedule_by_the_published_cost_from_data_or_from_the_models_own_samples(trained, tmp_path):
    """The corrector's cost knows no solver and needs data, its own where none are given."""
    few = ("--cost", "corrector", "--draws", 16, "--probes", 20, "--verdict-noises", 32)
    for out, data in (("a", ("--data", trained / "points.npy")), ("b", ())):
        fewstep("schedule", "--model", trained / "model", *data, *few, "--out", tmp_path / out)
    a, b = (Schedule.load(tmp_path / out / "schedule.json").provenance for out in "ab")
    assert a["evaluations"] == 2 * 19 * 16
    assert b["evaluations"] == 2 * 19 * 16 + 48 * b["own_samples"]
    assert a["verdict"]["solver"] == b["verdict"]["solver"] == "dpmpp_2m"
    assert "own_samples" not in a


def test_a_schedule_is_held_against_another_model_by_exit_codes(trained, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from fewstep.mixture import ring\nfrom fewstep.path import VE\n\n"
        "def other():\n    return ring(std=0.001, path=VE(0.02, 40.0))\n"
    )
    check = ("schedule", "--check", trained / "schedule", "--verdict-noises", 32)
    fewstep(*check, "--model", trained / "model")
    assert "keep: " in capsys.readouterr().out
    fewstep(*check, "--model", f"{tmp_path}/mine.py:other", expect=3)


def test_two_schedules_of_one_kind_are_two_rows(trained, tmp_path):
    for name in ("a", "b"):
        karras(0.1, 10).save(tmp_path / f"{name}.json")
    schedules = ("--schedule", tmp_path / "a.json", "--schedule", tmp_path / "b.json")
    arguments = ("--data", trained / "points.npy", "--steps", 2, "--count", 50, "--seeds", 1, "--out", tmp_path / "e")
    fewstep("evaluate", "--model", trained / "model", *schedules, *arguments)
    rows = [json.loads(line) for line in (tmp_path / "e" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["learned a, euler", "learned b, euler"]


def test_evaluation_goes_on_with_the_cells_that_are_missing(trained, tmp_path):
    out = tmp_path / "e"
    arguments = ("evaluate", "--model", trained / "model", "--sampler", trained / "sampler", "--data", trained / "points.npy")
    arguments += ("--steps", 2, "--steps", 3, "--count", 100, "--seeds", 2, "--out", out)
    fewstep(*arguments)
    whole = (out / "evaluation.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == (2 * 2 + 1) * 2
    assert {row["evaluations"] for row in rows} == {2, 3}
    lines = whole.splitlines(keepends=True)
    (out / "evaluation.jsonl").write_text("".join(lines[:3]))
    fewstep(*arguments)
    again = (out / "evaluation.jsonl").read_text()
    assert again == whole


def test_features_bring_precision_and_recall_into_the_table(trained, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def doubled(x):\n    return 2 * x.flatten(1)\n")
    arguments = ("--data", trained / "points.npy", "--steps", 2, "--count", 50, "--seeds", 1, "--schedule", "karras")
    evaluate = ("evaluate", "--model", trained / "model", *arguments)
    fewstep(*evaluate, "--out", tmp_path / "plain")
    assert "recall" not in capsys.readouterr().out
    fewstep(*evaluate, "--features", f"{tmp_path / 'mine.py'}:doubled", "--out", tmp_path / "with")
    assert "recall" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "with" / "evaluation.jsonl").read_text().splitlines()]
    assert all(0 <= row[k] <= 1 for row in rows for k in ("precision", "recall"))


def test_show_makes_a_page_for_every_kind_of_folder(trained, capsys):
    for name in ("model", "schedule", "sampler"):
        fewstep("show", trained / name)
        page = (trained / name / "report.html").read_text()
        assert "data:image/png;base64," in page
        said = capsys.readouterr().out
        assert "report.html" in said
        if name == "schedule":
            first = float(Schedule.load(trained / "schedule" / "schedule.json").sigmas(2)[0])
            assert f"{first:.4g}, " in said
            assert "2 steps of euler: endpoint error" in " ".join(said.split())


def test_a_run_that_was_never_finite_where_it_was_judged_says_so(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetuning, "keep_best", lambda *_: {})
    arguments = ("--model", trained / "model", "--data", trained / "points.npy", "--schedule", "karras", "--steps", 2)
    short = ("--iterations", 2, "--density-iterations", 2, "--threads", 1)
    err = fewstep("finetune", *arguments, *short, "--out", tmp_path / "f", expect=2, capsys=capsys)
    assert "no state's samples and energies were finite" in err
    assert not (tmp_path / "f" / "sampler.safetensors").exists()


def test_a_schedule_is_run_with_the_solver_that_it_was_learned_for(trained, tmp_path):
    learned = Schedule.load(trained / "schedule" / "schedule.json")
    dataclasses.replace(learned, provenance=learned.provenance | {"solver": "heun"}).save(tmp_path / "s.json")
    sample = ("sample", "--model", trained / "model", "--schedule", tmp_path / "s.json", "--steps", 2, "--count", 4)
    for out, more, solver in (("a", (), "heun"), ("b", ("--solver", "unipc"), "unipc")):
        fewstep(*sample, *more, "--out", tmp_path / out)
        assert json.loads((tmp_path / out / "config.json").read_text())["config"]["solver"] == solver
    fewstep("sample", "--model", trained / "model", "--steps", 2, "--count", 4, "--out", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["config"]["solver"] == "euler"
    evaluate = ("evaluate", "--model", trained / "model", "--data", trained / "points.npy", "--steps", 2, "--count", 50)
    evaluate += ("--seeds", 1, "--schedule", "karras", "--schedule", tmp_path / "s.json")
    fewstep(*evaluate, "--out", tmp_path / "e")
    rows = [json.loads(line) for line in (tmp_path / "e" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["karras, heun", "learned, heun"]


def test_a_model_by_file_and_function(trained, tmp_path):
    (tmp_path / "mine.py").write_text("from fewstep.mixture import ring\n\ndef exact():\n    return ring()\n")
    out = tmp_path / "s"
    fewstep("sample", "--model", f"{tmp_path}/mine.py:exact", "--steps", 20, "--count", 50, "--out", out)
    x = torch.from_numpy(np.load(out / "samples.npz")["x"])
    assert ring().energy(x).mean() < 4  # about 2.9 on data, over 20 on noise


def test_a_sampler_of_an_older_fewstep_has_the_density_that_it_learned(tmp_path):
    """Its settings do not say which one: there was one alone, of any number of x."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 20)))
    data, out = ("--data", tmp_path / "x.npy"), tmp_path / "sampler"
    fewstep("train", *data, "--out", tmp_path / "model", "--iterations", 5, "--width", 16)
    few = ("--steps", 2, "--schedule", "karras", "--batch-size", 16, "--density", "scalar")
    few += ("--iterations", 4, "--density-iterations", 4)
    fewstep("finetune", *data, "--model", tmp_path / "model", "--out", out, *few)
    x, before = torch.randn(5, 20), load_sampler(out)[1]
    document = json.loads((out / "config.json").read_text())
    del document["config"]["density"]
    (out / "config.json").write_text(json.dumps(document))
    assert torch.equal(load_sampler(out)[1].energy(x), before.energy(x))


def test_an_energy_of_a_given_structure(trained, tmp_path, capsys):
    """A tiny autoencoder's reconstruction error, alone, comes back as it was learned."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n\n\n"
        "class Error(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1), nn.Linear(1, 2))\n\n"
        "    def forward(self, x):\n"
        "        return ((self.net(x) - x) ** 2).mean(1)\n"
    )
    out, data = tmp_path / "sampler", ("--data", trained / "points.npy", "--model", trained / "model")
    alone = ("--energy", f"{tmp_path}/mine.py:Error", "--density-iterations", 0, "--iterations", 20, "--batch-size", 32)
    fewstep("finetune", *data, "--out", out, "--steps", 2, *alone)
    _, value = load_sampler(out)
    kept, x = load_file(out / "value.safetensors"), torch.randn(5, 2)
    assert torch.equal(value.structured.net[0].weight, kept["structured.net.0.weight"])
    assert torch.equal(value.energy(x), ((value.structured.net(x) - x) ** 2).mean(1))
    fewstep("sample", "--model", out, "--count", 5, "--out", tmp_path / "s")
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("mean(1)", "sum(1)"))
    assert "mine.py" in fewstep("sample", "--model", out, "--out", tmp_path / "t", expect=2, capsys=capsys)
    again = fewstep("finetune", *data, "--out", out, "--steps", 2, *alone, expect=2, capsys=capsys)
    assert "energy_fingerprint" in again


def bad_inputs(root, tmp):
    """name -> (arguments, words of the message)."""
    nan = ring().sample(50, torch.Generator()).numpy()
    nan[7] = np.nan
    np.save(tmp / "nan.npy", nan)
    np.save(tmp / "few.npy", nan[:5])
    np.save(tmp / "wide.npy", np.random.default_rng(0).normal(size=(50, 3)))
    np.save(tmp / "large.npy", 1000 * np.random.default_rng(0).normal(size=(50, 2)))
    (tmp / "text.npy").write_text("hello")
    functions = ("five():\n    return 5", "taste(x):\n    return x[:, 0]", "lost():\n    raise RuntimeError('no weights')")
    (tmp / "mine.py").write_text("\n\n\n".join(f"def {function}" for function in functions) + "\n")
    (tmp / "broken.py").write_text("def five(:\n")
    np.savez(tmp / "cut.npz", x=nan)
    (tmp / "cut.npz").write_bytes((tmp / "cut.npz").read_bytes()[:200])
    np.save(tmp / "number.npy", np.float32(3))
    np.savez(tmp / "labels.npz", x=np.ones((50, 2)), y=np.ones(3))
    karras().save(tmp / "k.json")
    document = json.loads((tmp / "k.json").read_text())
    document["theta"][3] = document["theta"][2]
    (tmp / "flat.json").write_text(json.dumps(document))
    (tmp / "cut.json").write_text((tmp / "k.json").read_text()[:300])
    (tmp / "other").mkdir()
    (tmp / "other" / "config.json").write_text("{}")
    model, points, out = root / "model", root / "points.npy", tmp / "out"
    evaluate = ("evaluate", "--model", model, "--data", points, "--out", out)
    sampler = ("sample", "--model", root / "sampler", "--out", out)
    finetune = ("finetune", "--model", model, "--data", points, "--out", out)
    train = ("train", "--out", out, "--data")
    sample = ("sample", "--model", model, "--out", out)
    return {
        "no such command": (("trian",), "Did you mean"),
        "no such option": ((*train, points, "--lrr", 1), "Unknown option"),
        "a rate below zero": ((*train, points, "--lr=-1"), "greater than 0"),
        "no such data": ((*train, "digitz"), "no data set 'digitz'"),
        "a named set that is not there": ((*train, "mnist", "--data-folder", tmp), "FEWSTEP_DATA"),
        "NaN in the data": ((*train, tmp / "nan.npy"), "NaN"),
        "too few samples": ((*train, tmp / "few.npy"), "too few samples"),
        "a file that is no array": ((*train, tmp / "text.npy"), "cannot be read"),
        "a truncated npz": ((*train, tmp / "cut.npz"), "cannot be read"),
        "a number for an array": ((*train, tmp / "number.npy"), "array of numbers"),
        "labels of another length": ((*train, tmp / "labels.npz"), "3 labels for 50 samples"),
        "a file that cannot be imported": (("sample", "--model", f"{tmp}/broken.py:five", "--out", out), "SyntaxError"),
        "the same schedule twice": ((*evaluate, "--schedule", "karras", "--schedule", "karras"), "told apart"),
        "a sampler on a schedule": (("sample", "--model", root / "sampler", "--solver", "euler", "--out", out), "leave --"),
        "data of another scale": ((*train, tmp / "large.npy"), "standard deviation"),
        "a folder of another configuration": (
            ("train", "--data", points, "--out", model, "--iterations", 7, *TINY),
            "iterations was 200, now 7",
        ),
        "a folder of another command": (("sample", "--model", model, "--out", model), "belongs to `fewstep train`"),
        "a folder that is no run": (("train", "--data", points, "--out", tmp), "not a run folder"),
        "a sample of another shape": ((*sample, "--shape", 3), "(3,)"),
        "export of a named schedule": (("export", "--schedule", "karras", "--to", "json"), "no schedule file 'karras'"),
        "no such model": (("sample", "--model", "nothing", "--out", out), "no model 'nothing'"),
        "a model folder that is none": (("sample", "--model", tmp / "other", "--out", out), "diffusers"),
        "a function that returns no model": (("sample", "--model", f"{tmp}/mine.py:five", "--out", out), "not a fewstep"),
        "a function that fails": (("sample", "--model", f"{tmp}/mine.py:lost", "--out", out), "RuntimeError: no weights"),
        "a function that is not there": (("sample", "--model", f"{tmp}/mine.py:six", "--out", out), "no function 'six'"),
        "steps of a published cost": (
            ("schedule", "--model", model, "--cost", "corrector", "--steps", 4, "--out", out),
            "leave --steps out",
        ),
        "guidance without conditions": (("schedule", "--model", model, "--guidance", 2, "--out", out), "needs --cond"),
        "a schedule for nowhere": (("schedule", "--model", model), "give --out"),
        "a check of a file without a verdict": (("schedule", "--model", model, "--check", tmp / "k.json"), "no verdict"),
        "an array for conditions": (("schedule", "--model", model, "--cond", points, "--out", out), "points.npy"),
        "an unknown solver of a schedule": (("schedule", "--model", model, "--solver", "rk45", "--out", out), "dpmpp_2m"),
        "an unknown solver": ((*sample, "--solver", "rk45"), "rk45"),
        "no such schedule": ((*sample, "--schedule", "karas"), "no schedule 'karas'"),
        "a schedule that is not monotone": ((*sample, "--schedule", tmp / "flat.json"), "strictly decrease"),
        "a truncated schedule": ((*sample, "--schedule", tmp / "cut.json"), "not JSON"),
        "a sampler on other levels": ((*sampler, "--schedule", "karras"), "own levels"),
        "data of another shape": (("schedule", "--model", model, "--data", tmp / "wide.npy", "--out", out), "shape"),
        "fewer data than a batch": ((*finetune, "--batch-size", 10**6), "too few"),
        "fine-tuning into another's folder": (
            ("finetune", "--model", "nothing", "--data", points, "--out", model),
            "belongs to `fewstep train`",
        ),
        "a check that is to write": (("schedule", "--model", model, "--check", tmp / "k.json", "--out", out), "leave --out"),
        "a check of other steps": (("schedule", "--model", model, "--check", tmp / "k.json", "--steps", 5), "leave --solver"),
        "nothing to evaluate": (("evaluate", "--data", points, "--out", out), "nothing to evaluate"),
        "a sampler's steps without one": ((*evaluate, "--sampler-steps", 3), "--sampler-steps is for a --sampler"),
        "an energy without a file": ((*finetune, "--energy", "autoencoder"), "give file.py:function"),
        "an energy that is a number": ((*finetune, "--energy", f"{tmp}/mine.py:five"), "nn.Module"),
        "an energy that wants samples": ((*finetune, "--energy", f"{tmp}/mine.py:taste"), "takes no arguments"),
        "no such device": ((*train, points, "--device", "tpu9"), "tpu9"),
        "a folder inside of a file": ((*sample[:3], "--out", tmp / "flat.json" / "f"), "flat.json is no folder"),
        "DMN in one step": ((*sample, "--schedule", "dmn", "--steps", 1), "2 or more"),
        "show of no run": (("show", tmp / "nowhere"), "not a run folder"),
    }  # fmt: skip


def test_a_mistake_gives_one_line_exit_code_2_and_changes_nothing(trained, tmp_path, capsys):
    cases = bad_inputs(trained, tmp_path)
    before = {f: f.read_bytes() for root in (trained, tmp_path) for f in root.rglob("*") if f.is_file()}
    for name, (arguments, words) in cases.items():
        capsys.readouterr()
        lines = fewstep(*arguments, expect=2, capsys=capsys).strip().splitlines()
        assert len(lines) == 1, (name, lines)
        assert lines[0].startswith("fewstep: error: "), (name, lines)
        assert words in lines[0], (name, lines)
        after = {f: f.read_bytes() for root in (trained, tmp_path) for f in root.rglob("*") if f.is_file()}
        assert after == before, (name, set(after) ^ set(before))


def test_an_unfinished_run_says_how_to_go_on(trained, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((trained / "model" / "config.json").read_bytes())
    message = fewstep("sample", "--model", tmp_path / "m", "--out", tmp_path / "o", expect=2, capsys=capsys)
    assert "has not finished; repeat its command" in message


def test_help_answers_without_torch_and_teaches():
    code = "import sys; sys.argv = ['fewstep', 'finetune', '--help']\nfrom fewstep.cli import app\n"
    code += "try: app()\nfinally: print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "200"}, check=False)
    assert "Weight of the square of the energy's correction" in done.stdout
    assert not {"torch", "numpy", "scipy", "sklearn", "matplotlib", "diffusers"} & set(done.stderr.split())


def test_help_answers_in_less_than_three_times_the_interpreter_and_its_parser():
    """A ratio of CPU seconds, side by side, since machines are shared: cyclopts and pydantic are most of what --help needs."""

    def seconds(code: str) -> float:
        used = "import atexit, sys, time; atexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"
        done = subprocess.run([sys.executable, "-c", used + code], capture_output=True, text=True, check=True)
        return float(done.stderr)

    parser = "import cyclopts, pydantic.dataclasses, rich.console"
    help_ = "import sys; sys.argv = ['fewstep', '--help']\nfrom fewstep.cli import app\napp(result_action='return_value')"
    ratio = min(seconds(help_) for _ in range(3)) / min(seconds(parser) for _ in range(3))
    assert ratio < 3, ratio
