"""Scenes: who is where, what moves how, what sounds when; a pure function of a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from javis.errors import UsageError
from javis.world import language, plan
from javis.world import vocabulary as v
from javis.world.motion import Float, Motion
from javis.world.synth import TIMBRE_PARTIALS, draw_pitch

Split = Literal["train", "held_out", "any"]
BACKGROUNDS = ((24, 26, 36), (34, 28, 26), (22, 33, 31), (35, 26, 35), (29, 31, 25))
RADII = {"small": 0.088, "large": 0.125}  # frame sides
MIN_PITCH_DISTANCE = 5.0  # semitones between the fundamentals of two sources
MIN_PARTIAL_DISTANCE = 2.5  # semitones between the fundamental of one source and the strong partials of the other


@dataclass(frozen=True)
class WorldConfig:
    """Format of the clips.

    Raises:
        UsageError: a value outside the ranges in which scenes can be drawn.
    """

    size: int = 64  # pixels, square
    fps: float = 16
    seconds: float = 2.0
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        limits = {"size": (16, 1024), "fps": (4, 120), "seconds": (0.5, 60), "sample_rate": (8000, 96000)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            whole = name in ("size", "sample_rate")
            right = isinstance(value, int) if whole else isinstance(value, (int, float))
            if isinstance(value, bool) or not right or not low <= value <= high:
                raise UsageError(f"world {name} {value!r}: expected a {'whole ' * whole}number from {low} to {high}")

    @property
    def frames(self) -> int:
        """Frames of a clip; frame i shows the instant i / fps."""
        return max(1, round(self.seconds * self.fps))

    @property
    def samples(self) -> int:
        """Audio samples of a clip."""
        return round(self.seconds * self.sample_rate)

    def frame_times(self) -> np.ndarray:
        """Instants that the frames show, float64 [frames], seconds."""
        return np.arange(self.frames) / self.fps


@dataclass(frozen=True)
class Event:
    """A contact, flash or ring."""

    time: float  # seconds
    strength: float  # 0.2..1


@dataclass(frozen=True)
class Source:
    """One thing that is seen, heard or both. Lengths are in frame sides."""

    shape: str
    colour: str | None
    size: str
    material: str | None  # None where no material is heard (flashes, floats)
    motion: str
    side: str | None
    visible: bool
    audible: bool
    events: tuple[Event, ...]
    f0: float | None  # fundamental, Hz; None for what is silent
    radius: float
    path: Motion | None = field(repr=False)  # None for what is unseen

    @property
    def timbre(self) -> str | None:
        """wooden, metal, glass or electronic; None for what is silent."""
        if not self.audible:
            return None
        return "electronic" if self.motion == "flashes" else self.material

    @property
    def pitch_class(self) -> str | None:
        """low (large things) or high (small things); None for what is silent."""
        return ("low" if self.size == "large" else "high") if self.audible else None

    @property
    def clause(self) -> dict[str, Any]:
        """Caption attributes, as ``parse_prompt`` gives them."""
        return {name: getattr(self, name) for name in v.ATTRIBUTES}


@dataclass(frozen=True)
class Scene:
    """Everything that the renderer, the synthesiser and the caption need."""

    config: WorldConfig
    seed: int
    sources: tuple[Source, ...]
    background: tuple[int, int, int]

    @property
    def events(self) -> list[tuple[float, int, float]]:
        """(time in seconds, source index, strength) of all events that are heard, in order of time."""
        return sorted((e.time, i, e.strength) for i, s in enumerate(self.sources) for e in s.events)

    def truth(self) -> dict[str, Any]:
        """Ground truth as plain json values; see docs/world.md. Positions are centres in pixels, one for each frame."""
        times = self.config.frame_times()
        sources = []
        for source in self.sources:
            centres = None
            if source.path is not None:
                pose = source.path.pose(times)
                centres = np.round(np.stack([pose.x, pose.y], 1) * self.config.size, 3).tolist()
            sources.append(
                {
                    **source.clause,
                    "timbre": source.timbre,
                    "pitch_class": source.pitch_class,
                    "f0_hz": None if source.f0 is None else round(source.f0, 3),
                    "radius_px": round(source.radius * self.config.size, 3),
                    "events": [{"time_s": round(e.time, 6), "strength": round(e.strength, 4)} for e in source.events],
                    "centre_px": centres,
                }
            )
        return {
            "format": 1,
            "seed": self.seed,
            "config": asdict(self.config),
            "caption": " and ".join(language.clause_text(source.clause) for source in self.sources),
            "held_out": is_held_out(self),
            "sources": sources,
        }


def is_held_out(scene: Scene | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> bool:
    """True if any source of the scene (or the clause, or any of the clauses) is a combination held out of training."""
    if isinstance(scene, Scene):
        return any(v.clause_is_held_out(source.clause) for source in scene.sources)
    clauses = [scene] if isinstance(scene, Mapping) else scene
    return any(v.clause_is_held_out(clause) for clause in clauses)


def caption(scene: Scene, *, drop: float = 0.0, rng: np.random.Generator | None = None) -> str:
    """Caption of a scene. It names attributes, never times.

    Args:
        scene: the scene.
        drop: probability of leaving out each of size, material and place (half of it for the colour), so that a model
            also learns short prompts.
        rng: needed if ``drop`` > 0.
    """
    clauses = [source.clause for source in scene.sources]
    if drop > 0:
        if rng is None:
            raise UsageError("caption with drop > 0 needs rng, a numpy Generator")
        clauses = [language.drop_attributes(clause, drop, rng) for clause in clauses]
    return " and ".join(language.clause_text(clause) for clause in clauses)


def sample_scene(
    seed: int, config: WorldConfig | None = None, *, sources: int | None = None, split: Split = "any"
) -> Scene:
    """Draw a scene; a pure function of its arguments.

    Args:
        seed: >= 0.
        config: format of the clip, ``WorldConfig()`` by default.
        sources: 1 or 2 sources that are both seen and heard; None draws the mix: 55 % one, 30 % two, 5 % with an unseen
            bell (half of them beside a silent object), 10 % one silent object.
        split: "train" has no held-out combination, "held_out" has at least one, "any" does not care.

    Raises:
        UsageError: an argument outside these.
    """
    if sources not in (None, 1, 2):
        raise UsageError(f"sources {sources!r}: expected 1, 2 or None")
    if split not in ("train", "held_out", "any"):
        raise UsageError(f"split {split!r}: expected 'train', 'held_out' or 'any'")
    rng = _generator(seed, {"train": 1, "held_out": 2, "any": 3}[split], sources or 0)
    # The kind is drawn once, so that the mix does not depend on how often a draw is refused.
    wanted = _draw_kind(rng) if sources is None else [_seen_and_heard() for _ in range(sources)]
    while split == "held_out" and not any(clause["visible"] for clause in wanted):
        wanted = _draw_kind(rng)
    while True:
        clauses = _complete(wanted, rng)
        if clauses is not None and (split == "any" or is_held_out(clauses) == (split == "held_out")):
            return _place(clauses, seed, config or WorldConfig(), rng)


def scene_from_prompt(prompt: str | Sequence[Mapping[str, Any]], seed: int, config: WorldConfig | None = None) -> Scene:
    """Draw a scene that a prompt (or its parsed clauses) describes; what it leaves open is random.

    Raises:
        UsageError: the prompt does not parse, or no scene of the world can show it (two objects in one place).
    """
    clauses = language.parse_prompt(prompt) if isinstance(prompt, str) else [dict(clause) for clause in prompt]
    rng = _generator(seed, 4, len(clauses))
    for _ in range(2000):
        completed = _complete(clauses, rng)
        if completed is not None:
            return _place(completed, seed, config or WorldConfig(), rng)
    raise UsageError(
        f"no scene fits {' and '.join(map(language.clause_text, clauses))!r}; two objects need different sides (left "
        "and right if one swings), different colours, and sounds that can be told apart"
    )


def _generator(seed: int, *stream: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"seed {seed!r}: expected a whole number >= 0")
    return np.random.Generator(np.random.PCG64([int(seed), *stream]))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _seen_and_heard() -> dict[str, Any]:
    return {**dict.fromkeys(v.ATTRIBUTES), "visible": True, "audible": True}


def _draw_kind(rng: np.random.Generator) -> list[dict[str, Any]]:
    silent = {**_seen_and_heard(), "motion": "floats", "audible": False}
    bell = {**_seen_and_heard(), "shape": v.BELL, "motion": v.RINGS, "visible": False}
    draw = rng.random()
    if draw < 0.55:
        return [_seen_and_heard()]
    if draw < 0.85:
        return [_seen_and_heard(), _seen_and_heard()]
    if draw < 0.875:
        return [bell]
    return [silent, bell] if draw < 0.90 else [silent]


def _complete(clauses: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]] | None:
    """Fill what is open at random and draw pitches; None if two sources could not be told apart."""
    done = []
    for given in clauses:
        clause = dict(given)
        if clause["motion"] is None:
            motions = v.STRIKING if clause["material"] else v.MOTIONS[:4]
            clause["motion"] = _pick(rng, motions)
        clause["size"] = clause["size"] or _pick(rng, v.SIZES)
        if clause["visible"]:
            clause["shape"] = clause["shape"] or _pick(rng, v.SHAPES)
            clause["colour"] = clause["colour"] or _pick(rng, v.COLOURS)
            clause["side"] = clause["side"] or _pick(rng, v.SIDES)
        if clause["motion"] in (*v.STRIKING, v.RINGS):
            clause["material"] = clause["material"] or _pick(rng, v.MATERIALS)
        timbre = "electronic" if clause["motion"] == "flashes" else clause["material"]
        clause["timbre"] = timbre if clause["audible"] else None
        clause["f0"] = draw_pitch(timbre, clause["size"], clause["shape"], rng) if clause["audible"] else None
        done.append(clause)
    return done if len(done) < 2 or _distinct(done[0], done[1]) else None


def _distinct(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a["visible"] and b["visible"]:
        if a["side"] == b["side"] or a["colour"] == b["colour"]:
            return False
        if "swings" in (a["motion"], b["motion"]) and "middle" in (a["side"], b["side"]):
            return False
    if a["f0"] is None or b["f0"] is None:
        return True
    if abs(_semitones(a["f0"], b["f0"])) < MIN_PITCH_DISTANCE:
        return False
    return all(
        abs(_semitones(one["f0"], other["f0"] * partial.ratio)) >= MIN_PARTIAL_DISTANCE
        for one, other in ((a, b), (b, a))
        for partial in TIMBRE_PARTIALS[other["timbre"]][1:]
        if partial.amplitude >= 0.2
    )


def _semitones(a: float, b: float) -> float:
    return 12 * math.log2(a / b)


def _place(clauses: list[dict[str, Any]], seed: int, config: WorldConfig, rng: np.random.Generator) -> Scene:
    """Draw motions until the event rules hold."""
    heard = sum(clause["audible"] for clause in clauses)
    rules = plan.EventRules.of(config.seconds, heard)
    sources: list[Source] = []
    for attempt in range(20000):
        if len(sources) == len(clauses):
            break
        source = _draw_source(clauses[len(sources)], rules, rng)
        if source is not None and all(
            abs(e.time - f.time) >= plan.MIN_CROSS_GAP for other in sources for e in other.events for f in source.events
        ):
            sources.append(source)
        elif attempt % 50 == 49:
            sources = []  # the first source may leave no room for the second
    else:
        raise RuntimeError(f"no motion found for seed {seed} in {config}: the event rules leave no room")
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(config, int(seed), tuple(sources), background)


def _draw_source(clause: Mapping[str, Any], rules: plan.EventRules, rng: np.random.Generator) -> Source | None:
    radius = RADII[clause["size"]] * rng.uniform(0.95, 1.05)
    kind, side, shape = clause["motion"], clause["side"], clause["shape"]
    path: Motion | None = None
    if kind == v.RINGS:
        times = plan.plan_rings(rng, rules)
        if times is None:
            return None
        events = tuple(Event(t, float(rng.uniform(0.5, 1.0))) for t in times)
    elif kind == "floats":
        path, events = plan.plan_float(rng, side, radius), ()
    else:
        path = _PLANS[kind](rng, rules, side, shape, radius)
        if path is None or isinstance(path, Float):
            return None
        # A flash is always equally bright, so its beep is always equally loud.
        strengths = getattr(path, "strengths", (0.8,) * len(path.times))
        events = tuple(Event(float(t), float(s)) for t, s in zip(path.times, strengths, strict=True))
    fields = {name: clause[name] for name in v.ATTRIBUTES}
    return Source(**fields, events=events, f0=clause["f0"], radius=radius, path=path)


_PLANS: dict[str, Any] = {
    "bounces": plan.plan_bounce,
    "swings": plan.plan_swing,
    "knocks": plan.plan_knock,
    "flashes": plan.plan_flash,
}
