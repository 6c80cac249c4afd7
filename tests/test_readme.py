"""What the README shows runs, and its tables are what the committed JSON says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    solving, tuning = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    torch.manual_seed(0)
    exec(solving, names)
    assert (tmp_path / "schedule.json").exists()
    assert names["evaluations"] == 5
    assert names["samples"][:, 0].abs().mean() == pytest.approx(2.0, abs=0.2)  # the two modes
    exec(tuning, names)
    assert names["samples"].shape == (100, 2)
    assert names["samples"][:, 0].abs().mean() == pytest.approx(2.0, abs=0.5)
    assert names["energies"].shape == (100,)


@pytest.mark.parametrize("line", re.findall(r"^fewstep .*$", README, re.M))
def test_every_command_line_parses(line):
    tokens = shlex.split(line, comments=True)[1:]
    command, bound, _ = cli.app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert command.__name__ == tokens[0]
    assert bound.arguments


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links), [link for link in links if not (ROOT / link).exists()]


def test_the_tables_are_those_of_the_committed_json():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cells_of_the_schedules_json_are_rows_again_from_which_the_same_summary_follows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import schedules_summary

    document = json.loads((ROOT / "benchmarks" / "schedules.json").read_text())
    again = json.loads(json.dumps(schedules_summary.document([], document)))
    for name in ("summary", "lost", "cost_of_peers", "cells"):
        assert again[name] == document[name]
