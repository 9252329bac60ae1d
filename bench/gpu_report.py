"""What a visit to a GPU says: `python bench/gpu_report.py FOLDER [FOLDER ...]` (first and second).

Prints the rows, the verdict for each backend and dtype, and the targets; draws FOLDER/results.png.
A later folder's items replace an earlier one's of the same name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import gpu_case

Items = dict[str, dict[str, Any]]
OURS = ("stacked", "triton", "cuda")


@dataclass(frozen=True)
class Target:
    """Forward + backward of the plan's own choice over the frozen layer, as CUDA graphs."""

    name: str
    case: str
    bound: float

    def value(self, items: Items) -> float | None:
        found = items.get(f"time {self.case}", {})
        return ratio(found, f"{found.get('default')} (graph)")


TARGETS = [
    Target("Llama q/o", str(gpu_case("Llama-3-8B")), 1.12),
    Target("Llama gate/up", str(gpu_case("Llama-3-8B", 1)), 1.07),
    Target("ViT-B qkvo", str(gpu_case("ViT-B/16")), 1.5),
    Target("16 tokens", str(gpu_case("Llama-3-8B, 16 tokens")), 1.5),
]
STEP = 1.5
"""peft's training step over fedms's, at least."""


def ratio(found: dict[str, Any], row: str) -> float | None:
    cell = found.get("rows", {}).get(row, {})
    return cell["both"]["over_frozen"]["median"] if "both" in cell else None


def standing(items: Items) -> dict[str, dict[str, Any]]:
    """By "backend dtype": tests that passed and failed, rows that were right and refused.

    A failure counts against its own backend and dtype alone. "passed" needs something that passed
    and nothing that failed; tests that name no dtype ("any") stand for themselves.
    """
    found: dict[str, dict[str, Any]] = {}

    def of(key: str) -> dict[str, Any]:
        return found.setdefault(key, {"tests": [0, 0], "rows": [0, 0], "failed": []})

    for key, verdict in items.get("tests", {}).get("verdicts", {}).items():
        of(key)["tests"] = [len(verdict["passed"]), len(verdict["failed"])]
        of(key)["failed"] += verdict["failed"]
    for name, item in items.items():
        if name.startswith("sweep"):
            entry = of(f"{item.get('backend')} {item.get('dtype')}")
            right, wrong = len(item.get("right", [])), item.get("wrong", {})
            entry["rows"] = [entry["rows"][0] + right, entry["rows"][1] + len(wrong)]
            entry["failed"] += list(wrong)
        for backend in OURS if "rows" in item else ():
            row = item["rows"].get(backend)
            if row is not None:
                entry = of(f"{backend} {item['dtype']}")
                entry["rows"][1 if "refused" in row else 0] += 1
                entry["failed"] += [f"{name}: {row['refused']}"] if "refused" in row else []
    for name, item in items.items():
        if name.startswith("memcheck") and item.get("line") not in ("clean", "CUT"):
            of(f"{name.split()[1]} any")["failed"].append(f"{name}: {item.get('line')}")
    for entry in found.values():
        good = entry["tests"][0] + entry["rows"][0]
        entry["passed"] = good > 0 and not entry["failed"]
    return found


def losses(items: Items) -> Iterator[str]:
    """Rows in which the plan's choice is slower than the better of peft and stacked."""
    for name, item in items.items():
        for graph in ("", " (graph)"):
            chosen = ratio(item, f"{item.get('default')}{graph}")
            others = [ratio(item, other + graph) for other in ("peft", "stacked")]
            best = min((r for r in others if r is not None), default=None)
            if chosen is not None and best is not None and chosen > 1.01 * best:
                yield f"{name}{graph}: {item['default']} {chosen:.3f}, the others {best:.3f}"


def lines(data: dict[str, Any]) -> Iterator[str]:
    items: Items = data["items"]
    if data["rehearsal"]:
        yield "REHEARSAL: no number below is a measurement"
    for name, item in items.items():
        yield (
            f"{name}: REFUSED {item['refused']}"
            if "refused" in item
            else (
                f"{name}: {item.get('line') or {k: v for k, v in item.items() if k != 'seconds'}}"
            )
        )
    yield ""
    for key, entry in sorted(standing(items).items()):
        verdict = "passed" if entry["passed"] else f"HAS NOT PASSED, {entry['failed'][:3]}"
        yield f"{key}: tests {entry['tests']}, rows {entry['rows']} (right, wrong): {verdict}"
    yield ""
    for target in TARGETS:
        value = target.value(items)
        said = "not measured" if value is None else "met" if value <= target.bound else "missed"
        yield f"{said:>12}  {target.name}: {value and round(value, 3)} (at most {target.bound})"
    step = items.get("training step", {}).get("graph", {}).get("peft over fedms", {}).get("median")
    step = None if data["rehearsal"] else step
    said = "not measured" if step is None else "met" if step >= STEP else "missed"
    yield f"{said:>12}  training step, peft over fedms: {step and round(step, 3)} (at least {STEP})"
    yield from (f"slower than it need be: {line}" for line in losses(items))
    for name in data["left_out"]:
        yield f"left out: {name}"
    if "running" in data:
        yield f"the process ended in: {data['running']}"


def picture(data: dict[str, Any], path: Path) -> None:
    """Bars of every graph row's ratio to the frozen layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = {n.removeprefix("time "): i for n, i in data["items"].items() if "rows" in i}
    names = dict.fromkeys(n for i in cases.values() for n in i["rows"] if n.endswith("(graph)"))
    names.pop("frozen (graph)", None)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.16 * len(cases) * (1 + len(names))))
    for i, name in enumerate(names):
        known = [(j, r) for j, c in enumerate(cases.values()) if (r := ratio(c, name)) is not None]
        height = 0.8 / len(names)
        axes.barh([j + i * height for j, _ in known], [r for _, r in known], height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward over the frozen layer")
    device = data["items"].get("about", {}).get("device", "")
    axes.set_title(("REHEARSAL " if data["rehearsal"] else "") + device)
    if names:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)
    data: dict[str, Any] = {"rehearsal": False, "items": {}, "left_out": []}
    for folder in folders:
        read = json.loads((folder / "results.json").read_text("utf-8"))
        data |= read | {"items": data["items"] | read["items"]}
    for line in lines(data):
        print(line)
    picture(data, folders[-1] / "results.png")


if __name__ == "__main__":
    main()
