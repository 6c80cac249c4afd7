"""Run folders: resume after a kill, bit for bit; foreign, damaged and other configurations' folders are left alone."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewstep import commands, run, tune
from fewstep.config import FinetuneConfig, Source, TrainConfig
from fewstep.dxmi import make_state
from fewstep.finetuning import finetune
from fewstep.mixture import ring
from fewstep.schedule import karras
from fewstep.training import TrainState, make_denoiser, train


@pytest.fixture
def points(tmp_path):
    file = tmp_path / "points.npy"
    np.save(file, ring().sample(600, torch.Generator().manual_seed(0)).numpy())
    return file


def fewstep(*arguments):
    return subprocess.Popen([sys.executable, "-m", "fewstep.cli", *map(str, arguments)], stderr=subprocess.DEVNULL)


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in (".safetensors", ".jsonl")}


@pytest.mark.timeout(600)  # six processes, each of which imports torch
def test_training_and_fine_tuning_continue_bit_for_bit_after_kill_9(points, tmp_path):
    """Both commands, killed at a random moment, end with the files of an undisturbed run."""
    seed = random.randrange(1000)
    print("seed of the moment:", seed)
    common = ("--data", points, "--batch-size", 16, "--threads", 1)
    commands = {
        "train": (1500, "train", *common, "--width", 16, "--depth", 1),
        "finetune": (
            400,
            "finetune",
            *common,
            "--model",
            tmp_path / "whole" / "train",
            "--steps",
            2,
            "--density-iterations",
            150,
        ),
    }
    for name, (iterations, *arguments) in commands.items():
        whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
        arguments += ["--iterations", iterations]
        assert fewstep(*arguments, "--out", whole).wait() == 0

        log, moment = broken / "metrics.jsonl", random.Random(seed).randrange(iterations * 6 // 10)
        process = fewstep(*arguments, "--out", broken)
        while process.poll() is None and not (log.exists() and len(run.read_lines(log)) * 20 >= moment):
            time.sleep(0.002)
        assert process.poll() is None, f"the run ended before it could be killed at iteration {moment}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (broken / "model.safetensors").exists()
        assert fewstep(*arguments, "--out", broken).wait() == 0
        assert files_of(whole) == files_of(broken)


def states():
    g = torch.Generator().manual_seed(0)
    data = ring().sample(500, g)
    small = TrainConfig(iterations=95, batch_size=16, width=16, depth=1)
    denoiser = make_denoiser((2,), small)
    times = karras(0.1, 10).times(denoiser.path, 3)
    tuned = FinetuneConfig(iterations=65, density_iterations=30, batch_size=16, score="density")
    follower = dataclasses.replace(tuned, score="model", critic_steps=2)
    wide = 30 * data  # the noisiest level shows them, so that the start moves
    return {
        "train": (lambda: TrainState((2,), small), lambda state: train(state, data)),
        "train with labels": (
            lambda: TrainState((2,), dataclasses.replace(small, schedule="adaptive", schedule_every=10), classes=2),
            lambda state: train(state, data, (data[:, 0] > 0).long()),
        ),
        "finetune": (lambda: make_state(denoiser, times, tuned, (2,)), lambda state: finetune(state, data)),
        "finetune from a moved start": (
            lambda: make_state(denoiser, times, follower, (2,)),
            lambda state: finetune(state, wide),
        ),
    }


@pytest.mark.parametrize("kind", ["train", "train with labels", "finetune", "finetune from a moved start"])
def test_a_loop_that_stops_between_saves_repeats_exactly_what_was_lost(kind, tmp_path):
    make, loop = states()[kind]
    logs = []
    for stops in ((), (57, 71)):
        folder = run.open_run(tmp_path / f"{kind}{len(stops)}", kind, {})
        for stop in (*stops, None):
            state = make()
            run.resume(folder, state)
            for _ in run.record(folder, state, loop(state), log_every=10, save_every=50):
                if state.step == stop:
                    break
        logs.append((run.read_lines(folder / "metrics.jsonl"), run.load_tree(folder / run.CHECKPOINT)))
    assert logs[0][0] == logs[1][0]
    assert [row["step"] for row in logs[0][0]] == [*range(10, 95, 10), 95]
    flat = [dict(leaves(tree)) for _, tree in logs]
    assert ("/sampler/start_basis" in flat[0]) == kind.startswith("finetune")
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[0].items():
        assert torch.equal(value, flat[1][name]) if isinstance(value, torch.Tensor) else value == flat[1][name], name


def leaves(node, name=""):
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, f"{name}/{key}")
    else:
        yield name, node


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3)
    tree = {"a": {0: shared, 1: shared}, "b": [1, 2.5, None, "x", True], "c": torch.tensor(float("nan")), "d": {}}
    run.save_tree(tmp_path / "t", tree)
    back = run.load_tree(tmp_path / "t")
    assert list(back["a"]) == [0, 1]
    assert torch.equal(back["a"][1], shared)
    assert back["b"] == tree["b"]
    assert torch.isnan(back["c"])
    assert back["d"] == {}


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "other model"])
def test_a_checkpoint_that_cannot_be_used_is_refused_and_kept(damage, tmp_path):
    make, loop = states()["train"]
    folder = run.open_run(tmp_path / "r", "train", {})
    state = make()
    for _ in run.record(folder, state, loop(state), 10, 20):
        pass
    file = folder / run.CHECKPOINT
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, file)
    elif damage == "text":
        file.write_text("hello")
    else:
        other = TrainState((2,), TrainConfig(width=8, depth=1))
        run.save_tree(file, other.state_dict())
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors") as caught:
        run.resume(folder, make())
    assert "remove it to start over" in str(caught.value) or "nothing was changed" in str(caught.value)
    assert files_of(folder) == before


def test_a_folder_belongs_to_one_command_and_configuration(tmp_path):
    folder = run.open_run(tmp_path / "r", "train", {"lr": 0.1, "seed": 0})
    assert run.open_run(folder, "train", {"lr": 0.1, "seed": 0}) == folder
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.2"):
        run.open_run(folder, "train", {"lr": 0.2, "seed": 0})
    with pytest.raises(ValueError, match="belongs to `fewstep train`, not `fewstep finetune`"):
        run.open_run(folder, "finetune", {"lr": 0.1, "seed": 0})
    assert files_of(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a run folder"):
        run.open_run(tmp_path / "mine", "train", {})
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_setting_that_an_older_run_did_not_know_is_its_default(tmp_path):
    folder = run.open_run(tmp_path / "r", "train", {"lr": 0.1})
    before = files_of(folder)
    run.open_run(folder, "train", {"lr": 0.1, "blend": "slow"}, {"blend": "slow", "lr": 0.3})
    with pytest.raises(ValueError, match="blend was 'slow', now 'fast'"):
        run.open_run(folder, "train", {"lr": 0.1, "blend": "fast"}, {"blend": "slow"})
    with pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.3"):
        run.open_run(folder, "train", {"lr": 0.3}, {"lr": 0.3})
    assert files_of(folder) == before


def test_a_config_of_somebody_else_or_of_the_future_is_refused(tmp_path):
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "damaged"),
        ('{"a": 1}', "somebody else's"),
        (json.dumps({"format": run.FORMAT, "version": 9}), "version 9"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run.read_config(tmp_path)


def test_a_fingerprint_tells_values_and_takes_every_precision():
    one = [torch.ones(3), torch.tensor(2.0, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(True)]
    other = [*one[:1], torch.tensor(2.5, dtype=torch.bfloat16), *one[2:]]
    assert run.fingerprint(one) == run.fingerprint([t.clone() for t in one])
    assert run.fingerprint(one) != run.fingerprint(other)


def test_tensorboard_shows_what_metrics_jsonl_holds_after_a_kill_as_well(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make, loop = states()["finetune"]
    folder = run.open_run(tmp_path / "run", "finetune", {})
    for stop in (47, None):
        state = make()
        run.resume(folder, state)
        for _ in run.record(folder, state, loop(state), log_every=10, save_every=20, tensorboard=True):
            if state.step == stop:
                break
    rows, board = run.read_lines(folder / "metrics.jsonl"), accumulator.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert "energy_gap" in board.Tags()["scalars"]
    for name in board.Tags()["scalars"]:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in board.Scalars(name)] == expected, name


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[tensorboard\]'"):
        commands.train(Source("digits"), tmp_path / "run", TrainConfig(iterations=1), tensorboard=True)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[tensorboard\]'"):
        tune.finetune("none", Source("digits"), tmp_path / "run", 4, FinetuneConfig(), tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_json_is_laid_out_to_be_read_and_says_the_same(tmp_path):
    document = {"a": 1, 2: None, "text": 'quote " and\nline', "levels": [i / 7 for i in range(300)], "empty": [{}, [], ()]}
    document["rows"] = [
        {"seed": k, "long": "x" * 100, "sigmas": [1.5, float("inf")], "x": {"y": [k, {"z": 0}]}} for k in range(3)
    ]
    run.write_json(tmp_path / "d.json", document)
    text = (tmp_path / "d.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(document))
    lines = text.splitlines()
    assert all(len(line) <= 128 for line in lines)
    assert sum('"x"' in line for line in lines) == 3
    assert len(lines) < 80
