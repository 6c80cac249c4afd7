"""A reward from choices: Bradley-Terry with a known utility, the file of choices, the page that asks, the command."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import binary_cross_entropy_with_logits

from fewstep import cli, prefer
from fewstep.config import PreferenceConfig
from fewstep.models import load_preference
from fewstep.preference import Preference, learn_preference

QUICK = PreferenceConfig(lr=5e-3, iterations=150)


def simulate(utility, count, generator):
    """`count` pairs of rows, chosen as Bradley and Terry say from the utilities (n,)."""
    pairs = torch.randint(len(utility), (count, 2), generator=generator)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    likely = torch.sigmoid(utility[pairs[:, 0]] - utility[pairs[:, 1]])
    return pairs, (torch.rand(len(pairs), generator=generator) < likely).float()


def test_a_known_linear_utility_is_found_and_its_log_loss_is_nearly_the_best_there_is(generator):
    x = torch.randn(1500, 4, generator=generator)
    utility = x @ torch.tensor([1.5, -1.0, 0.5, 0.0])
    pairs, chosen = simulate(utility, 800, generator)
    preference, known = learn_preference(x, pairs, chosen, QUICK)
    fresh = torch.randn(500, 4, generator=generator)
    assert spearmanr(preference(fresh), fresh @ torch.tensor([1.5, -1.0, 0.5, 0.0])).statistic > 0.97
    margin = utility[pairs[:, 0]] - utility[pairs[:, 1]]
    best = float(binary_cross_entropy_with_logits(margin, chosen))  # what the truth scores on these choices
    assert best - 0.01 < known["log_loss"] < best + 0.03
    assert known["accuracy"] == pytest.approx(float(((margin > 0) == (chosen > 0.5)).float().mean()), abs=0.03)
    assert known["strength"] == pytest.approx(float(utility.std()), rel=0.25)


def test_the_reward_is_standardised_and_differentiable(generator):
    x = 5 + 3 * torch.randn(400, 3, generator=generator)
    pairs, chosen = simulate(x[:, 0], 300, generator)
    preference, known = learn_preference(x, pairs, chosen)
    r = preference(x)
    assert float(r.mean()) == pytest.approx(0, abs=1e-4)
    assert float(r.std()) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(preference.utility(x).std(), torch.tensor(known["strength"]), rtol=1e-4)
    x.requires_grad_()
    gradient = torch.autograd.grad(preference(x).sum(), x)[0].mean(0)
    assert gradient[0] > 3 * gradient[1:].abs().max()


def test_ties_pull_rewards_together(generator):
    """More is better below 0; above 0 somebody says "tie", or else nothing is asked there."""
    x = torch.rand(600, 1, generator=generator) * 2 - 1
    pairs = torch.randint(600, (500, 2), generator=generator)
    left, right = x[pairs].squeeze(2).clamp(max=0).unbind(1)
    share = 0.5 + 0.5 * torch.sign(left - right)
    above = (x[pairs] > 0).all(1).squeeze(1)
    assert (share[above] == 0.5).all()
    probes = torch.tensor([[-0.8], [-0.1], [0.1], [0.8]])
    with_ties, known = learn_preference(x, pairs, share, QUICK)
    without, _ = learn_preference(x, pairs[~above], share[~above], QUICK)
    steps = [p.utility(probes).diff().abs() for p in (with_ties, without)]
    assert known["ties"] == int((share == 0.5).sum()) > 100
    assert steps[0][2] < 0.15 * steps[0][0]
    assert steps[0][2] < 0.5 * steps[1][2]


def test_choices_by_a_coin_are_known_to_be_worth_nothing(generator):
    x = torch.randn(500, 8, generator=generator)
    pairs, chosen = simulate(torch.zeros(500), 300, generator)
    _, known = learn_preference(x, pairs, chosen)
    assert known["accuracy"] == pytest.approx(0.5, abs=0.12)
    assert known["log_loss"] > 0.97 * math.log(2)


def test_images_too_large_for_the_mlp_are_learned_by_convolutions(generator):
    x = torch.rand(150, 3, 18, 18, generator=generator) * 2 - 1
    x += torch.linspace(-1, 1, 150)[:, None, None, None]
    pairs, chosen = simulate(10 * x.mean((1, 2, 3)), 150, generator)
    preference, _ = learn_preference(x, pairs, chosen, PreferenceConfig(width=16, iterations=60, lr=5e-3))
    assert spearmanr(preference(x), x.mean((1, 2, 3))).statistic > 0.9
    with pytest.raises(ValueError, match=r"learned on samples of shape \(3, 18, 18\)"):
        preference(x[:, :1])
    with pytest.raises(ValueError, match="is for images"):
        Preference((300,))


def test_equal_seeds_give_equal_rewards_and_leave_the_global_one_alone(generator):
    x = torch.randn(100, 2, generator=generator)
    pairs, chosen = simulate(x[:, 0], 60, generator)
    before = torch.random.get_rng_state()
    a, b, c = (learn_preference(x, pairs, chosen, PreferenceConfig(seed=s, iterations=30))[0](x) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("pairs", "chosen", "message"),
    [
        ([[0, 1]] * 19, [1.0, 0.0] * 9 + [1.0], "too few pairs: 19"),
        ([[0, 1]] * 20, [1.0] * 20, "one-sided: all 20 choices are 'a'"),
        ([[0, 1]] * 20, [0.5] * 20, "one-sided: all 20 choices are 'tie'"),
        ([[0, 9]] * 20, [1.0, 0.0] * 10, "rows 0 to 4, got 0 to 9"),
        ([[0, 1]] * 20, [1.0, 0.3] * 10, "choices are 1"),
        ([[0, 1]] * 20, [1.0], "give pairs"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(pairs, chosen, message):
    with pytest.raises(ValueError, match=message):
        learn_preference(torch.randn(5, 2), torch.tensor(pairs), torch.tensor(chosen))


def test_both_files_of_choices_are_read_alike(tmp_path):
    rows = [{"a": 0, "b": 2, "prefer": "a"}, {"a": 1, "b": 0, "prefer": "b"}, {"a": 2, "b": 1, "prefer": "tie"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "c.csv").write_text("\ufeffwho,prefer,a,b\nme,a,0,2\nme, b ,1,0\nme,tie,2,1\n", encoding="utf-8")
    for name in ("c.jsonl", "c.csv"):
        pairs, chosen = prefer.read_choices(tmp_path / name, 3)
        assert pairs.tolist() == [[0, 2], [1, 0], [2, 1]]
        assert chosen.tolist() == [1.0, 0.0, 0.5]


GOOD = '{"a": 0, "b": 1, "prefer": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", GOOD + '{"a": 0, "b": 7, "prefer": "a"}', r"line 2: there are 3 samples, rows 0 to 2, got 0 and 7"),
        ("c.jsonl", GOOD + '{"a": -1, "b": 1, "prefer": "a"}', r"line 2: there are 3 samples"),
        ("c.jsonl", GOOD + "\n" + '{"a": 0, "b": 1, "prefer": "left"}', r"line 3: prefer is one of a, tie, b, got 'left'"),
        ("c.jsonl", GOOD + '{"a": 0, "b": 1, "prefer": ["a"]}', r"line 2: prefer is one of"),
        ("c.jsonl", GOOD + '{"a": 0, "b": 1}', r"line 2: a choice has a, b and prefer"),
        ("c.jsonl", GOOD + "[1]", r"line 2: a choice has a, b and prefer"),
        ("c.jsonl", GOOD + '{"a": 0, "b": 1, "pre', r"line 2: not JSON"),
        ("c.jsonl", GOOD + '{"a": 0.5, "b": 1, "prefer": "a"}', r"line 2: .*whole numbers, got 0.5 and 1"),
        ("c.jsonl", GOOD + '{"a": 1, "b": 1, "prefer": "a"}', r"line 2: sample 1 is held against itself"),
        ("c.jsonl", "\n", r"holds no choices"),
        ("c.csv", "a,b,prefer\n0,1,a\n0,x,b\n", r"line 3: .*whole numbers, got 0 and 'x'"),
        ("c.csv", "left,right\n0,1\n", r"line 1: the columns are a, b and prefer, got left, right"),
        ("c.csv", "a,b,prefer\n0,1\n", r"line 2: prefer is one of"),
        ("c.txt", GOOD, r"a .jsonl or a .csv"),
    ],
)
def test_what_is_no_choice_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prefer.read_choices(tmp_path / name, 3)


def test_pairs_are_different_even_and_begin_alike():
    pairs = prefer.draw_pairs(40, 100, seed=0)
    assert pairs == prefer.draw_pairs(40, 150, seed=0)[:100]
    assert pairs != prefer.draw_pairs(40, 100, seed=1)
    assert len({frozenset(pair) for pair in pairs}) == 100
    shown = np.bincount(np.array(pairs).flatten(), minlength=40)
    assert 3 <= shown.min() <= shown.max() <= 7
    with pytest.raises(ValueError, match="too many pairs: 100 of 20 samples; at most 95"):
        prefer.draw_pairs(20, 100, seed=0)


class Reader(html.parser.HTMLParser):
    """Tags that are closed in the wrong order, addresses that are asked for, ids, and the script."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.ids, self.script = [], [], set(), ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.ids |= {value for name, value in attributes if name == "id"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.script += data * (self.open[-1:] == ["script"])


def test_the_page_is_whole_and_holds_all_pairs_and_asks_nobody_for_anything():
    x = torch.rand(20, 3, 8, 8) * 2 - 1
    pairs = prefer.draw_pairs(20, 15, seed=0)
    text = prefer.page(x, pairs, "key</script>")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert reader.addresses == []
    assert not re.search(r"https?://|url\(|@import|fetch\(", text)
    found, images = (
        json.loads(re.search(pattern, reader.script)[1]) for pattern in (r"pairs = (.*?), images", r"images = (.*?), key")
    )
    assert [tuple(pair) for pair in found] == pairs
    assert set(images) == {str(row) for pair in pairs for row in pair}
    assert all(image.startswith("data:image/png;base64,") for image in images.values())
    assert set(re.findall(r'at\("([^"+]+)"\)', reader.script)) <= reader.ids


def test_a_png_holds_the_pixels():
    import base64
    import io

    from PIL import Image

    levels = torch.tensor([0, 1, 127, 255.0])
    for image in ((levels / 127.5 - 1).reshape(1, 2, 2), (levels / 127.5 - 1).reshape(1, 2, 2).repeat(3, 1, 1)):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(prefer.as_png(image).partition(",")[2]))))
        assert pixels.reshape(4, -1)[:, 0].tolist() == levels.tolist()


BROWSER = """
const store = %s, elements = {}, saved = [];
const element = () => ({style: {}, classList: {toggle() {}}, click() {}, remove() {}});
globalThis.document = {getElementById: name => elements[name] ??= element(), createElement: element,
  body: {append() {}}, addEventListener: (_, act) => globalThis.press = key => act({key, preventDefault() {}})};
globalThis.localStorage = {getItem: k => store[k] ?? null, setItem: (k, v) => { store[k] = v; }};
globalThis.URL = {createObjectURL: blob => saved.push(...blob), revokeObjectURL() {}};
globalThis.Blob = function (rows) { return rows; };
globalThis.setTimeout = () => {};
%s
for (const key of %s) press(key);
elements.save.onclick();
console.log(JSON.stringify({store, saved: saved.join(""), count: elements.count.textContent}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_choices_on_the_page_survive_a_reload_and_are_what_the_command_reads(tmp_path):
    pairs = prefer.draw_pairs(20, 15, seed=0)
    reader = Reader()
    reader.feed(prefer.page(torch.zeros(20, 1, 8, 8), pairs, "key"))

    def visit(store, presses):
        text = BROWSER % (json.dumps(store), reader.script, json.dumps(presses))
        done = subprocess.run(["node", "-"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    once = visit({}, ["a", "B", "t", "x", "ArrowLeft", "b"])  # the third is thought over
    assert once["count"] == "3 of 15"
    twice = visit(once["store"], ["a"] * 20)
    assert twice["count"].startswith("15 of 15: all done")
    (tmp_path / "choices.jsonl").write_text(twice["saved"])
    found, chosen = prefer.read_choices(tmp_path / "choices.jsonl", 20)
    assert [tuple(pair) for pair in found.tolist()] == pairs
    assert chosen.tolist() == [1.0, 0.0, 0.0] + [1.0] * 12


def fewstep(*arguments):
    code = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    return code


@pytest.fixture
def samples(tmp_path, generator):
    """60 images of one number each, and 80 choices of the brighter one."""
    x = (torch.rand(60, 1, 1, 1, generator=generator) * 2 - 1).expand(60, 1, 8, 8).numpy()
    np.savez(tmp_path / "samples.npz", x=x)
    rows = [{"a": a, "b": b, "prefer": "a" if x[a].mean() > x[b].mean() else "b"} for a, b in prefer.draw_pairs(60, 80, seed=3)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return x


def test_the_command_asks_learns_and_is_repeated_without_harm(samples, tmp_path, capsys):
    common = ("prefer", "--samples", tmp_path, "--out", tmp_path / "prefs", "--iterations", 100)
    assert fewstep(*common, "--pairs", 30) == 0
    assert "asks for 30 choices" in capsys.readouterr().out
    with pytest.raises(ValueError, match="wait for choices"):
        load_preference(tmp_path / "prefs")
    learning = (*common, "--choices", tmp_path / "choices.jsonl")
    assert fewstep(*learning) == 0
    said = capsys.readouterr().out
    assert "80 choices, 0 of them ties. Held-out pairs: accuracy 9" in said or "accuracy 100" in said
    weights = tmp_path / "prefs" / "preference.safetensors"
    made = weights.stat().st_mtime_ns
    assert fewstep(*learning) == 0
    assert capsys.readouterr().out == said
    assert weights.stat().st_mtime_ns == made
    assert (tmp_path / "prefs" / "choices.jsonl").read_text() == (tmp_path / "choices.jsonl").read_text()
    assert (tmp_path / "prefs" / "preference.png").stat().st_size > 1000
    reward = load_preference(tmp_path / "prefs")(torch.from_numpy(samples))
    assert spearmanr(reward, samples.mean((1, 2, 3))).statistic > 0.95
    assert float(reward.std()) == pytest.approx(1, abs=1e-3)


def test_mistakes_are_one_line(samples, tmp_path, capsys):
    def message(*arguments):
        assert fewstep("prefer", *arguments) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    common, choices = ("--samples", tmp_path, "--out", tmp_path / "out"), tmp_path / "choices.jsonl"
    assert "give a folder of `fewstep sample`" in message("--samples", tmp_path / "no", "--out", tmp_path / "out")
    assert "no choices" in message(*common, "--choices", tmp_path / "no.jsonl")
    assert "too many pairs: 1000 of 60 samples" in message(*common, "--pairs", 1000)
    assert "--pairs is for the page" in message(*common, "--pairs", 10, "--choices", choices)
    assert "--pairs" in message(*common, "--pairs", 0)
    for name, x, what in [
        ("points", np.zeros((9, 2)), "the page shows images"),
        ("words", np.full((9, 4), "a"), "samples must be numbers, got <U1"),
        ("nan", np.full((9, 1, 8, 8), np.nan), "NaN"),
        ("one", np.zeros((1, 1, 8, 8)), "too many pairs: 100 of 1 samples"),
    ]:
        np.save(tmp_path / f"{name}.npy", x)
        assert what in message("--samples", tmp_path / f"{name}.npy", "--out", tmp_path / "out")
    np.savez(tmp_path / "other.npz", z=np.zeros(3))
    assert "holds z; the samples must be under x" in message("--samples", tmp_path / "other.npz", "--out", tmp_path / "out")
    (tmp_path / "broken.npz").write_text("PK")
    assert "broken.npz cannot be read as an .npy or .npz array" in message(
        "--samples", tmp_path / "broken.npz", "--out", tmp_path / "out"
    )
    few = tmp_path / "few.jsonl"
    few.write_text("".join(choices.read_text().splitlines(True)[:19]))
    assert "too few pairs: 19" in message(*common, "--choices", few)
    assert not (tmp_path / "out").exists()
    assert fewstep("prefer", *common, "--choices", choices, "--iterations", 5) == 0
    capsys.readouterr()
    many = tmp_path / "many.jsonl"
    many.write_text("".join(choices.read_text().splitlines(True)[:70]))
    assert "learned from 80 other choices" in message(*common, "--choices", many, "--iterations", 5)
    assert "iterations was 5, now 500" in message(*common, "--choices", choices)
