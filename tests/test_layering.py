"""Imports go one way: an `ast` walk over every module against a table of allowed edges.

fl/cli -> fl/experiment -> fl/engines, fl/report -> measures -> fl/server, fl/client
           -> fl's parts -> fl/types
                          peft -> kernels (public names only); layers -> kernels
kernels: functional -> plan -> native; functional, native, stacked -> ops; backends never import
         one another; nothing in kernels knows layers, peft or fl
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedms"

# module (without `fedms.`) -> what it may import; a name ending in `.*` allows the whole subpackage
TRITON_KERNELS = ("shrink", "combine", "expand", "outer")
KERNELS = {
    "kernels": {"kernels.functional", "kernels.reference", "kernels.segments"},
    "kernels.functional": {
        "kernels.dropout", "kernels.experts", "kernels.native", "kernels.plan", "kernels.segments",
        "kernels.stacked", "kernels.validate",
    },
    "kernels.plan": {"kernels.cuda", "kernels.native", "kernels.tiles", "kernels.triton"},
    "kernels.tune": {
        "kernels.agreement", "kernels.plan", "kernels.tiles", "kernels.triton.backend",
    },
    "kernels.agreement": set(),
    "kernels.validate": {"kernels.segments"},
    "kernels.reference": {"kernels.dropout", "kernels.experts", "kernels.segments"},
    "kernels.stacked": {"kernels.dropout", "kernels.experts", "kernels.ops", "kernels.packing"},
    "kernels.native": {"kernels.experts", "kernels.ops"},
    "kernels.ops": set(),
    "kernels.cuda": {"kernels.cuda_tables", "kernels.experts", "kernels.ops"},
    "kernels.cuda_tables": set(),
    "kernels.experts": set(),
    "kernels.packing": set(),
    "kernels.tiles": set(),
    "kernels.triton": {
        "kernels.experts", "kernels.ops", "kernels.segments", "kernels.triton.backend",
    },
    "kernels.triton.backend": {
        "kernels.packing", "kernels.tiles", "kernels.triton.combine", "kernels.triton.expand",
        "kernels.triton.layout", "kernels.triton.outer", "kernels.triton.shrink",
    },
    "kernels.triton.layout": {"kernels.packing", "kernels.segments"},
    "kernels.triton.tile": set(),
    **{f"kernels.triton.{kernel}": {"kernels.triton.tile"} for kernel in TRITON_KERNELS},
    "kernels.segments": set(),
    "kernels.dropout": set(),
}  # fmt: skip
SURFACE = {
    "layers": {"kernels"},
    "peft": {"kernels"},
    # these two report what is under the hood
    "doctor": {"", "kernels", "kernels.native", "kernels.plan", "kernels.tiles"},
    "tuning": {"kernels.tiles", "kernels.tune"},
}
BACKENDS = {
    "kernels.stacked", "kernels.native", "kernels.cuda", "kernels.triton", "kernels.triton.backend",
}  # fmt: skip

# fl: a module may import lower levels only; the parts and the algorithms may import one another as
# long as there is no cycle. A module that is not named here is a part.
FL_LEVELS = {
    "fl.types": 0,
    "fl.client": 2, "fl.server": 2,
    "fl.metrics": 3, "fl.importance": 3, "fl.predict": 3,
    "fl.engines": 4, "fl.report": 4,
    "fl.experiment": 5,
    "fl.cli": 6,
}  # fmt: skip
PARTS = 1
BELOW_FL = {"", "kernels", "layers", "peft", "doctor", "tuning"}


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


def _level(name: str) -> int:
    matches = [key for key in FL_LEVELS if name == key or name.startswith(f"{key}.")]
    return FL_LEVELS[matches[0]] if matches else PARTS


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
        same_package = target.split(".")[:2] == name.split(".")[:2]
        either_part = _level(name) == _level(target) == PARTS
        return not (same_package or either_part) and _level(target) >= _level(name)
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
    assert _forbidden("layers", "kernels.ops")
    assert _forbidden("peft.layer", "kernels.functional")
    assert _forbidden("peft.routing", "fl.types")
    assert _forbidden("fl.types", "fl.config")
    assert _forbidden("fl.client", "fl.engines.local")
    assert _forbidden("fl.data", "fl.client")
    assert not _forbidden("fl.cli", "fl.engines.local")
    for one in BACKENDS:
        inside = {other for other in BACKENDS if other.startswith("kernels.triton")}
        others = BACKENDS - (inside if one in inside else set())
        assert not KERNELS[one] & others
