"""What became of every tensor, as a table and as json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from javis.convert.plan import Component, Plan
from javis.convert.read import WeightSource

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Report:
    """The account of one conversion.

    ``problems`` stops a strict conversion: missing, unexpected and mismatched tensors, values that are not finite, and
    a config.json that contradicts the weights.
    """

    kind: str
    source: str
    destination: str
    components: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> class, config, assumed, files
    used: list[dict[str, Any]] = field(default_factory=list)  # component, source, target, shape, dtype, renamed, tied
    missing: list[dict[str, Any]] = field(default_factory=list)  # component, target, shape
    absent: list[dict[str, Any]] = field(default_factory=list)  # the same, but this kind of checkpoint never has them
    unexpected: list[dict[str, Any]] = field(default_factory=list)  # source, shape
    mismatched: list[dict[str, Any]] = field(default_factory=list)  # component, source, target, shape, expected
    ignored: list[dict[str, Any]] = field(default_factory=list)  # source, shape, reason
    conflicts: list[str] = field(default_factory=list)  # config.json against the weights
    broken: list[dict[str, Any]] = field(default_factory=list)  # source, why: values that cannot be kept
    notes: list[str] = field(default_factory=list)
    written: bool = False

    @property
    def renamed(self) -> list[dict[str, Any]]:
        return [row for row in self.used if row["source"] != row["target"]]

    def problems(self) -> list[str]:
        """What is wrong, worst first, one line each."""
        lines = [f"missing {r['component']}/{r['target']} {r['shape']}" for r in self.missing]
        lines += [
            f"{r['source']} has the shape {r['shape']}, {r['component']}/{r['target']} needs {r['expected']}"
            for r in self.mismatched
        ]
        lines += [f"unexpected {r['source']} {r['shape']}" for r in self.unexpected]
        lines += [f"{r['source']}: {r['reason']}" for r in self.broken]
        return lines + self.conflicts

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        counts = {name: len(getattr(self, name)) for name in ("used", "renamed", *_FATES)}
        return values | {"renamed": self.renamed, "counts": counts}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def render(self, console: Console, rows: int = 12) -> None:
        """Print a line per group of tensors, and the first ``rows`` of each fate but "used"."""
        console.print(f"{self.source} ({self.kind}) -> {self.destination}")
        groups = Counter((r["component"], _group(r["source"]), _group(r["target"]), r["dtype"]) for r in self.used)
        lines = [("component", "tensors", "dtype", "from", "to")]
        lines += [(part, str(count), dtype, old, new) for (part, old, new, dtype), count in groups.items()]
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        for words in lines:
            console.print("  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True)).rstrip())
        for name, parts in self.components.items():
            for key, value in parts["assumed"].items():
                console.print(f"{name}: assumed {key} = {value} (neither the weights nor a config.json tell)")
        for fate in _FATES:
            entries = getattr(self, fate)
            if entries:
                console.print(f"{fate}: {len(entries)}")
                lines_of = _BY_GROUP.get(fate, _row)
                listed = Counter(lines_of(row) for row in entries)
                for line, count in list(listed.items())[:rows]:
                    console.print(f"  {line}" + (f" ({count})" if count > 1 else ""))
                if len(listed) > rows:
                    console.print(f"  ... {len(listed) - rows} more")
        for line in (*self.conflicts, *self.notes):
            console.print(f"note: {line}")


_FATES = ("missing", "mismatched", "unexpected", "absent", "ignored", "broken")


def _row(row: dict[str, Any]) -> str:
    return "  ".join(str(value) for value in row.values())


# Fates that are no fault, and come by the hundred: said per module or per reason.
_BY_GROUP: dict[str, Callable[[dict[str, Any]], str]] = {
    "absent": lambda row: f"{row['component']}/{_group(row['target'])}",
    "ignored": lambda row: f"{_group(row['source'])}: {row['reason']}",
}


def _group(name: str) -> str:
    """The part of a name that tells the module: its first words, with layers as {i}."""
    words = ["{i}" if word.isdigit() else word for word in name.split(".")]
    kept = words[: 3 if "{i}" in words[:3] else 2]
    return ".".join(kept) + (".*" if len(kept) < len(words) else "")


def account(plan: Plan, source: WeightSource, origin: str, destination: str, dtype: str | None) -> Report:
    """What the plan does to every tensor of the source and of the components; reads no values."""
    report = Report(plan.kind, origin, destination, notes=[*source.notes, *plan.notes])
    taken: set[str] = set()
    names = set(source.names())
    for component in plan.components:
        report.components[component.name] = {
            "class": component.class_name,
            "config": component.config,
            "assumed": component.assumed,
            "files": sorted(component.files),
        }
        report.conflicts += [f"{component.name}: {line}" for line in component.conflicts]
        _account_component(report, component, source, names, taken, dtype)
    for name in sorted(names - taken):
        row: dict[str, Any] = {"source": name, "shape": list(source.info(name).shape)}
        if name in plan.ignored:
            report.ignored.append(row | {"reason": plan.ignored[name]})
        else:
            report.unexpected.append(row)
    return report


def _account_component(
    report: Report, component: Component, source: WeightSource, names: set[str], taken: set[str], dtype: str | None
) -> None:
    for target, shape in component.expected.items():
        place = component.source_of(target)
        row: dict[str, Any] = {"component": component.name, "target": target, "shape": list(shape)}
        if place is None or place not in names:
            (report.absent if target in component.absent else report.missing).append(row)
            continue
        info = source.info(place)
        found = component.reshaped.get(target, info.shape)
        taken.add(place)
        if found != tuple(shape):
            report.mismatched.append(
                {"component": component.name, "source": place, "target": target}
                | {"shape": list(info.shape), "expected": list(shape)}
            )
            continue
        kept = str(info.dtype).removeprefix("torch.")
        report.used.append(
            {"component": component.name, "source": place, "target": target, "shape": list(shape)}
            | {"dtype": dtype if dtype and info.dtype.is_floating_point else kept, "renamed": place != target}
            | {"tied": target not in component.sources}
        )
