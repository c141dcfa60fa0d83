"""Arrows point down only: which room may import which, no cycles, no hidden imports."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # a room may import itself and what is listed here; the longest matching name is a module's room
    "config": set(),
    "files": set(),
    "compiled": set(),
    "data": {"files", "compiled"},
    "ops": {"compiled"},
    "model": {"ops", "config"},
    "pieces": set(),
    "optim": {"model", "config"},
    "distributed": {"optim", "config", "model", "pieces"},  # model: the type in the contract, for annotations
    "plan": {"config", "model", "ops", "distributed"},
    "metrics": {"config", "plan.gpus"},
    "checkpoint": {"files", "config", "pieces", "distributed.engine", "distributed.ranks"},
    "evaluate": {"model", "data", "distributed.env", "distributed.ranks", "metrics"},
    "export": {"model", "checkpoint", "config", "files", "pieces", "data.tokenizer", "distributed.engine"},
    "reading": {"config", "data"},
    "preview": {"reading", "config", "data"},
    "build": {
        "checkpoint",
        "config",
        "data",
        "distributed",
        "export",
        "files",
        "model",
        "ops",
        "optim",
        "pieces",
        "reading",
    },
    "adopt": {"build", "checkpoint", "config", "data", "distributed.engine", "export", "pieces", "reading"},
    "saver": {"build", "checkpoint", "pieces"},
    "train": {"build", "files", "saver", "config", "data", "distributed", "evaluate", "metrics", "model", "optim"},
    "doctor": {"ops", "compiled", "data.encodings", "data.packing", "distributed.env"},
    "commands": {
        "adopt",
        "train",
        "evaluate",
        "export",
        "model",
        "ops",
        "data",
        "config",
        "checkpoint",
        "build",
        "distributed.env",
        "distributed.ranks",
        "distributed.zero",
        "doctor",
        "plan",
        "preview",
    },
    "cli": {
        "commands",
        "checkpoint",
        "config",
        "data",
        "distributed.env",
        "distributed.ranks",
        "evaluate",
        "export",
        "model",
        "ops",
        "plan",
        "train",
    },
    "data_prep": {
        "data.dataset",
        "data.encodings",
        "data.manifest",
        "data.scan",
        "data.packs",
        "data.shards",
        "data.writer",
        "data.tokenizer",
        "files",
    },
    "launch": {"cli", "train", "distributed.env", "evaluate", "export", "data", "config", "checkpoint", "model"},
}
# Where a package is optional, or heavy and needed by one command only, it is imported when it is used.
LAZY = {
    "metrics",
    "commands",
    "evaluate",
    "data_prep",
    "launch",
    "ops.backends",
    "distributed.zero",
    "distributed.engines",
}
HEAVY = {
    "data_prep": "torch",
    "config": "torch",
    "data.dataset": "torch",
    "data.manifest": "torch",
    "data.scan": "torch",
    "data.mixture": "torch",
    "data.shards": "torch",
    "data.order": "torch",
    "data.packing": "torch",
    "data.packs": "torch",
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("mamba_pretrain", "data_prep", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name.removeprefix("mamba_pretrain.")] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def own(imported: str, names: set[str]) -> str | None:
    """The module of ours that an import statement loads, if any."""
    name = imported.removeprefix("mamba_pretrain.")
    while name:
        if name in names:
            return name
        name = name.rpartition(".")[0]
    return None


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


NAMES = set(modules()) - {"mamba_pretrain"}


@pytest.mark.parametrize("module", sorted(NAMES))
def test_a_module_imports_only_rooms_below_its_own(module: str) -> None:
    room = module.split(".")[0]
    assert room in ROOMS, f"{module} belongs to no room"
    for imported, line in imports(modules()[module]):
        target = own(imported, NAMES)
        allowed = target is None or inside(target, room) or any(inside(target, r) for r in ROOMS[room])
        assert allowed, f"{modules()[module]}:{line} imports {target}: {room} may import {sorted(ROOMS[room])}"


@pytest.mark.parametrize("module", sorted(NAMES))
def test_imports_hidden_in_functions_are_of_optional_packages_only(module: str) -> None:
    path = modules()[module]
    top = set(imports(path, top_level_only=True))
    hidden = [(name, line) for name, line in imports(path) if (name, line) not in top]
    for name, line in hidden:
        lazy = any(inside(module, room) for room in LAZY)
        assert lazy, f"{path}:{line} imports {name} inside a function"


def test_there_is_no_import_cycle() -> None:
    graph = {
        module: {t for name, _ in imports(path) if (t := own(name, NAMES)) and t != module}
        for module, path in modules().items()
        if module in NAMES
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(("room", "package"), sorted(HEAVY.items()))
def test_data_preparation_and_configuration_never_load_torch(room: str, package: str) -> None:
    import subprocess

    name = room if room == "data_prep" else f"mamba_pretrain.{room}"
    targets = [m for m in NAMES if inside(m, "data_prep")] if room == "data_prep" else [name]
    code = (
        f"import importlib, sys\nfor m in {targets}: importlib.import_module(m)\nsys.exit({package!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_no_file_is_longer_than_400_lines() -> None:
    files = [
        p for d in ("mamba_pretrain", "data_prep", "launch", "benchmarks", "tests") for p in (ROOT / d).rglob("*.py")
    ]
    assert files
    assert {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 400} == {}
