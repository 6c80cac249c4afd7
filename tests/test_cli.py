"""The command line: the way from data to samples, and what a user's mistakes give: one line, exit code 2, nothing lost."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fewstep import cli
from fewstep.mixture import ring
from fewstep.schedule import Schedule, karras

TINY = ["--width", "16", "--depth", "1", "--threads", "1"]


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
    fewstep("schedule", "--model", root / "model", *data, "--out", root / "schedule", "--draws", 16, "--probes", 20)
    tuning = ("--iterations", 20, "--warmup", 5, "--batch-size", 32, "--schedule", root / "schedule")
    fewstep("finetune", "--model", root / "model", *data, "--out", root / "sampler", "--steps", 2, *tuning)
    return root


def test_the_way_from_data_to_samples(trained, tmp_path, monkeypatch):
    assert Schedule.load(trained / "schedule" / "schedule.json").provenance["evaluations"] == 2 * 19 * 16
    monkeypatch.chdir(trained)  # relative names are kept relative to the run folder
    fewstep("sample", "--model", "model", "--schedule", "schedule", "--steps", 5, "--count", 30, "--out", tmp_path / "a")
    fewstep("sample", "--model", "sampler", "--count", 30, "--out", tmp_path / "b")
    for name in ("a", "b"):
        x = np.load(tmp_path / name / "samples.npz")["x"]
        assert x.shape == (30, 2)
        assert np.isfinite(x).all()
        assert (tmp_path / name / "samples.png").stat().st_size > 1000


def test_equal_seeds_give_equal_samples_and_other_seeds_others(trained, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("--count", 20, "--solver", "ancestral", "--seed", seed, "--out", tmp_path / out)
        fewstep("sample", "--model", trained / "model", *arguments)
    a, b, c = (np.load(tmp_path / n / "samples.npz")["x"] for n in "abc")
    assert (a == b).all()
    assert not (a == c).any()


def test_a_moved_folder_still_loads(trained, tmp_path):
    import shutil

    from fewstep.models import load_sampler

    shutil.copytree(trained, tmp_path / "moved")
    x = torch.randn(4, 2)
    values = [load_sampler(root / "sampler")[1].energy(x) for root in (trained, tmp_path / "moved")]
    assert torch.equal(*values)


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


def test_show_makes_a_page_for_every_kind_of_folder(trained, capsys):
    for name in ("model", "schedule", "sampler"):
        fewstep("show", trained / name)
        page = (trained / name / "report.html").read_text()
        assert "data:image/png;base64," in page
        assert "report.html" in capsys.readouterr().out


def test_a_model_by_file_and_function(trained, tmp_path):
    (tmp_path / "mine.py").write_text("from fewstep.mixture import ring\n\ndef exact():\n    return ring()\n")
    out = tmp_path / "s"
    fewstep("sample", "--model", f"{tmp_path}/mine.py:exact", "--steps", 20, "--count", 50, "--out", out)
    x = torch.from_numpy(np.load(out / "samples.npz")["x"])
    assert ring().energy(x).mean() < 4  # about 2.9 on data, over 20 on noise


def bad_inputs(root, tmp):
    """name -> (arguments, words of the message)."""
    nan = ring().sample(50, torch.Generator()).numpy()
    nan[7] = np.nan
    np.save(tmp / "nan.npy", nan)
    np.save(tmp / "few.npy", nan[:5])
    np.save(tmp / "wide.npy", np.random.default_rng(0).normal(size=(50, 3)))
    np.save(tmp / "large.npy", 1000 * np.random.default_rng(0).normal(size=(50, 2)))
    (tmp / "text.npy").write_text("hello")
    (tmp / "mine.py").write_text("def five():\n    return 5\n")
    karras().save(tmp / "k.json")
    document = json.loads((tmp / "k.json").read_text())
    document["theta"][3] = document["theta"][2]
    (tmp / "flat.json").write_text(json.dumps(document))
    (tmp / "cut.json").write_text((tmp / "k.json").read_text()[:300])
    (tmp / "other").mkdir()
    (tmp / "other" / "config.json").write_text("{}")
    model, points, out = root / "model", root / "points.npy", tmp / "out"
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
        "data of another scale": ((*train, tmp / "large.npy"), "standard deviation"),
        "a folder of another configuration": (
            ("train", "--data", points, "--out", model, "--iterations", 7, *TINY),
            "iterations was 200, now 7",
        ),
        "a folder of another command": (("sample", "--model", model, "--out", model), "belongs to `fewstep train`"),
        "a folder that is no run": (("train", "--data", points, "--out", tmp), "not a run folder"),
        "no such model": (("sample", "--model", "nothing", "--out", out), "no model 'nothing'"),
        "a model folder that is none": (("sample", "--model", tmp / "other", "--out", out), ""),
        "a function that returns no model": (("sample", "--model", f"{tmp}/mine.py:five", "--out", out), "not a fewstep"),
        "a function that is not there": (("sample", "--model", f"{tmp}/mine.py:six", "--out", out), "no function 'six'"),
        "an unknown solver": ((*sample, "--solver", "rk45"), "rk45"),
        "no such schedule": ((*sample, "--schedule", "karas"), "no schedule 'karas'"),
        "a schedule that is not monotone": ((*sample, "--schedule", tmp / "flat.json"), "strictly decrease"),
        "a truncated schedule": ((*sample, "--schedule", tmp / "cut.json"), "not JSON"),
        "a sampler at other steps": (("sample", "--model", root / "sampler", "--steps", 5, "--out", out), "for 2 steps"),
        "data of another shape": (("schedule", "--model", model, "--data", tmp / "wide.npy", "--out", out), "shape"),
        "fewer data than a batch": ((*finetune, "--batch-size", 10**6), "too few"),
        "nothing to evaluate": (("evaluate", "--data", points, "--out", out), "nothing to evaluate"),
        "no such device": ((*train, points, "--device", "tpu9"), "tpu9"),
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
    code += "try: app()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "200"}, check=False)
    seconds = time.perf_counter() - started
    assert done.stderr.strip().endswith("False")
    assert "Weight of the energy's square" in done.stdout
    assert seconds < 15, seconds  # under a second on a quiet machine; torch alone takes longer than that
