"""Clips measured in other processes and kept in the store: which parts are missing, and what came of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from javis.eval.javisbench.config import Progress
from javis.eval.javisbench.embed import TEXT_PARTS
from javis.eval.javisbench.layouts import Sample
from javis.eval.javisbench.measure import FACTS, PEAKS, SYNC, Options, Task, measure
from javis.eval.javisbench.prompts import Problems
from javis.eval.javisbench.store import Measured, Store, identity_of
from javis.eval.optical_flow import flow_method

VERSION = 1  # of what parts hold; results of another version are measured again


class StoredClip(Mapping[str, Measured]):
    """The stored parts of one clip, read when they are asked for: json once, arrays each time (they may be large)."""

    def __init__(self, sample: Sample, store: Store, identities: Mapping[str, str]) -> None:
        self.sample = sample
        self._store = store
        self._identities = {part: i for part, i in identities.items() if store.has(part, sample.key, i)}
        self._kept: dict[str, Measured] = {}

    def __getitem__(self, part: str) -> Measured:
        if part in self._kept:
            return self._kept[part]
        found = self._store.get(part, self.sample.key, self._identities[part])
        if found is None:
            raise KeyError(part)
        if not found.arrays:
            self._kept[part] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._identities)

    def __len__(self) -> int:
        return len(self._identities)

    @property
    def faults(self) -> Mapping[str, str]:
        """What is wrong with the clip, kind -> reason; of one that was not measured, that."""
        return self[FACTS].facts["faults"] if FACTS in self else {"not measured": ""}

    @property
    def is_readable(self) -> bool:
        return FACTS in self and "unreadable" not in self.faults


@dataclass(frozen=True)
class Measuring:
    """How clips are measured: which parts, by what, and where results are kept.

    ``hashes`` has the weights' hash of each part that is an extractor.
    """

    store: Store
    parts: tuple[str, ...]
    hashes: Mapping[str, str]
    options: Options
    processes: int
    timeout: float

    def __call__(self, samples: Sequence[Sample], problems: Problems, progress: Progress) -> list[StoredClip]:
        """Measure what is not in the store, in other processes, so that no file can end this one.

        What is wrong with a clip goes to ``problems``.
        """
        from javis.data.workers import Failure, isolated_map

        tasks, todo = [], []
        for sample in samples:
            missing = [
                (part, i) for part, i in self._identities(sample).items() if not self.store.has(part, sample.key, i)
            ]
            if missing:
                tasks.append(self._task(sample, tuple(missing)))
                todo.append(sample)
        done = len(samples) - len(tasks)
        progress(done, len(samples))
        if tasks:
            processes = min(self.processes, len(tasks))
            for index, answer in isolated_map(measure, tasks, processes=processes, timeout=self.timeout):
                if isinstance(answer, Failure):
                    problems.add("not measured", todo[index].name, answer.reason)
                done += 1
                progress(done, len(samples))
        clips = [StoredClip(sample, self.store, self._identities(sample)) for sample in samples]
        for clip in clips:
            _collect(clip, problems)
        return clips

    def _identities(self, sample: Sample) -> dict[str, str]:
        """Of each part; none for a clip whose file is gone, or is one that nobody may read."""
        try:
            return {part: self._identity(sample, part) for part in self.parts}
        except OSError:
            return {}

    def _identity(self, sample: Sample, part: str) -> str:
        depends: dict[str, Any] = {"part": part, "version": VERSION, "seconds": self.options.seconds}
        if part in self.hashes:
            depends["extractor"] = self.hashes[part]
        if part in TEXT_PARTS and sample.prompt is not None:
            depends["text"] = [sample.prompt.text, sample.prompt.audio_text]
        if part == PEAKS:
            depends["flow"] = flow_method()
        if part == "imagebind":
            depends["windows"] = [self.options.window_seconds, self.options.window_overlap, self.options.protocol]
        return identity_of((sample.video, sample.audio), **depends)

    def _task(self, sample: Sample, parts: tuple[tuple[str, str], ...]) -> Task:
        text, audio_text = (None, None) if sample.prompt is None else (sample.prompt.text, sample.prompt.audio_text)
        return Task(sample.key, sample.video, sample.audio, text, audio_text, parts, self.store.folder, self.options)


def _collect(clip: StoredClip, problems: Problems) -> None:
    """Faults of the clip, and extractors that could do nothing with it."""
    name = clip.sample.name
    if FACTS not in clip:
        if name not in problems.found.get("not measured", {}):
            problems.add("not measured", name, "its file is gone or cannot be read")
        return
    for kind, reason in clip.faults.items():
        problems.add(kind, name, reason)
    for part in clip if clip.is_readable else ():
        if part not in (FACTS, SYNC, PEAKS) and "missing" in clip[part].facts:
            problems.add(f"no {part} features", name, clip[part].facts["missing"])
