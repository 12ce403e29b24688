"""The command line: ``javis COMMAND ...``.

Exit codes: 0 done; 1 failed; 2 unusable arguments or input; 130 interrupted. Errors are one line on stderr: what was
wrong, what was expected, what to do. With ``JAVIS_TRACEBACK=1`` the traceback is shown instead.

A command is an argument dataclass and a function; both are loaded when the command is called, so that ``javis --help``
and errors in the arguments do not wait for torch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import tyro

import javis
from javis.console import one_line, output, progress_bar
from javis.errors import FailedError, UsageError
from javis.host_memory import ask_for_huge_pages

Run = Callable[[Any], "int | None"]


# -- the commands: arguments, then what they do -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DoctorArgs:
    """Say what is installed, which devices are there, and which backend of each op would run here."""

    json: bool = False
    """Print the same as JSON."""


def _doctor(args: DoctorArgs) -> None:
    from rich.console import Console

    from javis import doctor

    facts = doctor.collect()
    if args.json:
        output().print(json.dumps(facts, indent=1))
    else:
        doctor.render(facts, Console())


@dataclass(frozen=True, kw_only=True)
class WorldMakeArgs:
    """Write clips of the synthetic world with their truth: mp4 (VP9), wav and json each, and manifest.csv."""

    directory: tyro.conf.Positional[Path]
    """Folder for the clips; finished ones are skipped."""
    count: int = 100
    """Number of clips."""
    seed: int = 0
    """Same seed, same clips."""
    size: int = 64
    """Pixels, square."""
    fps: float = 16.0
    """Frames per second."""
    seconds: float = 2.0
    """Length of a clip."""
    sources: Literal["any", "1", "2"] = "any"
    """Sounding objects in a clip."""
    split: Literal["any", "train", "held_out"] = "any"
    """Combinations that training may see, those it may not, or all."""
    json: bool = False
    """Print what was done as JSON."""


def _world_make(args: WorldMakeArgs) -> None:
    from javis.world import WorldConfig
    from javis.world.make import make

    config = WorldConfig(size=args.size, fps=args.fps, seconds=args.seconds)
    with progress_bar("making clips", args.count) as advance:
        result = make(
            args.directory,
            args.count,
            args.seed,
            config,
            sources=None if args.sources == "any" else int(args.sources),
            split=args.split,
            progress=lambda done, _: advance(done),
        )
    if args.json:
        facts = {"directory": str(result.directory), "written": result.written, "skipped": result.skipped}
        output().print(json.dumps(facts, indent=1))
    else:
        output().print(f"{result.directory}: {result.written} clips written, {result.skipped} were there already")


def _from(arguments: str, run: str | None = None) -> Callable[[], tuple[type, Run]]:
    """Load a command's dataclass, "module:name"; ``run`` is its function, if that is not ``main`` of the same module.

    The function's module is loaded when the arguments have been read: unusable ones do not wait for it.
    """
    module, name = arguments.split(":")
    run_module, run_name = (run or f"{module}:main").split(":")

    def call(args: Any) -> int | None:
        found: int | None = getattr(importlib.import_module(run_module), run_name)(args)
        return found

    return lambda: (getattr(importlib.import_module(module), name), call)


def _bench_kernels() -> tuple[type, Run]:
    from rich.console import Console

    from javis.bench import BenchConfig, render, run

    return BenchConfig, lambda config: render(run(config), Console())


@dataclass(frozen=True)
class Command:
    """``load`` returns the argument dataclass and the function that takes it."""

    summary: str
    load: Callable[[], tuple[type, Run]]


COMMANDS: dict[str, Command] = {
    "sample": Command("make a clip with sound from a prompt, or many from a CSV file", _from("javis.clips:SampleArgs")),
    "plan": Command(
        "tokens, FLOPs and memory of a clip before making it", _from("javis.plan_args:PlanArgs", "javis.plan:main")
    ),
    "convert": Command(
        "official checkpoints into the folders of a javis checkpoint", _from("javis.convert.command:ConvertArgs")
    ),
    "fit-schedule": Command(
        "timesteps of few steps that come nearest to many, for a checkpoint",
        _from("javis.fit_schedule:FitScheduleArgs"),
    ),
    "doctor": Command("what is installed here, and which backends would run", lambda: (DoctorArgs, _doctor)),
    "world make": Command("clips of the synthetic world, with truth", lambda: (WorldMakeArgs, _world_make)),
    "data make": Command("a manifest of the clips in a folder tree", _from("javis.data.make_manifest:MakeArgs")),
    "data check": Command(
        "the data doctor: what is wrong with the clips of a manifest", _from("javis.data.doctor:CheckArgs")
    ),
    "data shard": Command(
        "clips of a manifest in tar files, local or at a URL", _from("javis.data.shard_command:ShardArgs")
    ),
    "data encode": Command(
        "latents and hidden states of a manifest's clips, stored for training",
        _from("javis.data.encode_command:EncodeArgs"),
    ),
    "train demo": Command(
        "train the built-in model from nothing", _from("javis.train.config:DemoTrainConfig", "javis.train.demo:main")
    ),
    "train audio": Command(
        "stage 1: the audio branch, from the video branch's weights",
        _from("javis.train.recipes.config:AudioRecipe", "javis.train.recipes.run:main"),
    ),
    "train joint": Command(
        "stage 3: what joins picture and sound",
        _from("javis.train.recipes.config:JointRecipe", "javis.train.recipes.run:main"),
    ),
    "train overfit": Command(
        "self test: learn one clip by heart and get it back", _from("javis.train.recipes.overfit:OverfitArgs")
    ),
    "train prior": Command(
        "stage 2: the prior estimator, against asynchronous twins",
        _from("javis.train.prior_recipe:PriorRecipe", "javis.train.prior_run:main"),
    ),
    "train distill": Command(
        "few-step students of a checkpoint",
        _from("javis.train.distill_config:DistillConfig", "javis.train.distill:main"),
    ),
    "eval sync": Command(
        "how well picture and sound agree, for a folder of clips", _from("javis.eval.folder:SyncArgs")
    ),
    "eval validate": Command(
        "are offsets found and damaged clips ranked lower: the measures of synchrony against planted truth",
        _from("javis.eval.validate_command:EvalValidateArgs"),
    ),
    "eval world": Command(
        "score a checkpoint on held-out prompts of the synthetic world", _from("javis.eval.world_command:EvalWorldArgs")
    ),
    "eval steps": Command(
        "quality against steps on held-out prompts, teacher and student",
        _from("javis.eval.steps_command:EvalStepsArgs"),
    ),
    "eval negatives": Command(
        "which asynchronous twins of clips a prior estimator tells apart",
        _from("javis.eval.negatives_command:EvalNegativesArgs"),
    ),
    "eval javisbench": Command(
        "JavisBench's metrics on samples of its prompts, by category",
        _from("javis.eval.javisbench.command:JavisBenchArgs"),
    ),
    "eval gate": Command(
        "does a checkpoint still do what was recorded of it", _from("javis.eval.gate_command:EvalGateArgs")
    ),
    "eval experiments": Command(
        "do priors matter, what does attention see, and more (docs/experiments.md)",
        _from("javis.eval.experiments.command:ExperimentsArgs"),
    ),
    "report": Command(
        "one page of a training run, of clips or of an evaluation", _from("javis.report.command:ReportArgs")
    ),
    "bench kernels": Command("microbenchmarks of the ops", _bench_kernels),
}

# What the design names, but this version does not have.
LATER: dict[str, str] = {
    "bench ladder": "the latency ladder (issue 4)",
}


# -- running one of them ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises but for bugs with ``JAVIS_TRACEBACK=1``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = bool(os.environ.get("JAVIS_TRACEBACK"))
    if arguments[:1] != ["bench"]:
        # OpenMP's threads wait for each other by spinning. Where something else wants the cores that is ruinous: four
        # steps took 38 s beside a training run, and 2.5 s with this. It works only before torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ask_for_huge_pages()
    try:
        with _terminate_politely():
            return _run(arguments)
    except (UsageError, FailedError) as error:
        if traceback:
            raise
        return _complain(str(error), 2 if isinstance(error, UsageError) else 1)
    except _Terminated:
        return _complain("terminated; what was finished is kept, nothing is half-written", 143)
    except KeyboardInterrupt as error:
        return _complain(f"interrupted; {error}" if str(error) else "interrupted; nothing is half-written", 130)
    except BrokenPipeError:
        # Whoever read our output has closed it (javis ... | head); Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if traceback:
            raise
        return _complain(f"failed: {error}; check the disk and the permissions", 1)
    except MemoryError:
        return _complain("out of memory; try a smaller --batch-size or a shorter clip", 1)
    except Exception as error:  # broad on purpose: the outermost frame, where a bug becomes one line and exit code 1
        if traceback:
            raise
        name = type(error).__name__
        return _complain(f"failed: {name}: {error} (this is a bug; JAVIS_TRACEBACK=1 shows where)", 1)


def _complain(message: str, code: int) -> int:
    output(stderr=True).print(f"javis: {one_line(message)}")
    return code


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        output().print(f"javis {javis.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        output().print(_usage())
        return 0 if arguments else 2
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            config_class, run = COMMANDS[name].load()
            config = parse(config_class, f"javis {name}", arguments[words:])
            return 0 if config is None else run(config) or 0
        if name in LATER:
            raise UsageError(f"'javis {name}' is not in javis {javis.__version__}; it comes with {LATER[name]}")
    below = [name for name in COMMANDS if name.split()[0] == arguments[0]]
    if below and arguments[1:2] and arguments[1] in ("-h", "--help"):
        output().print(_usage(below))
        return 0
    expected = " or ".join(f"'javis {name}'" for name in below) if below else f"one of {', '.join(COMMANDS)}"
    given = " ".join(arguments[: 2 if below else 1])[:60]
    raise UsageError(f"there is no command 'javis {given}'; expected {expected}")


def _usage(names: Sequence[str] | None = None) -> str:
    names = names or list(COMMANDS)
    lines = [f"  {name:15s}{COMMANDS[name].summary}" for name in names]
    first = f"javis {javis.__version__}: joint audio and video generation\n\nusage: javis COMMAND ...\n\n"
    return first + "\n".join(lines) + '\n\n"javis COMMAND --help" tells the arguments of a command.'


def parse(config_class: type, program: str, arguments: Sequence[str]) -> Any:
    """Arguments as ``config_class``; None if help was asked for and printed.

    Raises:
        UsageError: what tyro found wrong, as one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_class, prog=program, args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        dashed = any(word.startswith("-") and " " in word for word in arguments)
        hint = "; a text that begins with a dash goes after '--'" if dashed else ""
        raise UsageError(f"{_unbox(said.getvalue())}{hint}; '{program} --help' tells what is expected") from None


def _unbox(text: str) -> str:
    """The first section of tyro's framed message as one line."""
    section: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        bare = line.strip("│╭╮╰╯─ \t")
        if section and "──" in line:
            break
        if bare and "╭" not in line:
            section.append(bare)
    return " ".join(section).rstrip(".") or "unusable arguments"


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


@contextlib.contextmanager
def _terminate_politely() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # signals belong to the main thread; elsewhere there is nothing to do
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
