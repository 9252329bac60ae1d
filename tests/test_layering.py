"""Imports go one way: an `ast` walk over every module against a table of allowed edges.

fl: rooms on levels, FL_ROOMS; kernels (public names only) below them
peft -> kernels
kernels: functional -> plan -> native; functional, native, stacked -> ops; backends never import
         one another; nothing in kernels knows peft or fl
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedms"

# module (without `fedms.`) -> what it may import; a name ending in `.*` allows the whole subpackage
TRITON_KERNELS = ("shrink", "combine", "expand", "gemm")
KERNELS = {
    "kernels": {"kernels.functional", "kernels.reference", "kernels.segments"},
    "kernels.functional": {
        "kernels.dropout", "kernels.experts", "kernels.higher_order", "kernels.native",
        "kernels.packing", "kernels.plan", "kernels.reference", "kernels.segments",
        "kernels.stacked", "kernels.triton", "kernels.validate",
    },
    "kernels.plan": {"kernels.cuda", "kernels.native", "kernels.tiles", "kernels.triton"},
    "kernels.tune": {
        "kernels.agreement", "kernels.plan", "kernels.tiles", "kernels.triton.backend",
    },
    "kernels.agreement": set(),
    "kernels.validate": {"kernels.segments"},
    "kernels.reference": {"kernels.dropout", "kernels.experts", "kernels.segments"},
    "kernels.stacked": {
        "kernels.dropout", "kernels.experts", "kernels.ops", "kernels.packing", "kernels.segments",
        "kernels.tables",
    },
    "kernels.native": {
        "kernels.experts", "kernels.ops", "kernels.packing", "kernels.segments",
    },
    "kernels.ops": set(),
    "kernels.cuda": {
        "kernels.cuda_tables", "kernels.experts", "kernels.ops", "kernels.segments",
        "kernels.tables",
    },
    "kernels.cuda_tables": {"kernels.segments"},
    "kernels.experts": set(),
    "kernels.higher_order": {"kernels.dropout", "kernels.experts", "kernels.segments"},
    "kernels.packing": set(),
    "kernels.tables": set(),
    "kernels.tiles": set(),
    "kernels.triton": {
        "kernels.experts", "kernels.ops", "kernels.segments", "kernels.triton.backend",
    },
    "kernels.triton.backend": {
        "kernels.packing", "kernels.segments", "kernels.tables", "kernels.tiles",
        "kernels.triton.launches", "kernels.triton.layout", "kernels.triton.steps",
    },
    "kernels.triton.steps": {
        "kernels.triton.launches", "kernels.triton.tile", "kernels.triton.workspace",
    },
    "kernels.triton.launches": {
        "kernels.tiles", "kernels.triton.combine", "kernels.triton.expand", "kernels.triton.gemm",
        "kernels.triton.launch", "kernels.triton.layout", "kernels.triton.outer",
        "kernels.triton.pack", "kernels.triton.shrink", "kernels.triton.tile",
        "kernels.triton.workspace",
    },
    "kernels.triton.launch": set(),
    "kernels.triton.pack": set(),
    "kernels.triton.workspace": set(),
    "kernels.triton.layout": {"kernels.segments", "kernels.triton.tile"},
    "kernels.triton.outer": {"kernels.triton.combine", "kernels.triton.tile"},
    "kernels.triton.tile": set(),
    **{f"kernels.triton.{kernel}": {"kernels.triton.tile"} for kernel in TRITON_KERNELS},
    "kernels.segments": set(),
    "kernels.dropout": set(),
}  # fmt: skip
SURFACE = {
    "peft": {"kernels"},
    "__main__": {"fl.cli"},
    # these two report what is under the hood
    "doctor": {"", "kernels", "kernels.native", "kernels.plan", "kernels.tiles"},
    "tuning": {"kernels.tiles", "kernels.tune"},
}
BACKENDS = {
    "kernels.stacked", "kernels.native", "kernels.cuda", "kernels.triton", "kernels.triton.backend",
}  # fmt: skip

# fl: rooms from the ground up. A module imports from its own room and from lower levels only.
FL_ROOMS = (
    {"fl.types", "fl.settings"},
    {"fl.fetch", "fl.wire", "fl.explain"},
    {"fl.data"},
    {"fl.tasks"},
    {"fl.model", "fl.journal"},
    {"fl.algorithms"},
    {"fl.client"},
    {"fl.server"},
    {"fl.sal", "fl.evaluate"},
    {"fl.channel"},
    {"fl.config"},
    {"fl.engines"},
    {"fl.round"},
    {"fl.runs"},
    {"fl.compare"},
    {"fl.cli"},
)
BELOW_FL = {"", "kernels", "peft", "doctor", "tuning"}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in PACKAGE.rglob("*.py")}


def _imports(name: str) -> set[str]:
    """Modules of fedms that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            module = node.module or ""
            # `from package import module` imports the module
            targets = [
                f"{module}.{alias.name}"
                if f"{module}.{alias.name}".removeprefix("fedms.") in MODULES
                else module
                for alias in node.names
            ]
        else:
            continue
        ours = [t for t in targets if t == "fedms" or t.startswith("fedms.")]
        found.update(t.removeprefix("fedms").removeprefix(".") for t in ours)
    return found


def _room(name: str) -> tuple[int, str]:
    """The level and the room of a module of fl, by the longest name that covers it."""
    covers = [
        (len(key), level, key)
        for level, room in enumerate(FL_ROOMS)
        for key in room
        if name == key or name.startswith(f"{key}.")
    ]
    assert covers or name == "fl", f"{name} stands in no room"
    return max(covers)[1:] if covers else (0, name)


def _forbidden(name: str, target: str) -> bool:
    if name == "":
        return False  # the package's own lazy table
    if name.startswith("kernels"):
        inner = name.startswith("kernels.triton") and target == "kernels.ops"
        return not inner and target not in KERNELS.get(name, set())
    if name in SURFACE or name.split(".")[0] in SURFACE:
        own = name.split(".")[0]
        return target not in SURFACE[own] and target.split(".")[0] != own
    if name.startswith("fl"):
        if not target.startswith("fl"):
            return target not in BELOW_FL
        (level, room), (target_level, target_room) = _room(name), _room(target)
        return room != target_room and target_level >= level
    return True


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_are_allowed(name):
    bad = sorted(t for t in _imports(name) if _forbidden(name, t))
    assert not bad, f"fedms.{name} must not import {bad}"


def test_there_is_no_cycle():
    edges = {name: {t for t in _imports(name) if t in MODULES and t != name} for name in MODULES}
    edges.pop("", None)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in edges:
            return
        for target in edges[name]:
            visit(target, (*path, name))
        done.add(name)

    for name in edges:
        visit(name, ())


def test_the_table_forbids_what_it_should():
    assert _forbidden("kernels.stacked", "kernels.native")
    assert _forbidden("kernels.ops", "fl.types")
    assert _forbidden("peft.layer", "kernels.functional")
    assert _forbidden("peft.routing", "fl.types")
    assert _forbidden("fl.types", "fl.data.federation")
    assert _forbidden("fl.client", "fl.engines.world")
    assert _forbidden("fl.data.table", "fl.client")
    assert _forbidden("fl.tasks.task", "fl.model.prefix")
    assert _forbidden("fl.client", "fl.server")
    assert _forbidden("fl.round", "fl.runs.report")
    assert not _forbidden("fl.evaluate", "fl.journal.records")
    assert not _forbidden("fl.cli", "fl.engines.world")
    for one in BACKENDS:
        inside = {other for other in BACKENDS if other.startswith("kernels.triton")}
        others = BACKENDS - (inside if one in inside else set())
        assert not KERNELS[one] & others
