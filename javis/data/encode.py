"""Clips of a manifest as latents and hidden states on disk: ``javis data encode``.

    OUT/plan.json               what is encoded, with what, into which sizes; written first
    OUT/latents-000000.safetensors
    OUT/latents-000000.json     record: sha256, size, captions and ids, clips that were skipped
    OUT/index.json              all shards with the sha256 of both files; written last

Files appear when they are complete, so a kill at any moment loses one shard's work at most. Read in this order:
`EncodePlan`, `encode_manifest`, `_ShardBuilder`; reading is in latent_source.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from javis.data.buckets import BucketPlan
from javis.data.encoders import Encoders
from javis.data.excerpt import ExcerptRequest, decode_excerpt
from javis.data.manifest import Manifest
from javis.data.shards import ShardedManifest
from javis.data.store import Store
from javis.data.workers import Failure, default_processes, isolated_map
from javis.errors import FailedError, UsageError

FORMAT, VERSION = "javis latents", 1
INDEX, PLAN = "index.json", "plan.json"
Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """Sizes of the clips, and how they are stored."""

    num_frames: int
    height: int
    width: int
    fps: float
    sample_rate: int = 16000
    buckets: BucketPlan | None = None  # sizes and lengths by bucket instead of those above
    random_start: bool = False  # the excerpt of a longer file begins anywhere (by seed and id), not at the beginning
    sample: bool = False  # latents are samples of the codecs' posteriors, as the official code trains; else means
    seed: int = 0
    batch: int = 4  # clips encoded together
    shard_clips: int = 64
    dtype: Dtype = "float16"  # of what is stored
    audio_gap: float = 0.25  # seconds of sound that may be missing from an excerpt; they are silent then

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "sample_rate", "batch", "shard_clips"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be a whole number above 0, got {value!r}")
        if not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise UsageError(f"fps must be above 0 and at most 1000, got {self.fps}")
        if self.dtype not in get_args(Dtype):
            raise UsageError(f"unknown dtype {self.dtype!r}; expected one of {', '.join(get_args(Dtype))}")
        if self.buckets is not None and self.buckets.fps not in (None, self.fps):
            raise UsageError(f"the buckets are for {self.buckets.fps:g} fps and the plan for {self.fps:g}")

    def facts(self) -> dict[str, Any]:
        """As json."""
        return asdict(self) | {"buckets": None if self.buckets is None else str(self.buckets)}


class Shape(NamedTuple):
    """Size of a clip."""

    num_frames: int
    height: int
    width: int


class Job(NamedTuple):
    """One shard: clips of one shape."""

    number: int
    shape: Shape
    indices: tuple[int, ...]  # rows of the manifest

    @property
    def name(self) -> str:
        return f"latents-{self.number:06d}"


class SkippedClip(NamedTuple):
    """A clip that has no latents."""

    id: str
    path: str
    reason: str


class Encoded(NamedTuple):
    """What `encode_manifest` did."""

    clips: int
    shards: int
    written: int
    there_already: int
    damaged: tuple[str, ...]  # shards that were there, were not what they had been, and are encoded again
    skipped: tuple[SkippedClip, ...]
    without_bucket: int
    is_finished: bool  # False: other shares have not written all of theirs


def encode_manifest(
    manifest: Manifest,
    out: str | os.PathLike[str],
    encoders: Encoders,
    plan: EncodePlan,
    *,
    share: int = 0,
    shares: int = 1,
    processes: int | None = None,
    timeout: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Encode the clips of a manifest; a second call goes on where the first stopped, and repairs damaged shards.

    A clip that cannot be decoded, or whose caption cannot be encoded, is skipped and named.

    Args:
        manifest: the clips. out: folder or fsspec URL.
        encoders: `javis.data.encoders.load_encoders`.
        share, shares: this process makes every ``shares``-th shard; the last one to finish writes the index.
        processes: that decode; None: one per core. timeout: seconds for decoding one clip.
        progress: called with (clips done, clips in all).

    Raises:
        UsageError: ``out`` holds latents of other clips, sizes or encoders; no clip fits.
        FailedError: latents that are not finite, or no clip could be encoded at all.
    """
    if not 0 <= share < shares:
        raise UsageError(f"share {share} must be within 0..{shares - 1}")
    store = Store(out)
    jobs, without_bucket = plan_jobs(manifest, plan)
    if not jobs:
        raise UsageError(f"no clip fits the buckets {plan.buckets}; give smaller ones")
    store.prepare()
    _claim(store, manifest, encoders, plan)
    mine = jobs[share::shares]
    states = {job: _state(store, job) for job in mine}
    damaged = [job.name for job in mine if states[job] == "damaged"]
    pending = [job for job in mine if states[job] != "finished"]
    clips = sum(len(job.indices) for job in mine)
    done = clips - sum(len(job.indices) for job in pending)
    if progress is not None:
        progress(done, clips)
    requests = [_request(manifest, plan, job, index) for job in pending for index in job.indices]
    count = min(processes or default_processes(), max(1, len(requests)))
    answers = _in_order(isolated_map(decode_excerpt, requests, processes=count, timeout=timeout))
    for job in pending:
        builder = _ShardBuilder(manifest, encoders, plan, job)
        for index in job.indices:
            builder.add(index, next(answers))
            done += 1
            if progress is not None:
                progress(done, clips)
        builder.write(store)
    written_index = _write_index(store, jobs)
    skipped = [SkippedClip(**told) for job in mine for told in (store.read_json(f"{job.name}.json") or {})["skipped"]]
    if written_index is not None and not written_index["clips"]:
        raise FailedError(f"none of {len(skipped)} clips could be encoded; the first: {skipped[0].reason}")
    written = len(pending)
    return Encoded(
        clips - len(skipped), len(mine), written, len(mine) - written, tuple(damaged), tuple(skipped), without_bucket,
        written_index is not None,
    )  # fmt: skip


def plan_jobs(manifest: Manifest, plan: EncodePlan) -> tuple[list[Job], int]:
    """The shards, and how many clips no bucket takes. Depends on the manifest and the plan alone."""
    places: dict[Shape, list[int]] = {}
    without = 0
    for index, row in enumerate(manifest):
        shape = Shape(plan.num_frames, plan.height, plan.width)
        if plan.buckets is not None:
            bucket = BucketPlan(plan.buckets.buckets, plan.fps).assign(row, plan.seed)
            if bucket is None:
                without += 1
                continue
            shape = Shape(bucket.num_frames, *bucket.size(row))
        places.setdefault(shape, []).append(index)
    parts = [
        (shape, tuple(places[shape][start : start + plan.shard_clips]))
        for shape in sorted(places)
        for start in range(0, len(places[shape]), plan.shard_clips)
    ]
    return [Job(number, *part) for number, part in enumerate(parts)], without


def _request(manifest: Manifest, plan: EncodePlan, job: Job, index: int) -> ExcerptRequest:
    row = manifest[index]
    path, audio_path = (
        (row.path, row.audio_path) if not isinstance(manifest, ShardedManifest) else manifest.slices(index)
    )
    start = 0.0
    if plan.random_start:
        told = hashlib.blake2b(f"{plan.seed}\0{row.id}".encode(), digest_size=8).digest()
        start = int.from_bytes(told, "big") / 2**64
    return ExcerptRequest(
        path=path, audio_path=audio_path, num_frames=job.shape.num_frames, height=job.shape.height,
        width=job.shape.width, fps=plan.fps, sample_rate=plan.sample_rate, start=start, audio_gap=plan.audio_gap,
    )  # fmt: skip


def _in_order(answers: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Answers in the order of their items; as many wait as there are workers."""
    waiting: dict[int, Any] = {}
    following = 0
    for index, answer in answers:
        waiting[index] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1


# -- what is there ----------------------------------------------------------------------------------------------------


def _claim(store: Store, manifest: Manifest, encoders: Encoders, plan: EncodePlan) -> None:
    """Write what the folder is for, or check that it is for this."""
    # Without the paths: a data set may be moved between two calls.
    told = [(row.id, row.relpath, row.num_frames, row.height, row.width, row.fps, row.text) for row in manifest]
    rows = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    facts = {
        "format": FORMAT, "version": VERSION, "plan": plan.facts(), "manifest_sha256": rows, "clips": len(manifest),
        "encoders": encoders.identity,
    }  # fmt: skip
    facts = json.loads(json.dumps(facts))
    there = store.read_json(PLAN)
    if there is None:
        store.write_json(PLAN, facts)
    elif there != facts:
        other = next((name for name in facts if there.get(name) != facts[name]), "format")
        what = {"manifest_sha256": "clips", "clips": "clips", "encoders": "encoders", "plan": "settings"}
        raise UsageError(
            f"{store.where} holds latents of other {what.get(other, 'formats')}; choose another place or remove it"
        )


def _state(store: Store, job: Job) -> Literal["missing", "damaged", "finished"]:
    record = store.read_json(f"{job.name}.json")
    if record is None:
        return "missing"
    if record.get("clips") and store.sha256(f"{job.name}.safetensors") != record.get("sha256"):
        return "damaged"
    return "finished"


def _write_index(store: Store, jobs: Sequence[Job]) -> dict[str, Any] | None:
    """Write the index if all shards are there; returns it."""
    shards: list[dict[str, Any]] = []
    for job in jobs:
        record = store.read_json(f"{job.name}.json")
        if record is None:
            return None
        shards.append({
            "name": job.name, "clips": len(record["clips"]), "shape": list(job.shape), "sha256": record["sha256"],
            "record_sha256": store.sha256(f"{job.name}.json"), "skipped": len(record["skipped"]),
        })  # fmt: skip
    index = {
        "format": FORMAT, "version": VERSION, "clips": sum(shard["clips"] for shard in shards), "shards": shards,
    }  # fmt: skip
    store.write_json(INDEX, index)
    return index


# -- a shard ----------------------------------------------------------------------------------------------------------


class _Clip(NamedTuple):
    row: int  # of the manifest
    caption: str
    video: np.ndarray
    audio: np.ndarray


class _ShardBuilder:
    """Collects the clips of a shard, encodes them batch by batch, and writes the shard."""

    def __init__(self, manifest: Manifest, encoders: Encoders, plan: EncodePlan, job: Job) -> None:
        self.manifest, self.encoders, self.plan, self.job = manifest, encoders, plan, job
        self.waiting: list[_Clip] = []
        self.clips: list[_Clip] = []
        self.skipped: list[SkippedClip] = []
        self.parts: dict[str, list[Tensor]] = {}
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.generator: torch.Generator | None = None
        if plan.sample:  # of the shard, so that a shard does not depend on those before it
            self.generator = torch.Generator(encoders.device).manual_seed(plan.seed * 1_000_003 + job.number)

    def add(self, index: int, answer: tuple[np.ndarray, np.ndarray] | Failure) -> None:
        """Take one clip, in the order of the job."""
        if isinstance(answer, Failure):
            self._skip(index, answer.reason)
            return
        try:
            caption = self.encoders.caption(self.manifest[index].text)
        except UsageError as error:
            self._skip(index, str(error))
            return
        self.waiting.append(_Clip(index, caption, *answer))
        if len(self.waiting) == self.plan.batch:
            self._encode()

    def _skip(self, index: int, reason: str) -> None:
        row = self.manifest[index]
        self.skipped.append(SkippedClip(row.id, row.path, " ".join(reason.split())))

    def _encode(self) -> None:
        clips, self.waiting = self.waiting, []
        if not clips:
            return
        captions = [clip.caption for clip in clips]
        made = {
            "video": self.encoders.video(torch.from_numpy(np.stack([clip.video for clip in clips])), self.generator),
            "audio": self.encoders.audio(torch.from_numpy(np.stack([clip.audio for clip in clips])), self.generator),
        }
        text, mask = self.encoders.text(captions)
        prior = self.encoders.prior_text(captions)
        # What the mask hides reaches nothing but an estimator of priors, so only such texts are kept whole.
        self._add_text("text", text, mask, whole=prior is None)
        if prior is not None:
            self._add_text("prior_text", *prior, whole=True)
        for name, value in made.items():
            self._add(name, value, clips)
        self.clips += [clip._replace(video=np.empty(0), audio=np.empty(0)) for clip in clips]

    def _add(self, name: str, value: Tensor, clips: Sequence[_Clip]) -> None:
        stored = value.to(self.dtype)
        finite = torch.isfinite(stored.float()).flatten(1).all(1).tolist()
        if not all(finite):
            bad = self.manifest[clips[finite.index(False)].row].id
            hint = "use --dtype bfloat16" if bool(torch.isfinite(value.float()).all()) else "the codec is broken"
            raise FailedError(f"the {name} latents of {bad} are not finite in {self.plan.dtype}; {hint}")
        self.parts.setdefault(name, []).append(stored.cpu())

    def _add_text(self, name: str, hidden: Tensor, mask: Tensor, *, whole: bool) -> None:
        """Hidden states [B, L, C] as rows of valid tokens, one after the other."""
        lengths = mask.sum(1)
        is_prefix = bool((mask == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).all())
        hides_zeros = not bool(hidden[~mask].any())
        if not is_prefix or (whole and not hides_zeros):
            lengths = torch.full_like(lengths, mask.shape[1])
        rows = torch.cat([own[:length] for own, length in zip(hidden, lengths.tolist(), strict=True)]).to(self.dtype)
        if not bool(torch.isfinite(rows.float()).all()):
            raise FailedError(
                f"hidden states of the captions are not finite in {self.plan.dtype}; use --dtype bfloat16"
            )
        for key, value in ((name, rows), (f"{name}_lengths", lengths.int()), (f"{name}_mask", mask)):
            self.parts.setdefault(key, []).append(value.cpu())

    def write(self, store: Store) -> None:
        """Encode what is left, and write tensors and then the record."""
        from safetensors.torch import save

        self._encode()
        store.remove(f"{self.job.name}.json")  # the old record must not describe the new tensors
        data = b""
        if self.clips:
            data = save({name: torch.cat(values).contiguous() for name, values in self.parts.items()})
            with store.writing(f"{self.job.name}.safetensors") as file:
                file.write(data)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "shape": list(self.job.shape),
            "clips": [
                {"row": clip.row, "id": self.manifest[clip.row].id, "caption": clip.caption} for clip in self.clips
            ],
            "skipped": [clip._asdict() for clip in self.skipped],
        }
        store.write_json(f"{self.job.name}.json", record)
