"""From somebody's choices to a reward, in files: a page that asks, rows that say what was chosen, a folder with the reward.

Choices are rows of .jsonl, {"a": i, "b": j, "prefer": "a"}, or of .csv with these three columns; i and j are rows of the
samples, counted from 0, and prefer is "a", "b" or "tie".
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from jinja2 import Template
from PIL import Image
from torch import Tensor

from fewstep import models, report
from fewstep.commands import Track, silent
from fewstep.config import PreferenceConfig
from fewstep.data import load_samples
from fewstep.preference import CHOICES, learn_preference
from fewstep.run import fingerprint, open_run, require_free, write_json, write_lines

PAGE, ROWS, KNOWN = "pairs.html", "choices.jsonl", "preference.json"


def ask(samples: str, out: File, count: int, config: PreferenceConfig) -> tuple[File, int]:
    """The page out/pairs.html, which asks for `count` choices between samples; returns it and the number of its pairs."""
    x = load_samples(samples)
    if not report.is_images(x):
        raise ValueError(
            f"the page shows images (c, h, w) of 1 or 3 channels, these samples have shape {tuple(x.shape[1:])}; choose in "
            "your own way, and give --choices"
        )
    pairs = draw_pairs(len(x), count, config.seed)
    settings = _settings(samples, x, out, config)
    folder = open_run(out, "prefer", settings)
    text = page(x, pairs, f"{settings['samples_fingerprint']}-{config.seed}")
    (folder / PAGE).write_text(text, encoding="utf-8")  # of other length, it goes on with the same pairs and choices
    return folder / PAGE, len(pairs)


def learn(
    samples: str, choices: File, out: File, config: PreferenceConfig, device: str = "cpu", track: Track = silent
) -> tuple[File, dict[str, Any]]:
    """The reward into the folder `out`, and what is known of it (preference.json). A finished one is left as it is."""
    x = load_samples(samples)
    pairs, chosen = read_choices(choices, len(x))
    settings = _settings(samples, x, out, config)
    folder = require_free(out, "prefer", settings)
    mark = fingerprint([pairs, chosen])
    if (folder / models.PREFERENCE).exists():
        known = read_known(folder)
        if known["choices_fingerprint"] != mark:
            raise ValueError(f"{folder} holds a preference learned from {known['pairs']} other choices; give another --out")
        return folder, known
    preference, found = learn_preference(x.to(device), pairs.to(device), chosen.to(device), config, track)
    folder = open_run(folder, "prefer", settings)
    known = {"choices_fingerprint": mark} | found
    name = {share: choice for choice, share in CHOICES.items()}
    rows = zip(pairs.tolist(), chosen.tolist(), strict=True)
    write_lines(folder / ROWS, [{"a": a, "b": b, "prefer": name[share]} for (a, b), share in rows])
    write_json(folder / KNOWN, known)
    with torch.no_grad():
        order = torch.cat([preference(part) for part in x.to(device).split(1000)]).cpu().argsort()
    sets = {"liked least": x[order[:40]], "liked most": x[order.flip(0)[:40]]}
    report.samples_figure(folder / "preference.png", sets)
    models.save_weights(preference.state_dict(), folder / models.PREFERENCE)
    return folder, known


def read_known(folder: File) -> dict[str, Any]:
    """What is known of a folder's preference: counts, accuracy, log-loss, strength."""
    return json.loads((folder / KNOWN).read_text())


def sentences(known: dict[str, Any]) -> list[str]:
    """What is known of a preference, for people."""
    decided = known["pairs"] - known["ties"]
    error = math.sqrt(known["accuracy"] * (1 - known["accuracy"]) / decided)
    lines = [
        f"{known['pairs']} choices, {known['ties']} of them ties. Held-out pairs: accuracy {known['accuracy']:.1%} ± "
        f"{error:.1%}, log-loss {known['log_loss']:.3f} nats (a coin: {math.log(2):.3f}).",
        f"One standard deviation of the reward among the samples is worth {known['strength']:.2f} nats of log-odds.",
    ]
    if known["log_loss"] >= math.log(2):
        lines.append("That is no better than a coin: the reward is not worth following. Make more choices, or look at them.")
    return lines


def read_choices(file: File, count: int) -> tuple[Tensor, Tensor]:
    """Pairs (m, 2) of rows below `count` and the share of each that goes to its first (m,): 1, 0, or 0.5 for a tie.

    Raises ValueError, naming the line, for whatever is not a choice.
    """
    if not file.is_file():
        raise ValueError(f"no choices {str(file)!r}: give the .jsonl that the page saved, or .jsonl or .csv rows a, b, prefer")
    if file.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{file}: choices are a .jsonl or a .csv file")
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before csv
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file: {error}") from error
    pairs, chosen = [], []
    for line, row in _csv_rows(file, text) if file.suffix == ".csv" else _jsonl_rows(file, text):
        where = f"{file}, line {line}"
        if not isinstance(row, dict) or not {"a", "b", "prefer"} <= set(row):
            raise ValueError(f"{where}: a choice has a, b and prefer, got {row}")
        pair = [row["a"], row["b"]]
        if any(type(i) is not int for i in pair):
            raise ValueError(f"{where}: a and b are rows of the samples, whole numbers, got {pair[0]!r} and {pair[1]!r}")
        if not all(0 <= i < count for i in pair):
            raise ValueError(f"{where}: there are {count} samples, rows 0 to {count - 1}, got {pair[0]} and {pair[1]}")
        if pair[0] == pair[1]:
            raise ValueError(f"{where}: sample {pair[0]} is held against itself")
        if row["prefer"] not in tuple(CHOICES):  # a tuple: what stands there may not be hashable
            raise ValueError(f"{where}: prefer is one of {', '.join(CHOICES)}, got {row['prefer']!r}")
        pairs.append(pair)
        chosen.append(CHOICES[row["prefer"]])
    if not pairs:
        raise ValueError(f"{file} holds no choices")
    return torch.tensor(pairs), torch.tensor(chosen)


def _jsonl_rows(file: File, text: str):
    for line, content in enumerate(text.splitlines(), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {line}: not JSON ({error.msg}): {content[:60]!r}") from error


def _csv_rows(file: File, text: str):
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    if not {"a", "b", "prefer"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{file}, line 1: the columns are a, b and prefer, got {', '.join(reader.fieldnames or ()) or 'none'}")
    for row in reader:
        a, b, choice = ((row[k] or "").strip() for k in ("a", "b", "prefer"))
        numbers = {k: int(v) if v.isdecimal() else v for k, v in (("a", a), ("b", b))}
        yield reader.line_num, numbers | {"prefer": choice}


def draw_pairs(samples: int, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different pairs of rows, every row about equally often; more of them begin with the same ones."""
    if samples < 2 or count > samples * (samples - 1) // 4:
        most = samples * (samples - 1) // 4
        raise ValueError(f"too many pairs: {count} of {samples} samples; at most {most}, half of all that there are")
    rng = np.random.default_rng(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        order = rng.permutation(samples).tolist()
        for a, b in zip(order[::2], order[1::2], strict=False):
            if (b, a) not in pairs:
                pairs[a, b] = None
    return list(pairs)[:count]


def as_png(image: Tensor) -> str:
    """An image (c, h, w) in [-1, 1] as a PNG data URI, pixel by pixel."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy().transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def page(x: Tensor, pairs: list[tuple[int, int]], key: str) -> str:
    """The page that asks for choices between pairs of images x (n, c, h, w); `key` tells its choices from other pages'."""
    images = {str(row): as_png(x[row]) for row in sorted({row for pair in pairs for row in pair})}
    return ASK.render(pairs=pairs, images=images, key=f"fewstep-{key}")


def _settings(samples: str, x: Tensor, out: File, config: PreferenceConfig) -> dict[str, Any]:
    name, local = models.relative_to(samples, out)
    about = {"samples": name, "samples_is_local": local, "samples_fingerprint": fingerprint([x]), "shape": list(x.shape[1:])}
    return about | dataclasses.asdict(config)


ASK = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Which is better?</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:1.5rem auto;padding:0 1rem;color:#222;text-align:center}
.pair{display:flex;gap:1.5rem;justify-content:center}.pair button{flex:1;max-width:22rem;padding:.6rem}
img{width:100%;image-rendering:pixelated;display:block}
button{font:inherit;padding:.5rem 1rem;border:2px solid #ccc;border-radius:.4rem;background:#fff;color:inherit;cursor:pointer}
button:hover,button:focus-visible{border-color:#222}button:disabled{opacity:.4;cursor:default}
button.chosen{border-color:#3a3;background:#eefaee}
progress{width:100%}kbd{border:1px solid #aaa;border-radius:.2rem;padding:0 .3rem}p{margin:.8rem 0}
</style></head><body>
<h1>Which is better?</h1>
<div class="pair">
<button id="a" type="button"><img id="image-a" alt="sample a"><kbd>a</kbd></button>
<button id="b" type="button"><img id="image-b" alt="sample b"><kbd>b</kbd></button>
</div>
<p><button id="tie" type="button"><kbd>t</kbd> neither</button></p>
<p><progress id="progress" max="1" value="0"></progress><br><span id="count" role="status"></span></p>
<p><button id="back" type="button"><kbd>&larr;</kbd> back</button>
<button id="on" type="button"><kbd>&rarr;</kbd> on</button>
<button id="save" type="button">download choices.jsonl</button></p>
<p id="note"></p>
<noscript>This page needs JavaScript; it loads nothing and sends nothing.</noscript>
<script>
"use strict";
const pairs = {{ pairs|tojson }}, images = {{ images|tojson }}, key = {{ key|tojson }};
const at = name => document.getElementById(name);
let chosen = [], now = 0;
try { chosen = JSON.parse(localStorage.getItem(key)) || []; }
catch { at("note").textContent = "This browser keeps nothing between visits: download before you leave."; }
const first = () => { let k = 0; while (k < pairs.length && chosen[k]) k++; return k; };
function draw() {
  const done = pairs.filter((_, k) => chosen[k]).length, open = now < pairs.length;
  for (const [k, side] of ["a", "b"].entries()) {
    at("image-" + side).style.visibility = open ? "visible" : "hidden";
    if (open) at("image-" + side).src = images[pairs[now][k]];
  }
  for (const name of ["a", "b", "tie"]) {
    at(name).disabled = !open;
    at(name).classList.toggle("chosen", open && chosen[now] === name);
  }
  at("back").disabled = now === 0;
  at("on").disabled = !open || !chosen[now];
  at("save").disabled = done === 0;
  at("progress").value = done / pairs.length;
  at("count").textContent = done + " of " + pairs.length + (open ? "" : ": all done, now download the choices");
}
function choose(what) {
  if (now >= pairs.length) return;
  chosen[now] = what;
  try { localStorage.setItem(key, JSON.stringify(chosen)); } catch { /* said above */ }
  now++;
  draw();
}
function move(by) { now = Math.max(0, Math.min(pairs.length, now + by)); draw(); }
function save() {
  const rows = pairs.map(([a, b], k) => chosen[k] && JSON.stringify({a: a, b: b, prefer: chosen[k]}) + "\\n").filter(Boolean);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(rows, {type: "application/x-ndjson"}));
  link.download = "choices.jsonl";
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
for (const name of ["a", "b", "tie"]) at(name).onclick = () => choose(name);
at("back").onclick = () => move(-1);
at("on").onclick = () => move(1);
at("save").onclick = save;
const keys = {a: () => choose("a"), b: () => choose("b"), t: () => choose("tie"),
  ArrowLeft: () => move(-1), ArrowRight: () => chosen[now] && move(1)};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});
now = first();
draw();
</script></body></html>
""",
    autoescape=True,
)
