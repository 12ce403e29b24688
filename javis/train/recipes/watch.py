"""Seeing a run: a progress bar, TensorBoard (and Weights & Biases), samples with their sync score."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from javis.console import output
from javis.errors import FailedError, UsageError
from javis.flow import NUM_TIMESTEPS
from javis.model.dit import JavisDiT
from javis.train.recipes.task import BINS, FlowModule

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline

log = logging.getLogger("javis.train")
SLOTS = 16  # frames of a contact sheet


class Watcher:
    """A callback of the engine that does nothing; the others override what they need."""

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """See `javis.train.engine.Callback`."""

    def on_sample(self, step: int, module: nn.Module) -> None:
        """See `javis.train.engine.Callback`."""

    def on_save(self, step: int, folder: Path) -> None:
        """See `javis.train.engine.Callback`."""

    def close(self) -> None:
        """The run is over, finished or not."""


class Progress(Watcher):
    """A bar with the time that is left, clips a second and losses, on a terminal; otherwise a line for each log.

    Args:
        steps: of the whole run. clips: of all processes in a step.
    """

    def __init__(self, label: str, steps: int, clips: int) -> None:
        self.label, self.steps, self.clips = label, steps, clips
        self.last: tuple[int, float] | None = None
        self.bar: Any = None
        self.task: Any = None

    def clips_per_second(self, step: int, now: float) -> float | None:
        """Since the last call; None for the first one."""
        last, self.last = self.last, (step, now)
        if last is None or now <= last[1]:
            return None
        return (step - last[0]) * self.clips / (now - last[1])

    def on_log(self, step: int, values: dict[str, float]) -> None:
        speed = self.clips_per_second(step, time.perf_counter())
        if speed is not None:
            values["clips_per_second"] = speed
        losses = "  ".join(f"{name} {values[name]:.4f}" for name in ("loss", "video", "audio") if name in values)
        told = losses + ("" if speed is None else f"  {speed:.3g} clips/s")
        if self._bar():
            self.bar.update(self.task, completed=step, told=told)
        else:
            output(stderr=True).print(f"{self.label} {step}/{self.steps}  {told}")

    def _bar(self) -> bool:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        if self.bar is None and console.is_terminal:
            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[told]}"),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.steps, told="")
        return self.bar is not None

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Board(Watcher):
    """Scalars, timesteps and samples to TensorBoard and, if asked for, to Weights & Biases.

    Args:
        folder: for TensorBoard's events; None: not written.
        module: whose histogram of timesteps is shown.
        project: of Weights & Biases; None: not used.
        resolved: the configuration of the run.

        out: folder in which Weights & Biases makes its own; None: the working directory.

    Raises:
        UsageError: ``project`` is given and the package wandb is not installed, or begins no run (no login, say).
    """

    def __init__(
        self,
        folder: Path | None,
        module: FlowModule,
        *,
        project: str | None = None,
        resolved: Mapping[str, Any] = {},
        out: Path | None = None,
    ) -> None:
        self.folder, self.module = folder, module
        self.writer: Any = None
        self.run: Any = None
        if project is not None:
            self.run = _begin_wandb(project, resolved, out)

    def _writer(self, step: int) -> Any:
        """TensorBoard's writer; what an earlier, killed run wrote after ``step`` is dropped."""
        if self.writer is None and self.folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                log.warning("no TensorBoard events are written: pip install tensorboard (or --no-tensorboard)")
                self.folder = None
                return None
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
        return self.writer

    def on_log(self, step: int, values: dict[str, float]) -> None:
        scalars = {f"train/{name}": value for name, value in values.items()}
        width = NUM_TIMESTEPS / BINS
        found = self.module.histogram.take()
        for stream, seen in found.items():
            for i, loss in enumerate(seen["losses"]):
                if loss is not None:
                    scalars[f"loss_by_timestep/{stream}_{i * width:04.0f}"] = loss
        self._scalars(step, scalars)
        writer = self._writer(step)
        if writer is not None:
            for stream, seen in found.items():
                if seen["timesteps"]:
                    writer.add_histogram(f"timesteps/{stream}", np.array(seen["timesteps"]), step)
            writer.flush()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        writer = self._writer(step)
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if self.run is not None:
            self.run.log(scalars, step=step)

    def sample(self, step: int, number: int, sheet: Path, prompt: str, score: float) -> None:
        """A sample that was made: its contact sheet and sync score."""
        from matplotlib.image import imread

        self._scalars(step, {f"samples/sync_score_{number}": score})
        writer = self._writer(step)
        if writer is not None:
            picture = imread(sheet)[..., :3]
            writer.add_image(f"samples/{number}", picture, step, dataformats="HWC")
            writer.add_text(f"samples/{number}", prompt, step)
            writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def _begin_wandb(project: str, resolved: Mapping[str, Any], out: Path | None) -> Any:
    """A run of Weights & Biases. Raises `UsageError` if there can be none."""
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"--wandb {project}: the package wandb is not installed; pip install wandb") from error
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # it would take a temporary folder instead of one that is not there
    try:
        return wandb.init(project=project, config=dict(resolved), dir=None if out is None else str(out))
    except wandb.Error as error:
        raise UsageError(
            f"--wandb {project}: {error}; log in with 'wandb login', or set WANDB_MODE=offline and send the run later"
        ) from error


class Samples(Watcher):
    """Clips of fixed prompts and seeds, as contact sheets in ``folder`` with their sync score.

    Args:
        every: steps between samples (the engine calls at the end of a run, too, where there are none).
        options: of the call of the pipeline (steps, seconds, ...).
    """

    def __init__(
        self,
        pipe: JavisPipeline,
        folder: Path,
        prompts: Sequence[str],
        *,
        every: int,
        rank: int = 0,
        board: Board | None = None,
        options: Mapping[str, Any] = {},
    ) -> None:
        self.pipe, self.folder, self.prompts = pipe, folder, list(prompts)
        self.every, self.rank, self.board, self.options = every, rank, board, dict(options)
        self.scores: dict[int, list[float]] = {}

    def on_sample(self, step: int, module: nn.Module) -> None:
        if not self.every or self.rank or not self.prompts:
            return
        from javis.contact_sheet import contact_sheet
        from javis.eval.sync_score import sync_score

        assert isinstance(module, FlowModule)
        pipe = copy.copy(self.pipe)
        pipe.model, pipe.student, pipe.denoiser = module.model, None, None
        pipe.set_progress_bar_config(disable=True)
        try:
            clips = pipe(self.prompts, seed=0, **self.options)
        except (FailedError, torch.cuda.OutOfMemoryError) as error:  # training goes on
            log.warning("no samples at step %d: %s", step, error)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scores[step] = []
        for i, prompt in enumerate(self.prompts):
            video, audio = clips.video[i], clips.audio[i]
            score = sync_score(video, audio, clips.fps, clips.sample_rate)
            sheet = self.folder / f"step_{step:07d}_{i}.png"
            title = f"step {step}: {prompt} (sync score {score:.2f})"
            contact_sheet(sheet, video, audio, clips.fps, clips.sample_rate, title=title, slots=SLOTS)
            self.scores[step].append(score)
            if self.board is not None:
                self.board.sample(step, i, sheet, prompt, score)


def copied(model: JavisDiT) -> JavisDiT:
    """The model on the CPU with memory of its own: gathered weights are views of what FSDP2 holds.

    ``state_dict`` of what FSDP2 divided has the shards, even where the weights are gathered; its parameters are whole.
    """
    with torch.device("meta"):
        made = JavisDiT(model.config)
    state = {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}
    made.load_state_dict(state, assign=True)
    return made


class Export(Watcher):
    """At the last step: the checkpoint folder of a finished stage, with the averaged weights, in ``folder``."""

    def __init__(self, pipe: JavisPipeline, folder: Path, steps: int, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.pipe, self.folder, self.steps, self.facts, self.rank = pipe, folder, steps, dict(facts), rank

    def on_sample(self, step: int, module: nn.Module) -> None:
        if step < self.steps or self.rank:
            return
        assert isinstance(module, FlowModule)
        pipe = copy.copy(self.pipe)
        pipe.model, pipe.student = copied(module.model), None
        described = {name: value for name, value in pipe.description.items() if name != "student"}
        if "model" in described:  # of a small checkpoint; a full-size one keeps it beside the weights
            described["model"] = module.model.config.to_dict()
        pipe.description = described | {"training": self.facts | {"steps": step}}
        pipe.save_pretrained(self.folder, overwrite=True)
        log.info("checkpoint: %s", self.folder)
