"""Each module imports only what stands left of it: the order in which the README tells the story."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fewstep"
# a module may import those of earlier rows only
LAYERS = [
    ["config"],
    ["path"],
    ["denoiser"],
    ["mixture", "adapters", "start"],
    ["schedule", "solvers", "metrics"],
    ["free"],
    ["cost", "endpoint"],
    ["noises", "refine", "dynamic"],
    ["tailor"],
    ["verdict", "learn"],
    ["baselines"],
    ["networks", "data", "run", "export"],
    ["sampler", "training", "processes", "goal", "preference"],
    ["energy", "levels"],
    ["dxmi", "models"],
    ["finetuning"],
    ["report"],
    ["commands"],
    ["fit", "tune", "evaluation", "prefer", "scoring"],
    ["show"],
    ["demo"],
    ["cli"],
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
FILES = {file.stem: [file] for file in SOURCE.glob("*.py") if file.stem != "__init__"}
FILES |= {file.parent.name: sorted(file.parent.glob("*.py")) for file in SOURCE.glob("*/__init__.py")}
MODULES = sorted(FILES)
METHOD = {module for layer in LAYERS[: RANK["finetuning"] + 1] for module in layer} - {"data", "run", "models"}


def nodes(module: str) -> list[ast.AST]:
    return [node for file in FILES[module] for node in ast.walk(ast.parse(file.read_text()))]


def imports(module: str) -> set[str]:
    found = set()
    for node in nodes(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "fewstep" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found - {"fewstep.__version__"} if not name.startswith(f"fewstep.{module}.")}


def test_every_module_has_its_place():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_left(module):
    ours = {name.split(".")[1] for name in imports(module) if name.startswith("fewstep.")}
    wrong = {name for name in ours if RANK[name] >= RANK[module]}
    assert not wrong, f"{module} imports {wrong}, which stand beside it or to its right"


@pytest.mark.parametrize("module", sorted(METHOD))
def test_the_library_draws_no_bars_and_prints_nothing(module):
    heavy = {"rich", "cyclopts", "matplotlib", "jinja2"} & {name.split(".")[0] for name in imports(module)}
    calls = {node.func.id for node in nodes(module) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not heavy, f"{module} imports {heavy}"
    assert "print" not in calls, f"{module} prints"
