"""One markdown table of what was measured on a device: ``benchmarks/results/<device>.md``, from its rows.

    python -m benchmarks.gpu.report [--results benchmarks/results] [--state out/gpu] [--device NAME]

The newest row of each measurement, the bars of the project beside it, and how the sections ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import ORDER
from benchmarks.tables import decode_sections, end_to_end_sections, kernel_sections, ladder_sections, table

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
LIBRARIES = ("sdpa", "flash_attn", "eager", "compiled eager")
OURS = ("cuda", "triton", "cpu")


def newest(rows: Iterable[Row], *names: str) -> list[Row]:
    """Of rows that agree in these fields the last."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(name) for name in names)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """By op, case and mode the newest row of each backend, if it is of the same run as the newest of all."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in newest((r for r in rows if "op" in r), "op", "case", "mode", "backend"):
        found.setdefault((row["op"], row["case"], row["mode"]), {})[row["backend"]] = row
    for mine in found.values():
        last = list(mine.values())[-1]
        for name in list(mine):
            if (mine[name]["commit"], mine[name]["date"], mine[name]["load"]) != (
                last["commit"],
                last["date"],
                last["load"],
            ):
                del mine[name]
    return found


def fastest(mine: dict[str, Row], names: Sequence[str]) -> Row | None:
    return min((mine[name] for name in names if name in mine), key=lambda row: row["p50_ms"], default=None)


def bars(rows: Sequence[Row]) -> list[list[object]]:
    """The goals that these rows can judge: what, goal, measured, reached."""
    lines: list[list[object]] = []

    def judge(what: str, goal: str, value: float | None, reached: bool, unit: str = "x") -> None:
        if value is not None:
            lines.append([what, goal, f"{value:.2f} {unit}", "yes" if reached else "**no**"])

    for (op, case, mode), mine in groups(rows).items():
        ours, library, eager = fastest(mine, OURS), fastest(mine, LIBRARIES), mine.get("eager")
        if ours is None or "bfloat16" not in case:
            continue
        name = f"{op}, {case}, {mode}, {ours['backend']}"
        if mode == "backward" and eager is not None:
            gain = eager["p50_ms"] / ours["p50_ms"]
            judge(name, "no slower than eager", gain, gain >= 1)
        if mode != "forward":
            continue
        if op == "factorized_attention" and case.startswith("temporal-512") and library is not None:
            gain = library["p50_ms"] / ours["p50_ms"]
            judge(name, f">= 5 x the best library ({library['backend']})", gain, gain >= 5)
        if op in ("ada_layer_norm", "gated_residual_ada_layer_norm") and case.startswith("video-512"):
            share = ours["share_of_copy"]
            judge(name, ">= 0.9 of the copy", share, share >= 0.9, "of the copy")
        if op == "bidirectional_attention" and "512x512" in case and "sdpa" in mine:
            gain = mine["sdpa"]["p50_ms"] / ours["p50_ms"]
            judge(name, ">= 1.6 x two SDPA calls", gain, gain >= 1.6)
    goals = {("512x512", False): 5.5, ("720p", False): 22.0, ("512x512", True): 4.5, ("720p", True): 18.0}
    newest_rows = newest_ladder(rows)
    ladder = [r for r in newest_rows if r["steps"] == 30 and r["guidance"] and r["rung"] not in ("interval", "cache")]
    for (clip, fp8), goal in goals.items():
        mine = [r for r in ladder if r["clip"] == clip and r["rung"] != "upstream" and (r["rung"] == "fp8" or not fp8)]
        mine = mine if fp8 else [r for r in mine if not r["rung"].startswith("fp8")]
        best = min(mine, key=lambda row: row["s_p50"], default=None)
        if best is not None:
            what = f"denoise {clip}, 30 steps, guidance, {best['rung']}"
            judge(what, f"<= {goal} s", best["s_p50"], best["s_p50"] <= goal, "s")
    for rung, steps, guided, goals_of, what in (
        ("cache", 30, True, {"512x512": 2.0, "720p": 8.0}, "30 steps, guidance interval and cache"),
        ("fp8", 4, False, {"512x512": 0.35, "720p": 1.6}, "4 steps without guidance, fp8"),
    ):
        for row in newest_rows:
            goal = goals_of.get(row["clip"])
            if goal is not None and (row["rung"], row["steps"], row["guidance"]) == (rung, steps, guided):
                judge(f"denoise {row['clip']}, {what}", f"<= {goal} s", row["s_p50"], row["s_p50"] <= goal, "s")
    for row in newest((r for r in rows if r.get("bench") == "decode" and r["variant"] == "ours"), "clip", "dtype"):
        gain = row["times_eager"]
        judge(f"decode {row['clip']}, {row['dtype']}", ">= 2.5 x eager", gain, gain is not None and gain >= 2.5)
    return lines


def newest_ladder(rows: Iterable[Row]) -> list[Row]:
    return newest((r for r in rows if r.get("bench") == "ladder"), "clip", "rung", "steps", "guidance")


def sections_table(state: Path) -> str:
    """How the steps ended, as the driver noted it."""
    cells: list[list[object]] = []
    for name in ORDER:
        path = state / f"{name}.json"
        if name == "report" or not path.is_file():
            continue
        for step, facts in json.loads(path.read_text(encoding="utf-8"))["steps"].items():
            cells.append([name, step, facts["status"], facts.get("seconds"), facts.get("reason", "")])
    return table(["section", "step", "ended", "s", "why"], cells) if cells else ""


def page(rows: Sequence[Row], state: Path | None) -> str:
    """The whole page, of the rows of one device."""
    last, keys = rows[-1], ("torch", "triton", "cuda", "driver", "python", "commit", "date")
    where = ", ".join(f"{key} {last[key]}" for key in keys if last.get(key))
    text = f"# {last['device']}\n\nGenerated by `make gpu` from the rows beside it; do not edit. {where}.\n"
    found = bars(rows)
    if found:
        text += "\n## Bars\n\n" + table(["what", "goal", "measured", "reached"], found)
    text += ladder_sections([row for row in rows if row.get("bench") == "ladder"])
    text += decode_sections([row for row in rows if row.get("bench") == "decode"])
    text += end_to_end_sections([row for row in rows if row.get("bench") == "end_to_end"])
    text += kernel_sections([row for row in rows if "op" in row])
    ended = sections_table(state) if state is not None else ""
    return text + (f"\n## Sections\n\n{ended}" if ended else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 written, 1 no rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--state", type=Path, default=None, help="folder of the driver's notes")
    parser.add_argument("--device", default=None, help="file name without .jsonl; the one written to last by default")
    args = parser.parse_args(arguments)
    files = sorted(args.results.glob(f"{args.device or '*'}.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = (
        [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines() if line.strip()]
        if files
        else []
    )
    if not rows:
        print(f"report: no rows in {args.results}", file=sys.stderr)
        return 1
    text = page(rows, args.state)
    files[-1].with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"wrote {files[-1].with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
