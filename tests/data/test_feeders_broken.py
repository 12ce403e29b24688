"""Feeders and what goes wrong: broken files, hangs, crashes, ends, memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from javis.data.dali_pipeline import DecodedClips
from javis.data.excerpt import EncodedExcerpt, ExcerptRequest
from javis.data.feed import MediaBatch
from javis.data.manifest import Manifest
from javis.errors import FailedError, UsageError

from .feeding import BACKENDS, CLIPS, assert_same, feeder, needs_dali
from .media import ramp, row, world_rows, write_wav


@pytest.fixture
def with_broken(world: Path, tmp_path: Path) -> tuple[Manifest, dict[int, str]]:
    """World clips, six of them broken, and what is wrong with each."""
    rows = list(world_rows(world, CLIPS).rows)
    video = Path(rows[0].path).read_bytes()
    noisy = bytearray(video)
    noisy[len(video) // 3 : len(video) // 3 + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / "cut.mp4").write_bytes(video[: len(video) // 2])
    (tmp_path / "noisy.mp4").write_bytes(noisy)
    (tmp_path / "noise.wav").write_bytes(np.random.default_rng(1).bytes(3000))
    write_wav(tmp_path / "short.wav", ramp(0.3, 16000), 16000)
    write_wav(tmp_path / "nan.wav", np.full(32000, np.nan, np.float32), 16000)
    sound = rows[0].audio_path
    broken = [
        (tmp_path / "none.mp4", sound, "cannot be read: No such file"),
        (tmp_path / "cut.mp4", sound, "cannot be decoded"),
        (tmp_path / "noisy.mp4", sound, "cannot be decoded"),
        (rows[0].path, tmp_path / "noise.wav", "cannot be decoded"),
        (rows[0].path, tmp_path / "short.wav", "sound is missing for"),
        (rows[0].path, tmp_path / "nan.wav", "sound has values that are not finite"),
    ]
    reasons = {}
    for number, (path, audio, reason) in enumerate(broken):
        reasons[len(rows)] = reason
        rows.append(row(path, audio, 100 + number))
    return Manifest(tuple(rows)), reasons


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_clips_are_skipped_named_and_replaced(
    with_broken: tuple[Manifest, dict[int, str]], backend: str
) -> None:
    manifest, reasons = with_broken
    with feeder(manifest, backend, num_frames=32, batch=3) as feed:
        batches = [*feed, *feed]
        skipped = list(feed.skipped)
        state = feed.state_dict()
    assert len(batches) == 8 and all(len(batch.indices) == 3 for batch in batches)
    assert set(i for batch in batches for i in batch.indices) == set(range(CLIPS))
    assert {clip.index for clip in skipped} == set(reasons) and len(skipped) == len(reasons)
    for clip in skipped:
        assert clip.path == manifest[clip.index].path
        assert reasons[clip.index].split("|")[0] in clip.reason
    with feeder(manifest, backend, num_frames=32, batch=3) as feed:  # substitutes are part of the order
        for expected in batches[:4]:
            assert_same(next(feed), expected)
    with feeder(manifest, backend, num_frames=32, batch=3) as feed:
        feed.load_state_dict(state)
        assert {clip.index for clip in feed.skipped} == set(reasons)


def test_a_clip_that_is_known_to_be_broken_is_not_tried_again(world: Path) -> None:
    with feeder(world_rows(world, CLIPS), "pyav") as feed:
        feed.load_state_dict(feed.state_dict() | {"broken": {"2": "took longer than 60 s"}})
        seen = {i for batch in [*feed, *feed] for i in batch.indices}
        assert seen == {0, 1, 3, 4, 5}
        assert [(clip.index, clip.reason) for clip in feed.skipped] == [(2, "took longer than 60 s")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_broken_clips_is_an_error(with_broken: tuple[Manifest, dict[int, str]], backend: str) -> None:
    manifest = Manifest(with_broken[0].rows[CLIPS:])
    with (
        feeder(manifest, backend, num_frames=32) as feed,
        pytest.raises(FailedError, match=r"6 of 6 clips cannot be used.*'javis data check'"),
    ):
        next(feed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_never_answers_is_skipped(world: Path, tmp_path: Path, backend: str) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # whoever opens it for reading waits for a writer
    rows = (*world_rows(world, 3).rows, row(tmp_path / "pipe.mp4", world / "clip_000000.wav", 9))
    began = time.monotonic()
    with feeder(Manifest(rows), backend, workers=1, timeout=3, batch=4) as feed:
        batch = next(feed)
        # The process may be killed once for each batch that was begun before the first one found out.
        assert [(clip.index, clip.reason) for clip in feed.skipped] == [(3, "took longer than 3 s")]
    assert set(batch.indices) <= {0, 1, 2} and len(batch.indices) == 4
    assert time.monotonic() - began < 60


def test_a_decoder_that_crashes_takes_no_one_with_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from javis.data import feed_workers

    def crash(worker: feed_workers._Worker, timeout: float, *job: object) -> object:
        if job[0] == "decode" and job[1].path.endswith("clip_000002.mp4"):  # type: ignore[attr-defined]
            os.kill(worker.process.pid or 0, 11)
        return ask(worker, timeout, *job)

    ask = feed_workers._Worker.ask
    monkeypatch.setattr(feed_workers._Worker, "ask", crash)
    with feeder(world_rows(world, 4), "pyav", workers=1, batch=4) as feed:
        batch = next(feed)
        assert [(clip.index, clip.reason) for clip in feed.skipped] == [(2, "made the decoder crash (SIGSEGV)")]
    assert set(batch.indices) == {0, 1, 3}


@needs_dali
def test_dali_that_hangs_is_left_behind(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from javis.data.dali_pipeline import DaliDecoder

    released = threading.Event()

    def decode(self: DaliDecoder, clips: Sequence[tuple[ExcerptRequest, EncodedExcerpt]]) -> DecodedClips:
        if any(str(request.path).endswith("clip_000001.mp4") for request, _ in clips):
            released.wait(60)
        return real(self, clips)

    real = DaliDecoder._decode
    monkeypatch.setattr(DaliDecoder, "_decode", decode)
    with feeder(world_rows(world, 3), "dali", batch=3, timeout=1) as feed:
        batch = next(feed)
        assert [(clip.index, clip.reason) for clip in feed.skipped] == [(1, "took longer than 3 s")]
    released.set()
    assert len(batch.indices) == 3 and set(batch.indices) == {0, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_processes_end_with_the_feeder(world: Path, backend: str) -> None:
    for close in (True, False):
        feed = feeder(world_rows(world, 4), backend, workers=2, batch=4)
        next(feed)
        processes = [worker.process for worker in feed.workers._workers]
        assert processes and all(process.is_alive() for process in processes)
        if close:
            feed.close()
        else:
            feed.rest()
            del feed  # forgotten: the same
            gc.collect()
        for process in processes:
            process.join(20)
            assert not process.is_alive()


def test_a_closed_feeder_says_so(world: Path) -> None:
    feed = feeder(world_rows(world, 2), "pyav")
    next(feed)
    feed.close()
    feed.close()
    with pytest.raises(UsageError, match="the feeder is closed"):
        next(feed)
    assert feed.state_dict()["batch"] == 1


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_epochs(world: Path, backend: str) -> None:
    def epochs(feed: Iterator[MediaBatch], count: int) -> int:
        for _ in range(count):
            for _batch in feed:
                pass
        gc.collect()
        return resident()

    with feeder(world_rows(world, CLIPS), backend, height=128, width=128) as feed:
        epochs(feed, 4)
        before = epochs(feed, 1)
        after = epochs(feed, 12)
        one = 2 * 16 * 128 * 128 * 3
        # Thirty-six batches of which not even eight are kept; allocators breathe a little.
        assert after - before < 8 * one
