"""What experiments share: their context, points of generated clips, figures with intervals, cells of tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from javis.console import progress_bar
from javis.errors import UsageError
from javis.media import atomic_file

if TYPE_CHECKING:
    from javis.eval.steps_points import Point, Setting
    from javis.eval.steps_prompts import Prompt
    from javis.pipeline import JavisPipeline

Figure = Mapping[str, float]  # "value" with the ends "low" and "high" of its 95 % interval
Row = Mapping[str, Any]
TEACHER: Literal["teacher"] = "teacher"


@dataclass(frozen=True)
class Context:
    """What an experiment is given.

    Attributes:
        checkpoint: folder or "demo"; its teacher makes the clips.
        prior_checkpoint: folder of a checkpoint whose estimator kept its embedding network, or None.
        count: of prompts or clips; an experiment says of what.
        steps: evaluations of the model for a clip.
        out: folder for what was measured, clip by clip, and for pictures.
    """

    checkpoint: str
    prior_checkpoint: str | None
    count: int
    seed: int
    steps: int
    batch_size: int
    out: Path
    environment: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def pipe(self) -> JavisPipeline:
        from javis.pipeline import JavisPipeline

        return JavisPipeline.from_pretrained(self.checkpoint)

    @cached_property
    def form(self) -> dict[str, Any]:
        """Arguments of the ``WorldConfig`` of this checkpoint's clips."""
        return {"size": self.pipe.size, "fps": self.pipe.fps, "sample_rate": self.pipe.sample_rate}

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Held-out prompts of :func:`javis.eval.steps_prompts.prompts`."""
        from javis.eval.steps_prompts import prompts
        from javis.world import WorldConfig

        return prompts(self.count, self.seed, config=WorldConfig(**self.form))

    def point(self, setting: Setting, pipe: Any = None) -> Point:
        """Clips of all prompts at a setting, measured; those that a file in ``out`` has are not made again."""
        from javis.eval.steps_points import PointFile, make_point, variant_fingerprint

        fingerprint = variant_fingerprint(self.checkpoint, TEACHER)
        key = {"count": self.count, "seed": self.seed, "split": "held_out", **self.form}
        folder = self.out / "clips"
        folder.mkdir(parents=True, exist_ok=True)
        file = PointFile(folder, setting, fingerprint, key)
        done = 0
        with progress_bar(setting.label, len(self.prompts)) as advance:

            def progress(more: int) -> None:
                nonlocal done
                done += more
                advance(done)

            return make_point(
                pipe or self.pipe,
                file,
                self.prompts,
                batch_size=self.batch_size,
                alone=0,
                environment=self.environment,
                progress=progress,
            )


def needed(prior_checkpoint: str | None) -> str:
    """The name of the checkpoint.

    Raises:
        UsageError: there is none.
    """
    if prior_checkpoint is None:
        raise UsageError(
            "alignment and negatives need a trained estimator with its embedding network; "
            "'javis train prior --out DIR' makes --prior-checkpoint DIR/checkpoint"
        )
    return prior_checkpoint


# --- figures --------------------------------------------------------------------------------------------------------


def as_figure(found: tuple[float, float, float] | None, digits: int = 4) -> dict[str, float] | None:
    """(value, low, high) as json."""
    if found is None:
        return None
    return dict(zip(("value", "low", "high"), (round(float(x), digits) for x in found), strict=True))


def excludes(figure: Figure | None, level: float = 0.0) -> bool:
    """Whether all of the interval lies on one side of ``level``."""
    return figure is not None and (figure["low"] > level or figure["high"] < level)


def cell(figure: Figure | None, digits: int = 3, name: str = "value", *, sign: bool = False) -> str:
    """``0.812 [0.790, 0.834]``; "-" for what is undefined."""
    if figure is None or figure.get(name) is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{figure[name]:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, all or nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def bars(axes: Any, names: Sequence[str], figures: Sequence[Figure | None], title: str, level: float | None) -> None:
    """Values with their intervals as points on one line each; ``level`` is drawn dashed."""
    for place, figure in enumerate(figures):
        if figure is not None and figure.get("value") is not None:
            middle = figure.get("corrected", figure["value"])
            axes.plot([figure["low"], figure["high"]], [place, place], color="#4a6fa5", linewidth=2)
            axes.plot([middle], [place], "o", color="#1b2a41")
    if level is not None:
        axes.axvline(level, color="#c0392b", linestyle="--", linewidth=1)
    axes.set(yticks=range(len(names)), yticklabels=names, title=title, ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
