"""What is in a folder: logs of training, clips, evaluations. Nothing is computed, and nothing unreadable is fatal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from javis.errors import UsageError

CLIPS = (".mp4", ".webm")
POINTS = "points of eval steps"
MAX_JSON = 64 << 20  # bytes; a larger file is named and left out
# What every measurement says of the machine and the code (`javis.bench_environment`).
ENVIRONMENT = (
    "device", "device_class", "threads", "load", "isa", "javis", "torch", "triton", "cuda", "driver", "clock",
    "max_clock", "power_limit", "python", "compiler", "commit", "dirty", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Log:
    """Rows of a log.jsonl: ``step`` and finite or infinite numbers (or lists of them) by name."""

    name: str
    rows: list[dict[str, Any]]

    def series(self) -> dict[str, tuple[list[float], list[float]]]:
        """Steps and values by name, in the order of first appearance; lists become ``name 1``, ``name 2``, ..."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name == "step":
                    continue
                many = value if isinstance(value, list) else [value]
                for i, number in enumerate(many):
                    if isinstance(number, (int, float)) and not isinstance(number, bool):
                        label = f"{name} {i + 1}" if isinstance(value, list) else name
                        steps, values = found.setdefault(label, ([], []))
                        steps.append(float(row["step"]))
                        values.append(float(number))
        return found


@dataclass(frozen=True)
class ClipFile:
    """A clip and what the json beside it says (empty: none)."""

    path: Path
    facts: dict[str, Any]

    @property
    def sync(self) -> dict[str, Any]:
        """The sync report of the clip, if it has one."""
        found = self.facts.get("sync")
        return found if isinstance(found, dict) else {}

    @property
    def caption(self) -> str:
        """What the clip is to show."""
        for name in ("prompt", "caption", "text"):
            if isinstance(self.facts.get(name), str):
                return str(self.facts[name])
        return ""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its name, its kind as the file says it (or ""), and what it holds."""

    name: str
    kind: str
    data: Any


@dataclass
class Run:
    """Everything found.

    Attributes:
        configs: by name of the folder ("" is the run's own).
        checkpoints: (name, bytes, fingerprint if it is a whole checkpoint folder).
        pictures: contact sheets of samples and figures, as PNG.
        problems: what could not be read, and why.
    """

    source: Path
    logs: list[Log] = field(default_factory=list)
    configs: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[tuple[str, int, str | None]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    clips: list[ClipFile] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def name_of(self, path: Path) -> str:
        """Path within the run, for people."""
        root = self.source if self.source.is_dir() else self.source.parent
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def read_run(source: Path, evaluations: tuple[Path, ...] = ()) -> Run:
    """Look into a folder, and one level below it, or at one file.

    Args:
        source: folder of a training run, of clips or of an evaluation; or one clip, json or jsonl.
        evaluations: files that belong to it and lie elsewhere.

    Raises:
        UsageError: it is not there, or holds nothing that a page can be made of.
    """
    if not source.exists():
        raise UsageError(f"no such folder: {source}; expected a training run, a folder of clips or of an evaluation")
    run = Run(source)
    if source.is_file():
        _read_file(run, source)
    else:
        for path in sorted(source.iterdir(), key=_natural):
            if path.name.startswith("."):
                continue
            if path.is_file():
                _read_file(run, path)
            elif path.is_dir():
                _read_below(run, path)
    if run.logs:  # what a run writes of itself, such as the form of its codecs, is no evaluation
        for evaluation in [e for e in run.evaluations if not e.kind]:
            run.evaluations.remove(evaluation)
            run.configs[evaluation.name] = evaluation.data
    for path in evaluations:
        if not path.is_file():
            raise UsageError(f"no such file: {path}; expected a json that an evaluation has written")
        _read_json(run, path)
    found = (run.logs, run.clips, run.evaluations, run.configs, run.checkpoints)
    if not any(found):
        wrong = f" ({run.problems[0][0]}: {run.problems[0][1]})" if run.problems else ""
        raise UsageError(
            f"{source} holds nothing to report{wrong}; expected log.jsonl of a training run, clips (mp4), or the json "
            "of an evaluation"
        )
    return run


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Order in which clip_2 comes before clip_10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", path.name)]


def _read_file(run: Run, path: Path) -> None:
    if path.suffix in CLIPS:
        run.clips.append(ClipFile(path, _facts_beside(run, path)))
    elif path.name == "log.jsonl":
        _read_log(run, path)
    elif path.suffix == ".jsonl":
        _read_rows(run, path)
    elif path.name == "config.json":
        facts = _loaded(run, path)
        if facts is not None:
            run.configs[_folder_name(run, path)] = facts
            _add_checkpoint(run, path.parent)
    elif path.suffix == ".json" and not any(path.with_suffix(suffix).is_file() for suffix in CLIPS):
        _read_json(run, path)
    elif path.suffix == ".png" and not any(path.with_suffix(suffix).is_file() for suffix in CLIPS):
        run.pictures.append(path)
    elif path.suffix == ".safetensors":
        _add_checkpoint(run, path)


def _read_below(run: Run, folder: Path) -> None:
    """A folder within the run: a stage, samples, checkpoints or more evaluations; never the data beside them."""
    if folder.name == "samples":
        run.pictures += sorted(folder.glob("*.png"), key=_natural)
        for path in sorted(folder.iterdir(), key=_natural):
            if path.suffix in CLIPS:
                _read_file(run, path)
    elif folder.name == "checkpoints":
        for path in sorted(folder.iterdir(), key=_natural):
            if path.is_dir() and not path.name.startswith("."):
                _add_checkpoint(run, path)
    elif (folder / "log.jsonl").is_file() or (folder / "model.safetensors").is_file():
        for name in ("log.jsonl", "config.json"):
            if (folder / name).is_file():
                _read_file(run, folder / name)
        for path in sorted(folder.glob("*.safetensors"), key=_natural):
            if path.name != "model.safetensors":
                _add_checkpoint(run, path)


def _folder_name(run: Run, path: Path) -> str:
    name = run.name_of(path.parent)
    return "" if name == "." else name


def _add_checkpoint(run: Run, path: Path) -> None:
    if path.is_file():
        if path.name != "model.safetensors":
            run.checkpoints.append((run.name_of(path), path.stat().st_size, None))
    elif (path / "model.safetensors").is_file():
        from javis.clip_files import checkpoint_fingerprint

        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        run.checkpoints.append((_folder_name(run, path / "x") or ".", size, checkpoint_fingerprint(str(path))))
    elif (path / "checkpoint.json").is_file():
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        run.checkpoints.append((run.name_of(path), size, None))


def _facts_beside(run: Run, path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    facts = _loaded(run, beside) if beside.is_file() else {}
    if facts is not None and not isinstance(facts, dict):
        run.problems.append((run.name_of(beside), "expected a json object"))
    return facts if isinstance(facts, dict) else {}


def _loaded(run: Run, path: Path) -> Any:
    """What a json file holds; None and a problem if it cannot be read."""
    try:
        if path.stat().st_size > MAX_JSON:
            run.problems.append((run.name_of(path), f"is larger than {MAX_JSON >> 20} MiB and was left out"))
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append((run.name_of(path), f"is no readable json ({error})"))
        return None


def _read_json(run: Run, path: Path) -> None:
    data = _loaded(run, path)
    if data in (None, {}, []):
        return
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(data, list) and isinstance(data[0], dict):
        kind = data[0].get("kind")
    run.evaluations.append(Evaluation(run.name_of(path), kind if isinstance(kind, str) else "", data))


def _lines(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    wrong = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError):
                    row, wrong = None, wrong + 1
                if isinstance(row, dict):
                    yield row
    except OSError as error:
        run.problems.append((run.name_of(path), str(error)))
    if wrong:
        run.problems.append((run.name_of(path), f"{wrong} lines are no json and were left out"))


def _read_log(run: Run, path: Path) -> None:
    rows = []
    for row in _lines(run, path):
        step = row.get("step")
        if isinstance(step, (int, float)) and math.isfinite(step):
            rows.append(row)
    if rows:
        run.logs.append(Log(_folder_name(run, path), sorted(rows, key=lambda row: row["step"])))
    else:
        run.problems.append((run.name_of(path), "holds no row with a step"))


def _read_rows(run: Run, path: Path) -> None:
    """Rows of benchmarks/results by kind; a point of ``javis eval steps`` as its figures."""
    rows = list(_lines(run, path))
    if any("setting" in row for row in rows):
        _read_point(run, path, rows)
        return
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind", "")), []).append(row)
    for kind, some in kinds.items():
        run.evaluations.append(Evaluation(run.name_of(path), kind, some))


def _read_point(run: Run, path: Path, rows: list[dict[str, Any]]) -> None:
    from javis.eval.steps_points import PointFile, Setting
    from javis.eval.steps_report import row_of

    try:
        about = next(row for row in rows if "setting" in row)
        file = PointFile(path.parent, Setting(**about["setting"]), about["checkpoint_fingerprint"], about["prompts"])
        file.path = path  # whatever it is called now
        row = row_of(file.read(), {"checkpoint_fingerprint": about["checkpoint_fingerprint"]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        run.problems.append((run.name_of(path), f"is no point of 'javis eval steps' ({type(error).__name__}: {error})"))
        return
    for evaluation in run.evaluations:
        if evaluation.kind == "eval_steps" and evaluation.name == POINTS:
            evaluation.data.append(row)
            return
    run.evaluations.append(Evaluation(POINTS, "eval_steps", [row]))
