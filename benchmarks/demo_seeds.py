"""The demo on several seeds: times and numbers, with their spread.

python benchmarks/demo_seeds.py            three seeds; writes benchmarks/demo_seeds.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from fewstep.demo import STEPS, run_demo
from fewstep.run import write_json


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    result: dict = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "seeds": []}
    for seed in range(args.seeds):
        folder = Path(tempfile.mkdtemp())
        summary, _ = run_demo(folder / "demo", seed, quick=False)
        facts = json.loads((folder / "demo" / "results.json").read_text())
        shutil.rmtree(folder)
        at = [row for row in facts["rows"] if row["steps"] == STEPS]
        names = dict.fromkeys(row["method"] for row in at)
        quality = {
            name: {k: statistics.mean(r[k] for r in at if r["method"] == name) for k in ("fd", "sw", "energy_distance")}
            for name in names
        }
        kept = {k: facts[k] for k in ("seed", "seconds", "auroc", "floor")} | {"verdict": facts["learned"]["verdict"]}
        result["seeds"].append(kept | {f"at_{STEPS}_evaluations": quality})
        print(f"seed {seed}:", *summary, sep="\n  ", flush=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
