"""The house's rules: what may import what, and that importing a module changes nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # and what they may import
    "main": {"models", "modules", "dataloaders", "utils"},
    "scripts": {"main", "scripts", "models", "modules", "dataloaders", "utils"},
    "models": {"models", "modules"},
    "modules": {"modules"},
    "dataloaders": {"dataloaders"},
    "utils": {"utils", "modules", "dataloaders"},
}
# The wings of utils, and what each may import besides itself and the ground floor, "". The flags
# stand on the ground floor, but offer what the evaluation knows.
WINGS = {
    "": set(),
    "arguments": {"evaluation"},
    "training": {"evaluation", "models"},
    "evaluation": set(),
    "report": {"evaluation", "pictures"},
    "pictures": {"evaluation"},
    "search": {"evaluation", "models"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [ROOT / "main.py", *(p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")))]
MODULES = {module_name(path): path for path in PATHS}


def imports(path: Path, at_import: bool = False) -> set[str]:
    """Full names of what a file imports, anywhere or only while it is imported itself; of a name
    that is imported from a module of others both are given, since it may be a module too."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    if at_import:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() if names <= MODULES.keys() else names | {node.module}
    return found


def ours(path: Path) -> set[str]:
    """The modules of the house that a file imports."""
    found = imports(path)
    unknown = {name for name in found if name.split(".")[0] in {*ROOMS, "tests"}} - MODULES.keys()
    assert all(name.rpartition(".")[0] in found for name in unknown), f"{path}: {unknown}"
    return found & MODULES.keys()


def wing(name: str) -> str:
    """Of a module of utils; "" on the ground floor."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and parts[1] in WINGS) else ""


def allowed(source: str, target: str) -> bool:
    from_room, to_room = source.split(".")[0], target.split(".")[0]
    if from_room != "utils":
        return to_room in ROOMS[from_room]
    reachable = WINGS[wing(source)]
    if to_room != "utils":
        return to_room in ROOMS["utils"] | reachable
    return wing(target) in {"", "arguments", wing(source)} | reachable


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    wrong = [
        f"{source} imports {target}"
        for source, path in MODULES.items()
        if source.split(".")[0] == room
        for target in sorted(ours(path))
        if not allowed(source, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter({name: ours(path) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# Imports one module after another in a fresh interpreter, each after the libraries that it uses.
PROGRAM = """
import atexit, contextlib, importlib, json, logging, os, signal, sys, warnings
import decord, torch

def recorded(owner, name):
    real = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: calls.append(name) or real(*a, **k))

calls = []
recorded(os, "register_at_fork")
recorded(decord.logging, "set_level")
recorded(sys, "addaudithook")

def state():
    loggers = {
        name: (logger.level, logger.disabled, logger.propagate, str(logger.handlers))
        for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]
        if isinstance(logger, logging.Logger)
    }
    return {
        "signal handlers": [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        "exit hooks": atexit._ncallbacks(),
        "calls": list(calls),
        "logging": {name: value for name, value in loggers.items()
                    if value != (logging.NOTSET, False, True, "[]")},
        "excepthook": str(sys.excepthook),
        "warning filters": len(warnings.filters),
        "process": (list(sys.path), dict(os.environ), os.getcwd()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "float32 products": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                             torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.enabled),
        "determinism": (torch.are_deterministic_algorithms_enabled(),
                        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "tensors": (str(torch.get_default_dtype()), torch.is_grad_enabled()),
        "random state": torch.get_rng_state().sum().item(),
        # reading a switch of torch's compiler would import that, which takes a second
        "compiler": (c := sys.modules.get("torch._dynamo.config")) and c.specialize_float,
    }

for name, libraries in json.load(sys.stdin):
    for library in libraries:
        with contextlib.suppress(ImportError):  # a function, or one that may be absent
            importlib.import_module(library)
    before = state()
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(name, "cannot be imported", repr(error), sep=": ")
    after = state()
    for what in before:
        if before[what] != after[what]:
            print(name, what, before[what], after[what], sep=": ")
"""


def test_importing_a_module_changes_nothing_else() -> None:
    """And every module can be imported, also one that nothing imports."""
    graph = TopologicalSorter({name: ours(path) for name, path in MODULES.items()})
    order = []
    for name in graph.static_order():
        libraries = sorted(imports(MODULES[name], at_import=True))
        order.append((name, [lib for lib in libraries if lib.split(".")[0] not in ROOMS]))
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, input=json.dumps(order), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
