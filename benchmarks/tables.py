"""Fill the tables of README.md and docs/results.md from the JSON of the benchmarks.

python benchmarks/tables.py            rewrites them; --check only says whether they are up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean, mean, stdev

HERE = Path(__file__).parent
MOVED = "ancestral from the data's Gaussian, own levels"
NARROW = ("mnist_slim", "fashion")  # models on which the fitted peers have reduced budgets
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "results.md")
QUALITY = ("precision", "recall", "coverage")
STEPS_OF_USES = "4 to 20 steps (10 on digits; 3 to 8 from images)"


def spread(values: list[float], digits: int = 2) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def gaussians8(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "gaussians8.json").read_text())
    named: dict[str, list[dict]] = {}
    for cell in result["rows"]:
        named.setdefault(cell["row"], []).append(cell)
    rows = [
        f"**8 Gaussians, 5 evaluations** (`python benchmarks/gaussians8.py`, {result['date']}, last iterate, "
        f"{result['samples']:,} samples, mean ± standard deviation over seeds)",
        "",
        "| | seeds | sliced Wasserstein | AUROC of the energy, data against uniform | correlation of -E with log p | "
        "spread within a mode | mass of a mode, largest error in % | CPU seconds | ms per iteration |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in named.items():

        def column(key: str, digits: int, unit: float = 1.0, cells: list[dict] = cells) -> str:
            found = [cell[key] / unit for cell in cells if key in cell]
            return spread(found, digits) if found else ""

        shown = [column("sw", 3), column("auroc", 3), column("correlation", 3), column("std_within", 3)]
        shown += [column("mass_error", 1, 0.01), column("cpu_seconds", 0), column("ms_per_iteration", 1)]
        rows.append(f"| {name} | {len(cells)} | {' | '.join(shown)} |")
    ideal = result["ideal"]
    rows.append(
        f"| real data; exact energy | | {ideal['sw']:.3f} | {ideal['auroc']:.3f} | 1 | {ideal['std_within']:.3f} | "
        f"{100 * ideal['mass_error']:.1f} | | |"
    )
    return "\n".join(rows)


def toys(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "toys.json").read_text())
    seeds = len(next(iter(result["sets"].values())))
    rows = [
        f"**Other sets, the same settings** (`python benchmarks/toys.py`, {result['date']}, sliced Wasserstein, "
        f"{result['samples']:,} samples, 5 evaluations, mean ± standard deviation, {seeds} seeds; ![](pictures/toys.png))",
        "",
        "| | start | fine-tuned | data against data | AUROC of the energy, data against uniform | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, cells in result["sets"].items():
        shown = [spread([cell[key] for cell in cells], 3) for key in ("sw_start", "sw", "sw_floor", "auroc")]
        rows.append(f"| {name} | {' | '.join(shown)} | {spread([cell['cpu_seconds'] for cell in cells], 0)} |")
    return "\n".join(rows)


def demo() -> str:
    result = json.loads((HERE / "demo_seeds.json").read_text())
    seeds, floor = result["seeds"], result["seeds"][0]["floor"]
    seconds = spread([s["seconds"] for s in seeds], 0)
    rows = [
        f"What the demo gives at 4 evaluations (`python benchmarks/demo_seeds.py`, {result['date']}, {len(seeds)} seeds of "
        f"3 x 2,000 samples, mean ± standard deviation; {seconds} s per run on 2 shared cores). FD-pixels is a Fréchet "
        "distance in pixels, not an FID:",
        "",
        "| method | FD-pixels | sliced Wasserstein |",
        "|---|---|---|",
    ]
    for name in seeds[0]["at_4_evaluations"]:
        cells = (spread([s["at_4_evaluations"][name][k] for s in seeds], d) for k, d in (("fd", 2), ("sw", 3)))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    noise, generated = (spread([s["auroc"][k] for s in seeds], 3) for k in ("uniform noise", "generated digits"))
    rows += [
        f"| held-out digits, only 300 | {floor['fd']:.2f} | {floor['sw']:.3f} |",
        "",
        f"The energy tells held-out digits from uniform noise with AUROC {noise}, and from the sampler's own digits with "
        f"{generated} (0.5: not at all).",
    ]
    return "\n".join(rows)


def schedules(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "schedules.json").read_text())
    names = {"ring": "8 modes, 2-D", "modes64": "10 modes, 64-D", "spectrum": "image-like spectrum, 64-D"}
    names |= {"digits": "digits 8 x 8", "mnist_slim": "MNIST DDPM 32 x 32", "fashion": "Fashion-MNIST 28 x 28"}
    names |= {"mixtures": "**mixtures**", "images": "**image models**", "all": "**all**"}
    rows = [
        "| | cells | error / best free schedule's, up to 8 steps | the same, with those read to data | "
        "best or within 2 % (but for LD3) | strictly best: fewstep, tied, others | "
        "worse than karras, log-linear or kl-optimal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in names if n in result["summary"]):
        s = result["summary"][name]
        few, best = s["few"], s["strictly_best"]
        others = sum(count for method, count in best.items() if method not in ("fewstep", "tie"))
        ratios = (f"{few[k]:.2f}" if few["cells"] else "" for k in ("of_best_standard", "of_best_free"))
        worse = {tuple(cell[k] for k in ("model", "solver", "steps", "seed")) for cell in s["worse_than_guarded"]}
        rows.append(
            f"| {names[name]} | {s['cells']} | {' | '.join(ratios)} | "
            f"{s['best_or_within_2_percent']:.0%} ({s['the_same_but_for_ld3']:.0%}) | "
            f"{best.get('fewstep', 0)}, {best.get('tie', 0)}, {others} | {len(worse)} |"
        )
    return "\n".join(rows)


def budget(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "budget.json").read_text())
    every = result["summary"]["all"]
    rows = [
        f"**More evaluations and fewer** (`python benchmarks/budget.py --digits RUN`, {result['date']}, mixtures and digits, "
        f"{every['cells']} cells, geometric means)",
        "",
        "| | ours / LD3's | ours / the best other's | ours / the best free one's | best or within 2 %, all (8 modes, 10 modes, "
        "spectrum, digits) | more than 2 % worse than the best free one | evaluations of what is changed, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in ((k, v) for k, v in every.items() if k != "cells"):
        by_model = (result["summary"][m][name]["best_or_within_2_percent"] for m in ("ring", "modes64", "spectrum", "digits"))
        shares = f"{found['best_or_within_2_percent']:.0%} ({', '.join(f'{each:.0%}' for each in by_model)})"
        ratios = " | ".join(f"{found[k]:.2f}" for k in ("of_ld3", "of_best", "of_best_free"))
        spent = f"{found['evaluations']:,.0f}" if "evaluations" in found else ""
        spent += f", verdict {found['verdict_evaluations']:,.0f}" if "verdict_evaluations" in found else ""
        rows.append(f"| {name} | {ratios} | {shares} | {found['worse_than_free_by_2_percent']:.1%} | {spent} |")
    return "\n".join(rows)


def images(result: dict | None = None) -> str:
    """Every cell at the smaller count, which all have; Frechet distances at the larger one where there is one."""
    result = result or json.loads((HERE / "images.json").read_text())
    names = {"digits": "digits 8 x 8", "mnist_slim": "MNIST DDPM 32 x 32", "fashion": "Fashion-MNIST 28 x 28"}
    parts = []
    for name in (n for n in names if n in result["models"]):
        model = result["models"][name]
        rows, held_out = model["rows"], model["held_out"]
        counts = sorted({int(n) for row in rows for n in row["at"]} | {int(n) for n in held_out})
        few = min((n for row in rows for n in row["at"]), key=int, default=min(held_out, key=int))
        more = [str(n) for n in counts if n > int(few)]
        fd = f"FD-{model['features']}"

        def cells(at: list[dict], count: str, more: list[str] = more) -> str:
            """Of one count, and the Frechet distance of the larger ones; empty where there is none."""

            def pooled(key: str, n: str) -> str:
                values = [a[n][key] for a in at if n in a]
                return spread(values, 3 if mean(values) < 10 else 1) if len(values) == len(at) else ""

            return " | ".join([*(pooled("fd", n) for n in (count, *more)), *(pooled(k, count) for k in QUALITY)])

        groups: dict[tuple[int, str], list[dict]] = {}
        for row in rows:
            free = f" ({row['kept']})" if row.get("kept", "learned") != "learned" else ""  # what the verdict kept instead
            groups.setdefault((row["evaluations"], row["method"] + free), []).append(row["at"])
        larger = "".join(f"{fd}, {int(n):,} | " for n in more)
        parts += [
            f"**{names[name]}**, {fd} ({model['data']:,} data; classifier: {model['classifier']}, "
            f"{model['accuracy']:.1%} right), precision, recall and class coverage of {int(few):,} samples "
            f"(against {min(int(few), model['data']):,} data)",
            "",
            f"| | evaluations | seeds | {fd}, {int(few):,} | {larger}precision | recall | coverage |",
            "|---" * (7 + len(more)) + "|",
        ]
        parts += [
            f"| {method} | {evaluations} | {len(at)} | {cells(at, few)} |"
            for (evaluations, method), at in sorted(groups.items())
        ]
        nearest = few if few in held_out else min(held_out, key=int)
        alone = "" if nearest == few else f", {nearest}"
        parts += [f"| held-out data{alone} | | | {cells([held_out], nearest)} |", ""]
    return "\n".join(parts).strip()


def preferences() -> str:
    result = json.loads((HERE / "preferences.json").read_text())
    rows, count = result["rows"], len({row["seed"] for row in result["rows"]})
    seeds = f"{count} seed" if count == 1 else f"{count} seeds"
    known = {
        taste: [spread([a[k] for a in result["agreements"] if a["taste"] == taste]) for k in ("rank_correlation", "accuracy")]
        for taste in dict.fromkeys(row["taste"] for row in rows)
    }
    lines = [
        f"**Tastes followed by a four-step sampler** (`python benchmarks/preferences.py`, {result['date']}, 8x8 digits, "
        f"{seeds} of {result['samples']:,} samples, mean ± standard deviation). "
        f"Learned from {result['pairs']} choices, "
        f"{result['flipped']:.0%} of them flipped: "
        + "; ".join(f"{t}, rank correlation with the truth {c}, held-out accuracy {a}" for t, (c, a) in known.items())
        + ". In brackets what the target itself has, the training digits times exp(w r):",
        "",
        "| taste | reward | w (nats per sd) | taste (sd of the data) | FD-pixels to the data | FD-pixels to the target | "
        "sliced Wasserstein to the target | entropy of the classes / ln 10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["taste"], row["reward"], row["weight"]) for row in rows):
        same = [row for row in rows if (row["taste"], row["reward"], row["weight"]) == key]
        cells = []
        for name, ideal in (("truth", True), ("fd", True), ("fd_target", False), ("sw_target", False), ("entropy", True)):
            target = f" ({mean(row[f'{name}_ideal'] for row in same):.2f})" if ideal else ""
            cells.append(spread([row[name] for row in same], 3 if name == "sw_target" else 2) + target)
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablations(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "ablations.json").read_text())
    named: dict[str, list[dict]] = {}
    for row in result["rows"]:
        named.setdefault(row["row"], []).append(row)
    columns = (
        ("fd", 2),
        ("sw", 3),
        ("precision", 2),
        ("recall", 2),
        ("auroc_noise", 3),
        ("auroc_samples", 3),
        ("cpu_seconds", 0),
    )
    lines = [
        f"**What the parts give** (`python benchmarks/ablations.py RUN`, {result['date']}, 8x8 digits, {result['samples']:,} "
        "samples, mean ± standard deviation over seeds, last iterate)",
        "",
        "| | evaluations | seeds | FD-pixels | sliced Wasserstein | precision | recall | AUROC, held-out against noise | "
        "against its samples | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in named.items():
        found = [row for row in rows if "failed" not in row]
        failed = f", diverged on {len(rows) - len(found)}" if len(found) < len(rows) else ""
        shown = [spread([row[k] for row in found], d) if found and k in found[0] else "" for k, d in columns]
        lines.append(f"| {name} | {rows[0]['steps']} | {len(rows)}{failed} | {' | '.join(shown)} |")
    return "\n".join(lines)


def anomalies(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "anomalies.json").read_text())
    rows = result["rows"]
    digits = list(dict.fromkeys(row["digit"] for row in rows))
    lines = [
        f"**A digit that was left out** (`python benchmarks/anomalies.py`, {result['date']}, 8x8 digits, AUROC of each digit "
        f"against held-out ones of the other nine, seeds of each: {len({row['seed'] for row in rows})})",
        "",
        f"| score | mean | {' | '.join(map(str, digits))} |",
        f"|---|---|{'---|' * len(digits)}",
    ]
    for name in rows[0]["auroc"]:
        found = [mean(row["auroc"][name] for row in rows if row["digit"] == digit) for digit in digits]
        lines.append(f"| {name} | {mean(found):.3f} | {' | '.join(f'{each:.2f}' for each in found)} |")
    return "\n".join(lines)


def uses(result: dict | None = None) -> str:
    result = result or json.loads((HERE / "uses.json").read_text())
    names = {"ring": "8 modes, 2-D", "modes64": "10 modes, 64-D", "spectrum": "image-like spectrum, 64-D", "digits": "digits"}
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in result["rows"]:
        use = row["solver"] if row["use"] == "stochastic" else row["use"]
        groups.setdefault((use, row["model"]), []).append(row)
    lines = [
        f"**Other uses** (`python benchmarks/uses.py`, {result['date']}, geometric means over {STEPS_OF_USES}, three seeds). "
        "Of stochastic solvers the sliced Wasserstein distance to data, else the endpoint error:",
        "",
        "| use | model | cells | fewstep / best free schedule's | fewstep / Karras' | published curve (or cut) / best free | "
        "fewstep's cells: better by 2 %, alike, worse by 2 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for (use, model), rows in groups.items():

        def over(ours: str, theirs: str | None, rows: list[dict] = rows) -> str:
            pairs = [(row["errors"].get(ours), row["errors"][theirs or row["best_free"]]) for row in rows]
            return f"{geometric_mean([a / b for a, b in pairs if a]):.2f}" if any(a for a, _ in pairs) else ""

        ratios = [row["errors"]["fewstep"] / row["errors"][row["best_free"]] for row in rows]
        counts = sum(r < 0.98 for r in ratios), sum(0.98 <= r <= 1.02 for r in ratios), sum(r > 1.02 for r in ratios)
        shown = (
            over("fewstep", None),
            over("fewstep", "karras"),
            over("cut" if "cut" in rows[0]["errors"] else "corrector", None),
            ", ".join(map(str, counts)),
        )
        lines.append(f"| {use} | {names[model]} | {len(rows)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def starts(result: dict | None = None) -> str:
    result = result or read("starts")
    named: dict[str, list[dict]] = {}
    for row in result["rows"]:
        named.setdefault(row["row"], []).append(row)
    seeds = len(next(iter(named.values())))
    lines = [
        f"**Other paths, and labels** (`python benchmarks/starts.py`, {result['date']}, 8x8 digits, 4 steps on learned levels, "
        f"{result['samples']:,} samples, mean ± standard deviation, {seeds} seeds)",
        "",
        "| | FD-pixels, ancestral | fine-tuned | precision | recall | class obeyed, ancestral | fine-tuned | "
        "label of the lowest energy right | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in named.items():

        def column(when: str, key: str, digits: int, rows: list[dict] = rows) -> str:
            found = [row[when][key] for row in rows if key in row[when]]
            return spread(found, digits) if found else ""

        shown = [column("start", "fd", 2), column("fine-tuned", "fd", 2)]
        shown += [column("fine-tuned", "precision", 2), column("fine-tuned", "recall", 2)]
        shown += [column("start", "obeyed", 3), column("fine-tuned", "obeyed", 3), column("fine-tuned", "energy_right", 3)]
        lines.append(f"| {name} | {' | '.join(shown)} | {spread([row['cpu_seconds'] for row in rows], 0)} |")
    return "\n".join(lines)


def iterations(result: dict | None = None) -> str:
    result = result or read("iterations")
    lines = [
        f"**An iteration of fine-tuning** (`python benchmarks/iterations.py --mnist`, {result['date']}, CPU milliseconds, the "
        f"median of {result['rounds']} rounds; in brackets the range of the rounds' ratios)",
        "",
        "| model | steps | batch | published | fewstep | published / fewstep |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = [f"{row['ms'][name]:.0f}" for name in ("published", "fewstep")]
        cells = (row["model"], row["steps"], row["batch_size"], *times, "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]))
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def policy_gradient(result: dict | None = None) -> str:
    result, ours = result or read("policy_gradient"), read("images")["models"]["digits"]["rows"]
    settings = result["settings"]
    lines = [
        f"**A policy gradient in the place of the value's slope** (SFT-PG, `python benchmarks/policy_gradient.py RUN`, "
        f"{result['date']}, 8x8 digits, Karras' levels, {settings['iterations']:,} iterations, mean ± standard deviation over "
        "seeds; the other rows from the table above)",
        "",
        "| | evaluations | seeds | FD-pixels | precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for steps in sorted({row["steps"] for row in result["rows"]}):
        found = {"policy gradient": [row for row in result["rows"] if row["steps"] == steps]}
        for name in ("ancestral", "fine-tuned"):
            method = f"{name}, karras levels"
            found[name] = [row["at"]["2000"] for row in ours if (row["method"], row["steps"]) == (method, steps)]
        for name in ("ancestral", "policy gradient", "fine-tuned"):
            shown = [spread([row[key] for row in found[name]], 3) for key in ("fd", "precision", "recall")]
            lines.append(f"| {name} | {steps} | {len(found[name])} | {' | '.join(shown)} |")
    return "\n".join(lines)


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def summary() -> str:
    """The README's: what each part gives, beside the best that it was held against."""
    document, uses, gaussians = read("schedules"), read("uses")["rows"], read("gaussians8")
    schedules, rows, ideal = document["summary"], gaussians["rows"], gaussians["ideal"]
    methods = {name for cell in document["cells"] for name in cell["rmse"]} - {"fewstep curve"}
    won = sum(n for name, n in schedules["all"]["strictly_best"].items() if name.startswith(("corrector", "predictor")))
    wide = [k for k in schedules if k not in ("mixtures", "images", "all", *NARROW)]

    def share(models: Iterable[str], key: str) -> str:
        cells = {k: schedules[k]["cells"] for k in models}
        return f"{sum(schedules[k][key] * n for k, n in cells.items()) / sum(cells.values()):.0%}"

    def count(models: Iterable[str]) -> int:
        return sum(schedules[k]["cells"] for k in models)

    few = {kind: schedules[kind]["few"]["of_best_free"] for kind in ("mixtures", "images")}

    def of_use(name: str) -> float:
        return geometric_mean(r["errors"]["fewstep"] / r["errors"][r["best_free"]] for r in rows_of(name))

    def rows_of(name: str) -> list[dict]:
        return [r for r in uses if r["use"].startswith(name)]

    def ring(row: str, key: str) -> str:
        return spread([r[key] for r in rows if r["row"] == row], 3)

    def image(model: str, method: str, steps: int) -> str:
        found = [r for r in read("images")["models"][model]["rows"] if r["method"] == method and r["steps"] == steps]
        values = [r["at"]["2000"]["fd"] for r in found]
        return spread(values, 3 if mean(values) < 10 else 1)

    def plain(model: str, steps: int) -> str:
        kinds = {r["method"] for r in read("images")["models"][model]["rows"] if r["steps"] == steps}
        learned = image(model, next(kind for kind in kinds if kind.startswith("dpmpp_2m, learned levels")), steps)
        return f"DPM++ 2M on Karras' levels {image(model, 'dpmpp_2m, karras levels', steps)}, on learned ones {learned}"

    def anomaly(name: str) -> str:
        return f"{mean(r['auroc'][name] for r in read('anomalies')['rows']):.3f}"

    lines = ["| what | fewstep | beside it |", "|---|---|---|"]

    def line(what: str, ours: str, theirs: str) -> None:
        lines.append(f"| {what} | {ours} | {theirs} |")

    wide_best, wide_but = share(wide, "best_or_within_2_percent"), share(wide, "the_same_but_for_ld3")
    line(
        "a schedule's endpoint error, up to 8 steps, over that of the best free one, picked after the fact",
        f"{few['mixtures']:.2f} on exact mixtures, {few['images']:.2f} on image models",
        f"best or within 2 % of the best of {len(methods)} methods in {wide_best} of {count(wide)} cells of mixtures and "
        f"digits, but for LD3, which takes gradients, in {wide_but}; in {share(NARROW, 'best_or_within_2_percent')} of "
        f"{count(NARROW)} of MNIST and Fashion-MNIST, where the fitted ones have a third of our evaluations or less; the "
        f"published costs the best in {won}",
    )
    line(
        "the same in image to image, and of a flow model",
        f"{of_use('image'):.2f}, {of_use('flow'):.2f}",
        "1 is the best free one",
    )
    kinds: dict[tuple[str, str], list[float]] = {}
    for r in rows_of("stochastic"):
        kinds.setdefault((r["solver"], r["model"]), []).append(r["errors"]["fewstep"] / r["errors"][r["best_free"]])
    worst = max(geometric_mean(each) for each in kinds.values())
    published = geometric_mean(r["errors"]["corrector"] / r["errors"][r["best_free"]] for r in rows_of("stochastic"))
    line(
        "the same of stochastic solvers, in distance to data",
        f"{of_use('stochastic'):.2f}",
        f"1 is the best free one, {published:.1f} the published curve; at worst, of a solver on a model, ours has {worst:.2f}",
    )
    line(
        "8 Gaussians in 5 evaluations: sliced Wasserstein, AUROC of the energy",
        f"{ring('fewstep', 'sw')}, {ring('fewstep', 'auroc')}",
        f"the published loop {ring('published, tau 0.1', 'sw')}, {ring('published, tau 0.1', 'auroc')}; data "
        f"{ideal['sw']:.3f}, {ideal['auroc']:.3f}",
    )
    tuned = "fine-tuned, learned levels"
    for model, name in (
        ("digits", "digits, FD-pixels"),
        ("mnist_slim", "MNIST, FD-classifier"),
        ("fashion", "Fashion-MNIST, FD-classifier"),
    ):
        more = f", from the data's Gaussian {image(model, MOVED, 50)}" if model == "mnist_slim" else ""
        line(
            f"{name}, in 4 evaluations",
            image(model, tuned, 4),
            f"{plain(model, 4)}; the model's own sampler in 50 steps {image(model, 'ancestral, own levels', 50)}{more}",
        )
        line(f"{name}, in 10", image(model, tuned, 10), plain(model, 10))
    fewest = [[r["fd"] for r in read("ablations")["rows"] if r["row"] == row] for row in ("1 step", "2 steps, digits held out")]
    line(
        "digits, FD-pixels, in 1 evaluation and in 2",
        ", ".join(spread(each, 2) for each in fewest),
        f"the model's own sampler in 200 steps {image('digits', 'ancestral, own levels', 200)}; the paper says that one is out "
        "of reach",
    )
    line(
        "a digit that was left out, AUROC",
        f"the energy {anomaly('energy')}, of any number of x {anomaly('energy, any number')}, an "
        f"autoencoder's error as the energy {anomaly('autoencoder, fine-tuned')}",
        f"5 nearest neighbours {anomaly('5 nearest neighbours')}, that autoencoder before {anomaly('autoencoder')}, the "
        f"diffusion model's denoising error alone {anomaly('denoising error')}",
    )
    return "\n".join(lines)


def main() -> int:
    of_samplers = (gaussians8, iterations, toys, images, policy_gradient, ablations, starts, preferences, anomalies)
    tables = (summary, demo, schedules, budget, uses, *of_samplers)
    stale = []
    for page in PAGES:
        old = text = page.read_text()
        for table in tables:
            mark = rf"(<!-- {table.__name__} table: python benchmarks/tables.py -->\n).*?(<!-- end -->)"
            if re.search(mark, text, flags=re.S):
                text = re.sub(mark, lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text, flags=re.S)
        if text != old and "--check" in sys.argv:
            stale.append(page.name)
        elif text != old:
            page.write_text(text)
    if stale:
        print(f"not what the JSON says: {', '.join(stale)}; run benchmarks/tables.py")
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
