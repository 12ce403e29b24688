"""The driver of ``make gpu``: runs the sections one after the other and remembers what is done.

    python -m benchmarks.gpu [--section NAME ...] [--dry] [--fresh] [--limit SECONDS] [--out DIR]

Plain standard library: it must start on any image. A section is a list of steps, each a process with a limit of its own
and a log. What a step ended with is kept in ``<out>/<section>.json`` at once; the next call goes on with what is not
done, as long as no source file, no package and no GPU has changed. A section stops at ``--limit``: call again.

0: every step of the chosen sections is done (or skipped, with the reason printed); 1: one failed, or is still to be
done; 2: this machine cannot run it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.probe import describe
from benchmarks.gpu.sections import ORDER, Context, Step, steps

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".json")
LEAST_SECONDS = 20.0  # a step is not begun with less left of its section
DONE = ("ok", "skipped")


def fingerprint(facts: dict[str, Any], dry: bool) -> str:
    """Of everything that a result depends on: sources, versions, the GPU."""
    digest = hashlib.sha256(json.dumps([facts["gpu"], facts["packages"], facts["python"], dry]).encode())
    for folder in ("javis", "csrc", "benchmarks", "tests", "setup.py"):
        top = ROOT / folder
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            made = path.name == "_build.json" or "results" in path.parts or "weights" in path.parts
            if path.suffix in SOURCES and path.is_file() and not made:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class State:
    """What is done of one section; written after every step."""

    path: Path
    fingerprint: str
    steps: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path, fingerprint: str, fresh: bool) -> State:
        if path.is_file() and not fresh:
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if kept["fingerprint"] == fingerprint:
                    return cls(path, fingerprint, kept["steps"])
            except (ValueError, KeyError):
                print(f"{path} is not readable: the section begins anew")
        return cls(path, fingerprint, {})

    def note(self, step: str, **facts: Any) -> None:
        self.steps[step] = facts
        temporary = self.path.with_suffix(".new")
        text = json.dumps({"fingerprint": self.fingerprint, "steps": self.steps}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.path)


def run(step: Step, log: Path, seconds: float) -> tuple[str, int | None, float]:
    """Run one step; how it ended, its exit status and its seconds."""
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | step.environment
    environment = {name: value for name, value in environment.items() if name not in step.without}
    with log.open("w", encoding="utf-8") as file:
        file.write("$ " + " ".join(step.command) + "\n")
        file.flush()
        try:
            # A group of its own, so that what the step has started ends with it.
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"cannot start: {error}\n")
            return "failed", None, 0.0
        try:
            status = process.wait(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            return "timeout", None, time.monotonic() - started
    return "ok" if status == 0 else "failed", status, time.monotonic() - started


def section(name: str, context: Context, args: argparse.Namespace, mark: str) -> bool:
    """Run what is left of a section; whether all of it is done."""
    state = State.load(args.out / f"{name}.json", mark, args.fresh)
    begun, all_done = time.monotonic(), True
    for step in steps(name, context):
        before = state.steps.get(step.name, {})
        if before.get("status") in DONE and not step.always:
            print(f"{name}: {step.name}: {before['status']} before")
            continue
        if step.skip is not None:
            state.note(step.name, status="skipped", reason=step.skip)
            print(f"{name}: {step.name}: SKIPPED: {step.skip}")
            continue
        left = args.limit - (time.monotonic() - begun)
        if left < min(LEAST_SECONDS, step.seconds):
            print(f"{name}: {step.name}: PENDING: the section's {args.limit:g} s are over; call again")
            state.note(step.name, status="pending")
            all_done = False
            continue
        log = args.out / "logs" / f"{name}-{step.name.replace(' ', '-').replace('/', '-')}.log"
        status, code, seconds = run(step, log, min(left, step.seconds))
        state.note(step.name, status=status, code=code, seconds=round(seconds, 1), log=str(log))
        print(f"{name}: {step.name}: {status} in {seconds:.1f} s" + (f" (exit {code})" if code else ""), flush=True)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines[-step.show :] if status == "ok" else lines[-40:]:
            print(f"    {line}")
        all_done = all_done and status == "ok"
    return all_done


def probe(python: str) -> dict[str, Any]:
    """What the machine has, found out in a process of its own, as importing torch takes memory and time."""
    command = [python, "-m", "benchmarks.gpu.probe", "--json"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
            check=True,
        )  # fmt: skip
        facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", "") or ""
        raise SystemExit(f"gpu: {python} cannot run the probe: {error}\n{said[-2000:]}") from None
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="make gpu", description="Everything that needs a GPU, in sections.")
    parser.add_argument("--section", nargs="+", choices=ORDER, default=list(ORDER))
    parser.add_argument("--dry", action="store_true", help="on any machine: toy sizes, on the CPU, rows kept apart")
    parser.add_argument("--fresh", action="store_true", help="forget what is done of these sections")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds for each section")
    parser.add_argument(
        "--out", type=Path, default=None, help="state, logs, profiles (out/gpu, with --dry out/gpu-dry)"
    )
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args(arguments)
    args.out = (args.out or ROOT / "out" / ("gpu-dry" if args.dry else "gpu")).resolve()
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    facts = probe(args.python)
    if not args.dry and facts["gpu"] is None:
        print(f"gpu: {facts['problem']}; `make gpu DRY=1` tries every section without a GPU", file=sys.stderr)
        return 2
    if facts["packages"]["torch"] is None:
        print("gpu: torch is not installed for " + args.python, file=sys.stderr)
        return 2
    (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if "env" in args.section:
        print(describe(facts))
    context = Context(python=args.python, dry=args.dry, facts=facts, out=args.out)
    mark, unfinished = fingerprint(facts, args.dry), []
    for name in [name for name in ORDER if name in args.section]:
        started = time.monotonic()
        done = section(name, context, args, mark)
        print(f"{name}: {'done' if done else 'NOT DONE'}, {time.monotonic() - started:.0f} s\n", flush=True)
        if not done:
            unfinished.append(name)
    if unfinished:
        print(
            f"not done: {', '.join(unfinished)}; logs in {args.out / 'logs'}; SECTION={unfinished[0]} make gpu goes on"
        )
        return 1
    print("all sections done" if set(args.section) == set(ORDER) else f"done: {', '.join(args.section)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
