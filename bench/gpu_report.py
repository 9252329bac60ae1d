"""What the GPU suite says at its end: targets, kernels that never passed, a table, a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases import FEW, MODELS, Case

Measured = dict[str, dict[str, Any]]
"""What `gpu_timing.measure` gave, by case; those that were refused as a whole are not in it."""

Pick = Callable[[dict[str, Any]], str]
"""The fedms row of a case that counts."""


@dataclass(frozen=True)
class Target:
    """value(measured, pick) -> the number, None when something it needs was not measured."""

    name: str
    bound: float
    value: Callable[[Measured, Pick], float | None]
    at_least: bool = False

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return (
            "met" if (value >= self.bound if self.at_least else value <= self.bound) else "missed"
        )


def cases_of(model: str, **mixture: Any) -> list[Case]:
    tokens, layers = MODELS[model]
    return [Case(model, tokens, k, n, **mixture) for k, n in layers]


def targets() -> list[Target]:
    """bf16, rank 16, two experts unless said, forward + backward, of the plan's own choice."""
    qo, _, gate_up, down = cases_of("Llama-3-8B")
    vit_b, vit_l = cases_of("ViT-B/16")[0], cases_of("ViT-L/14")[0]
    qo_8 = cases_of("Llama-3-8B", experts=8)[0]
    ranges = cases_of("Llama-3-8B", experts=32, segments=32)[0]
    few = cases_of("Llama-3-8B, 16 tokens")

    def over_frozen(case: Case, graph: str = "") -> Callable[[Measured, Pick], float | None]:
        return lambda found, pick: _both(found, case, pick, graph, "over_frozen")

    def quotient(over: Case, other: str, under: Case, name: str, unit: str) -> Any:
        """A row of one case over a row of another; the names are added to the picked one's."""

        def value(found: Measured, pick: Pick) -> float | None:
            top = _both(found, over, lambda r: other or pick(r), "", unit)
            low = _both(found, under, pick, name, unit)
            return top / low if top and low else None

        return value

    def extra(found: Measured, pick: Pick) -> float | None:
        spans = [
            (_both(found, c, pick, " (graph)"), _both(found, c, lambda _: "frozen", " (graph)"))
            for c in few
        ]
        known = [ours - floor for ours, floor in spans if ours is not None and floor is not None]
        return max(known) if len(known) == len(few) else None

    def saved(found: Measured, pick: Pick) -> float | None:
        bases = [c for model in MODELS for c in cases_of(model)]
        shares = [
            row["saved_bytes"] / row["x_h_g_bytes"]
            for case in bases
            if (row := _row(found, case, pick)) is not None
        ]
        return max(shares) if len(shares) == len(bases) else None

    return [
        Target("Llama q/o, over frozen", 1.10, over_frozen(qo)),
        Target("Llama gate/up, over frozen", 1.06, over_frozen(gate_up)),
        Target("Llama down, over frozen", 1.06, over_frozen(down)),
        Target("ViT-L qkvo, over frozen", 1.35, over_frozen(vit_l)),
        Target("ViT-B qkvo, over frozen, CUDA graphs", 1.5, over_frozen(vit_b, " (graph)")),
        Target("Llama q/o, E 8 over E 2", 1.1, quotient(qo_8, "", qo, "", "over_frozen")),
        Target(
            "Llama q/o, 32 segments over one adapter", 1.15,
            quotient(ranges, "", ranges, " one adapter", "us"),
        ),
        Target(
            "Llama q/o, peft bf16 gated over fedms", 1.8,
            quotient(qo, "peft bf16", qo, "", "us"), at_least=True,
        ),
        Target(
            "ViT-B qkvo, peft bf16 gated over fedms", 3.0,
            quotient(vit_b, "peft bf16", vit_b, "", "us"), at_least=True,
        ),
        Target(f"{FEW} tokens, LoRA's extra device time, us", 15.0, extra),
        Target("saved bytes over x + h + g", 1.03, saved),
    ]  # fmt: skip


def judge(data: dict[str, Any]) -> dict[str, Any]:
    """The report section: every target's verdict and every backend's standing on this device.

    best: the value with each case's fastest fedms row in place of the plan's choice.
    """
    measured = _measured(data)
    listed = []
    for target in targets():
        value = target.value(measured, lambda result: result["default"])
        listed.append(
            {
                "target": target.name,
                "bound": target.bound,
                "is": "at least" if target.at_least else "at most",
                "value": value,
                "best": target.value(measured, _fastest),
                "verdict": target.verdict(value),
            }
        )
    return {"targets": listed, "backends": standing(data)}


def standing(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each backend whether it passed on the device, and on what that rests.

    Passed: tests of it ran here and none failed, the sanitizer found nothing where it ran, and the
    rows of it that were tried are right. A rehearsal passes nothing, nor do tests that were cut.
    """
    section = data["sections"].get("test", {})
    tests = section.get("backends", {}) if section.get("state") == "done" else {}
    tools = data["sections"].get("sanitize", {}).get("runs", [])
    found: dict[str, dict[str, Any]] = {}
    for backend, runs in data.get("backends", {}).items():
        counts = tests.get(backend, {"passed": 0, "failed": 0})
        mine = [run for run in tools if run["backend"] == backend]
        rows = [r["rows"][backend] for r in _measured(data).values() if backend in r["rows"]]
        refused = sum("refused" in row for row in rows)
        passed = (
            not data["rehearsal"]
            and (counts["passed"] > 0 or backend == "stacked")  # torch's own kernels
            and counts["failed"] == 0
            and not any(run["state"] == "errors found" for run in mine)
            and refused == 0
            and len(rows) > 0
        )
        found[backend] = {
            "runs_here": runs,
            "passed_on_device": passed,
            "tests": counts,
            "sanitizer": {f"{run['tool']}": run["state"] for run in mine},
            "rows": {"right": len(rows) - refused, "refused": refused},
        }
    return found


def table(data: dict[str, Any], most_cases: int = 48) -> Iterator[str]:
    """The short table, line by line: cases, ceilings, sections, targets, left out."""
    if data["rehearsal"]:
        yield "REHEARSAL: no number below is a measurement"
    measured = _measured(data)
    yield "forward + backward over the frozen layer (frozen in us); * is what the plan chooses"
    for result in list(measured.values())[:most_cases]:
        for graph in ("", " (graph)"):
            cells = list(_cells(result, graph))
            if cells:
                yield f"{result['case']}{graph}: {', '.join(cells)}"
    if len(measured) > most_cases:
        yield f"... {len(measured) - most_cases} more in the file"
    attempts = [
        attempt
        for item in data["sections"].get("tune", {}).get("items", {}).values()
        for attempt in item.get("attempts", [])
    ]
    if attempts:
        wrong = sum("is off by" in attempt["problem"] for attempt in attempts)
        failed = sum(attempt["microseconds"] is None for attempt in attempts) - wrong
        yield f"tuning: {len(attempts)} candidates, {wrong} wrong, {failed} did not run"
    ceiling = data["sections"].get("time", {}).get("items", {}).get("ceilings", {})
    if ceiling:
        yield "ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in ceiling.items())
    report = data["sections"].get("report", {})
    for name, found in report.get("backends", {}).items():
        state = "passed" if found["passed_on_device"] else "HAS NOT PASSED"
        state = state if found["runs_here"] else "cannot run"
        yield f"{name} {state} on {data['device']}: tests {found['tests']}, rows {found['rows']}"
    for t in report.get("targets", []):
        number = "-" if t["value"] is None else f"{t['value']:.3g}"
        number += "" if t["best"] in (None, t["value"]) else f", best {t['best']:.3g}"
        yield f"{t['verdict']:>12}  {t['target']}: {number} ({t['is']} {t['bound']:g})"
    for name, section in data["sections"].items():
        note = section.get("note", "")
        stale = " (on other sources)" if section.get("sources") != data["sources"] else ""
        seconds = section.get("seconds", 0.0)
        yield f"{name}: {section.get('state', 'not run')}{stale}, {seconds:.0f} s {note}".rstrip()
    for name, items in data["left_out"].items():
        yield f"left out of {name}: {len(items)}, first {'; '.join(items[:3])}"


def picture(data: dict[str, Any], path: Path) -> str:
    """Bars of every row's ratio to the frozen layer; says why when there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = list(_measured(data).values())[:20]
    names = dict.fromkeys(n for r in measured for n in r["rows"] if n != "frozen" and "(" not in n)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.16 * len(measured) * (1 + len(names))))
    for i, name in enumerate(names):
        known = [(j, v) for j, r in enumerate(measured) if (v := _ratio(r, name)) is not None]
        height = 0.8 / len(names)
        places = [j + i * height for j, _ in known]
        axes.barh(places, [v for _, v in known], height=height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(measured)), [r["case"] for r in measured], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward over the frozen layer")
    axes.set_title(("REHEARSAL " if data["rehearsal"] else "") + data["device"])
    if names:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path.name


def _measured(data: dict[str, Any]) -> Measured:
    items = data["sections"].get("time", {}).get("items", {})
    return {name: result for name, result in items.items() if "rows" in result}


def _row(found: Measured, case: Case, pick: Pick, suffix: str = "") -> dict[str, Any] | None:
    result = found.get(str(case))
    row = None if result is None else result["rows"].get(pick(result) + suffix)
    return row if row is not None and "both" in row else None


def _both(
    found: Measured, case: Case, pick: Pick, suffix: str = "", unit: str = "us"
) -> float | None:
    row = _row(found, case, pick, suffix)
    return None if row is None else row["both"][unit]["median"]


def _ratio(result: dict[str, Any], name: str) -> float | None:
    row = result["rows"].get(name, {})
    return row["both"]["over_frozen"]["median"] if "both" in row else None


def _fastest(result: dict[str, Any]) -> str:
    """The backend of the least time. Its rows alone have names of one word, but two baselines."""
    ours = {
        name: row["both"]["us"]["median"]
        for name, row in result["rows"].items()
        if "both" in row and " " not in name and name not in ("frozen", "grouped_mm")
    }
    return min(ours, key=ours.__getitem__, default=result["default"])


def _cells(result: dict[str, Any], graph: str) -> Iterator[str]:
    for name, row in result["rows"].items():
        if name.endswith(" (graph)") != bool(graph):
            continue
        short = name.removesuffix(" (graph)")
        mark = "*" if short == result["default"] else ""
        if "refused" in row:
            yield f"{short}{mark} refused"
        elif short == "frozen":
            yield f"frozen {row['both']['us']['median']:.1f}"
        elif "both" in row:
            yield f"{short}{mark} {row['both']['over_frozen']['median']:.2f}"
