"""Caches across denoising steps: parts of the model that change little from one evaluation to the next are re-used.

`CachedDenoiser` stands where the model does in :func:`javis.sample.sample`. Three kinds (`CacheConfig`):

first-block  The first layer is always computed. Where what it adds to a stream has changed by less than the stream's
             threshold since the other layers were last computed, what those added then is added again (ParaAttention).
tea          The relative change of the first layer's modulated input, rescaled by a fitted polynomial, is summed over
             the evaluations since the layers were last computed. Below the threshold all layers are left out, and what
             they added then is added again (TeaCache, arXiv 2411.19108).
attention    Outputs of temporal self-attention, of the priors' and of the captions' cross-attention, before their
             gates, are computed in every n-th evaluation (Pyramid Attention Broadcast, arXiv 2408.12588).

Picture and sound decide for themselves. They meet in the bidirectional attention of every layer: a stream that is
computed while the other one is not gets what this attention gave it when both were last computed.

A clip decides for itself, too: clips that decide differently are computed together, and each keeps what it would have
by itself, so that none depends on the batch. What a guided clip's two halves decide is one decision.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from javis.cache_options import ATTENTIONS, CacheConfig, CacheKind, parse_cache
from javis.errors import UsageError
from javis.model.blocks import Held, Stream
from javis.model.dit import Conditioning, JavisDiT, StepStart, Velocity
from javis.sample.graph import GraphedDenoiser

STREAMS: tuple[Stream, ...] = get_args(Stream)
OTHER: dict[Stream, Stream] = {"video": "audio", "audio": "video"}
# Conditionings whose state is kept: the halves of guidance may be evaluated together or only the conditional one.
KEPT = 2


def why_not(model: Any) -> str | None:
    """Why the evaluations of this model cannot be cached, or None."""
    if isinstance(model, GraphedDenoiser):
        return "a cache decides in every step what is computed, and a CUDA graph replays one decision; use one of them"
    if not isinstance(model, JavisDiT):
        return (
            f"a cache decides by the values of all tokens, and a {type(model).__name__} holds a share of them in each "
            "process; use one of them"
        )
    return None


@dataclass
class _Kept:
    """What one stream keeps. Tensors are [B, N, C]; lists hold one entry per clip."""

    signal: Tensor | None = None  # what changes are measured by
    added: Tensor | None = None  # by the layers that can be left out
    received: dict[int, Tensor] = field(default_factory=dict)  # by layer: from the other stream
    change: list[float] = field(default_factory=list)  # summed since the layers were computed
    reused: list[int] = field(default_factory=list)  # times in a row


@dataclass
class _State:
    """What is kept of the evaluations with one conditioning."""

    condition: weakref.ref[Conditioning]
    kind: tuple[Any, ...]  # shapes, dtypes and device of what is evaluated
    masks: tuple[Tensor | None, ...]
    time: float
    streams: dict[Stream, _Kept] = field(default_factory=lambda: {name: _Kept() for name in STREAMS})
    held: dict[tuple[int, Stream], dict[str, Held]] = field(default_factory=dict)  # by layer and stream, then by block
    age: dict[tuple[Stream, str], int] = field(default_factory=dict)  # evaluations since an attention was computed


class CachedDenoiser:
    """A model that re-uses parts of its last evaluations; a stand-in for it in :func:`javis.sample.sample`.

    What is kept belongs to one clip: it is dropped when there is another conditioning, when the timestep goes up, and
    when sizes or condition masks change. At most two conditionings are followed side by side.

    Memory beside the model's: of each stream that can be re-used, two tensors [B, N, C] ("first-block", "tea"), and of
    each stream that can be computed alone one per layer; "attention": one per layer and kind of attention.

    Args:
        model: in eval mode.
        config: what is re-used. Where that is nothing, ``denoise`` is the model's own.
        clips: rows i, i + clips, i + 2 clips ... of a batch belong to one clip (guidance) and decide as one. None:
            every row decides for itself.

    Raises:
        UsageError: a model that this cannot be combined with (:func:`why_not`).
    """

    def __init__(self, model: JavisDiT, config: CacheConfig, *, clips: int | None = None) -> None:
        if not config.exact and (reason := why_not(model)) is not None:
            raise UsageError(reason)
        self.model, self.cache, self.clips = model, config, clips
        self._states: list[_State] = []
        # Per stream and clip, or per stream and attention: what was computed and what would have been without a cache.
        self._computed: dict[tuple[Stream, Any], list[int]] = {}

    @property
    def config(self) -> Any:
        return self.model.config

    def reset(self) -> None:
        """Forget everything that is kept."""
        self._states.clear()

    def report(self, clip: int = 0) -> dict[str, Any]:
        """The cache, its settings, and by stream what share of it was computed for a clip, as json values.

        "computed" is the share of the layers ("first-block", "tea"), or for each kind of attention the share of the
        evaluations. Layers of a guided evaluation are those of both its halves.
        """

        def share(name: Stream, key: Any) -> float:
            done, every = self._computed.get((name, key), (1, 1))
            return round(done / every, 4)

        computed: dict[str, Any] = {name: share(name, clip) for name in STREAMS}
        if self.cache.kind == "attention":
            computed = {name: {kind: share(name, kind) for kind in ATTENTIONS} for name in STREAMS}
        return self.cache.describe() | {"computed": computed}

    @torch.no_grad()
    def denoise(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        condition: Conditioning,
        *,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Velocity:
        """As :meth:`javis.model.dit.JavisDiT.denoise`; carries no gradients.

        Raises:
            ValueError: as from the model; samples at different timesteps; a batch that is no multiple of ``clips``.
        """
        more = {} if end is None else {"end": end}
        if self.cache.exact:
            return self.model.denoise(
                video, audio, timestep, condition, video_mask=video_mask, audio_mask=audio_mask, **more
            )
        clips = len(video) if self.clips is None else self.clips
        if len(video) % clips:
            raise ValueError(f"{len(video)} samples are no multiple of the {clips} clips that the cache was made for")
        with self.model.step_context():
            start = self.model.begin(video, audio, timestep, condition, video_mask, audio_mask, **more)
            state = self._state(start, timestep, condition, (video_mask, audio_mask))
            if self.cache.kind == "attention":
                x = self._with_held(start, condition, state)
            else:
                x = self._with_residuals(start, condition, state, clips)
            return self.model.finish(x["video"], x["audio"], start, video, audio, timestep, condition)

    def _state(
        self, start: StepStart, timestep: Tensor, condition: Conditioning, masks: tuple[Tensor | None, ...]
    ) -> _State:
        """What is kept of this clip; a new state if it is another one, or begins anew."""
        times = timestep.tolist()
        if min(times) != max(times):
            raise ValueError(f"a cache needs one timestep for all samples, got {min(times)} to {max(times)}")
        kind = tuple((x.shape, x.dtype, x.device) for x in (start.video, start.audio))
        found = None
        for state in [state for state in self._states if state.condition() is not None]:
            if state.condition() is condition:
                found = state
        self._states = [s for s in self._states if s.condition() is not None and s is not found][-(KEPT - 1) :]
        if found is None or found.kind != kind or times[0] > found.time or not _same(found.masks, masks):
            kept = tuple(None if mask is None else mask.clone() for mask in masks)
            found = _State(weakref.ref(condition), kind, kept, times[0])
        found.time = times[0]
        self._states.append(found)
        return found

    def _count(self, key: tuple[Stream, Any], computed: int, every: int) -> None:
        count = self._computed.setdefault(key, [0, 0])
        count[0] += computed
        count[1] += every

    # -- residuals of the layers --------------------------------------------------------------------------------------

    def _with_residuals(
        self, start: StepStart, condition: Conditioning, state: _State, clips: int
    ) -> dict[Stream, Tensor]:
        model, depth = self.model, self.model.config.depth
        first = 1 if self.cache.kind == "first-block" else 0
        x: dict[Stream, Tensor] = {"video": start.video, "audio": start.audio}
        for number in range(first):
            for name in STREAMS:
                x[name] = model.stream(name, number, x[name], start, condition)
            x["video"], x["audio"] = model.meet(number, x["video"], x["audio"], condition)
        reuse = self._decide(start, x, state, clips)
        rows = {name: _rows(reuse[name], x[name]) for name in STREAMS}
        for name in STREAMS:
            for clip, reused in enumerate(reuse[name]):
                copies = len(x[name]) // clips
                self._count((name, clip), copies * (first if reused else depth), copies * depth)
        running = [name for name in STREAMS if not all(reuse[name])]
        before = dict(x)
        for number in range(first, depth):
            for name in running:
                x[name] = model.stream(name, number, x[name], start, condition)
            self._meet(number, x, running, rows, condition, state)
        for name in STREAMS:
            own, again = state.streams[name], rows[name]
            if name not in running:
                assert own.added is not None
                x[name] = before[name] + own.added
            elif self._threshold(name) > 0:
                added = x[name] - before[name]
                if again is not None:
                    assert own.added is not None
                    added = torch.where(again, own.added, added)
                    x[name] = torch.where(again, before[name] + added, x[name])
                own.added = added
        return x

    def _meet(
        self,
        number: int,
        x: dict[Stream, Tensor],
        running: list[Stream],
        rows: dict[Stream, Tensor | None],
        condition: Conditioning,
        state: _State,
    ) -> None:
        """The bidirectional attention where both streams are computed, else what it gave when both last were."""
        if len(running) == 1:
            received = state.streams[running[0]].received.get(number)
            if received is not None:  # none: this model has no such attention
                x[running[0]] = x[running[0]] + received
        if len(running) < len(STREAMS):
            return
        met = dict(zip(STREAMS, self.model.meet(number, x["video"], x["audio"], condition), strict=True))
        either = [again for again in rows.values() if again is not None]  # rows in which a stream is not computed
        apart = either[0] | either[-1] if either else None
        for name in STREAMS:
            if self._threshold(OTHER[name]) > 0 and met[name] is not x[name]:
                kept, received = state.streams[name].received, met[name] - x[name]
                if apart is not None:
                    received = torch.where(apart, kept[number], received)
                    met[name] = torch.where(apart, x[name] + received, met[name])
                kept[number] = received
            x[name] = met[name]

    def _threshold(self, name: Stream) -> float:
        return self.cache.video if name == "video" else self.cache.audio

    def _decide(self, start: StepStart, x: dict[Stream, Tensor], state: _State, clips: int) -> dict[Stream, list[bool]]:
        """For each stream and clip, whether its layers are left out; ``x``: the streams where that would begin."""
        tea, signals, found = self.cache.kind == "tea", {}, {}
        for name in STREAMS:
            if self._threshold(name) == 0:
                continue
            tokens = start.video if name == "video" else start.audio
            signals[name] = modulated_input(self.model, name, start) if tea else x[name] - tokens
            if (last := state.streams[name].signal) is not None:
                found[name] = relative_change(signals[name], last, clips)
        # One wait for the device, for both streams.
        values = torch.stack([*found.values()]).tolist() if found else []
        changes = dict(zip(found, values, strict=True))
        reuse = {name: [False] * clips for name in STREAMS}
        for name, signal in signals.items():
            own = state.streams[name]
            if name in changes:
                reuse[name] = self._below(name, own, changes[name])
            else:
                own.change, own.reused = [0.0] * clips, [0] * clips
            again = None if tea else _rows(reuse[name], signal)
            # first-block compares with the evaluation whose layers are re-used, tea with the last one
            own.signal = signal if again is None or own.signal is None else torch.where(again, own.signal, signal)
        return reuse

    def _below(self, name: Stream, own: _Kept, changes: list[float]) -> list[bool]:
        """Decisions of a stream from the relative changes of its clips; one that is not a number is no small change."""
        reuse = []
        for clip, change in enumerate(changes):
            if self.cache.kind == "tea":
                powers = self.cache.video_polynomial if name == "video" else self.cache.audio_polynomial
                rescaled = 0.0
                for power in powers:
                    rescaled = rescaled * change + power
                change = own.change[clip] + (rescaled if not rescaled < 0 else 0.0)
            again = change < self._threshold(name) and (self.cache.most is None or own.reused[clip] < self.cache.most)
            own.change[clip] = change if again else 0.0
            own.reused[clip] = own.reused[clip] + 1 if again else 0
            reuse.append(again)
        return reuse

    # -- outputs of attentions ----------------------------------------------------------------------------------------

    def _with_held(self, start: StepStart, condition: Conditioning, state: _State) -> dict[Stream, Tensor]:
        within = self.cache.low <= state.time <= self.cache.high
        for name in STREAMS:
            for attention, every in self.cache.every(name).items():
                self._hold(name, attention, every if within else 1, state)
        x: dict[Stream, Tensor] = {"video": start.video, "audio": start.audio}
        for number in range(self.model.config.depth):
            for name in STREAMS:
                held = state.held.get((number, name))
                x[name] = self.model.stream(name, number, x[name], start, condition, held)
            x["video"], x["audio"] = self.model.meet(number, x["video"], x["audio"], condition)
        return x

    def _hold(self, name: Stream, attention: str, every: int, state: _State) -> None:
        """Make ready what the layers keep of one kind of attention: as it is, to be computed, or nothing."""
        age = state.age.get((name, attention))
        again = age is not None and age + 1 < every
        self._count((name, attention), 0 if again else 1, 1)
        if again:
            assert age is not None
            state.age[name, attention] = age + 1
            return
        if every > 1:
            state.age[name, attention] = 0
        else:
            state.age.pop((name, attention), None)
        for number in range(self.model.config.depth):
            blocks = state.held.setdefault((number, name), {"spatial": {}, "temporal": {}, "prior": {}})
            for block, output in _PLACES[attention]:
                if every > 1:
                    blocks[block][output] = None
                else:
                    blocks[block].pop(output, None)


# By kind of attention: blocks and the names of their outputs (javis/model/blocks.py).
_PLACES = {
    "temporal": (("temporal", "attention"),),
    "prior": (("prior", "spatial"), ("prior", "temporal")),
    "text": (("spatial", "text"), ("temporal", "text")),
}


def modulated_input(model: JavisDiT, name: Stream, start: StepStart) -> Tensor:
    """What enters the first self-attention of a stream, [B, N, C]: the signal of "tea"."""
    layer: Any = model.layers[0]
    if name == "video":
        return layer.video_spatial.modulated(start.video, start.video_step)
    return layer.audio_spatial.modulated(start.audio, start.audio_step)


def relative_change(new: Tensor, old: Tensor, clips: int) -> Tensor:
    """``mean |new - old| / mean |old|`` of rows [B, N, C], the largest among the rows of each clip -> [clips].

    Summed in float32 at least. Not a number where both are zero.
    """
    wide = torch.promote_types(new.dtype, torch.float32)
    difference = (new.to(wide) - old.to(wide)).abs().mean((1, 2))
    return (difference / old.to(wide).abs().mean((1, 2))).view(-1, clips).amax(0)


def _rows(reuse: list[bool], like: Tensor) -> Tensor | None:
    """Decisions of the clips -> bool [B, 1, 1] for the rows of a batch; None if none re-uses anything."""
    if not any(reuse):
        return None
    return torch.tensor(reuse * (len(like) // len(reuse)), device=like.device)[:, None, None]


def _same(old: tuple[Tensor | None, ...], new: tuple[Tensor | None, ...]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or (a.shape == b.shape and torch.equal(a, b)))
        for a, b in zip(old, new, strict=True)
    )


__all__ = [
    "CacheConfig",
    "CacheKind",
    "CachedDenoiser",
    "modulated_input",
    "parse_cache",
    "relative_change",
    "why_not",
]
