"""The demo, small: its parts fit together, it goes on after a kill, and what it says are its own numbers."""

import json

import pytest
import torch

from fewstep import cli, demo


def test_the_quick_demo_says_its_own_numbers_and_is_not_done_twice(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "pictures", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")])
    monkeypatch.undo()
    logs = [tmp_path / "demo" / part / "metrics.jsonl" for part in ("model", "sampler")]
    before = [log.read_text() for log in logs]
    capsys.readouterr()
    cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")])
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert before == [log.read_text() for log in logs]
    facts = json.loads((tmp_path / "demo" / "results.json").read_text())
    at = {row["method"]: row["fd"] for row in facts["rows"] if row["steps"] == demo.STEPS}
    assert set(at) == {"karras, dpmpp_2m", "log-linear, dpmpp_2m", "learned, dpmpp_2m", "fine-tuned"}
    assert f"levels {at['karras, dpmpp_2m']:.2f}, log-linear {at['log-linear, dpmpp_2m']:.2f}" in said
    assert f"learned {at['learned, dpmpp_2m']:.2f}; fine-tuned {at['fine-tuned']:.2f}" in said
    assert f"AUROC {facts['auroc']['uniform noise']:.3f}" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    for words in ("Samples from the same noise", "Does the schedule help?", "of the best free schedule", "The energy"):
        assert words in page
    assert page.count("<img") == 5
