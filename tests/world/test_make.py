"""Sets on disk: contents, determinism, resuming, refusals, no half files."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from javis.errors import FailedError, UsageError
from javis.world import WorldConfig, parse_prompt, render_audio, render_video, sample_scene
from javis.world import make as make_module
from javis.world.make import make
from javis.world.sheet import contact_sheet, log_spectrogram

SHORT = WorldConfig(size=48, fps=12, seconds=1.0)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_files_hold_the_scene(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    soundfile = pytest.importorskip("soundfile")
    done = []
    result = make(tmp_path, 3, 7, progress=lambda n, total: done.append((n, total)))
    assert (result.written, result.skipped, done) == (3, 0, [(1, 3), (2, 3), (3, 3)])
    with (tmp_path / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        scene = sample_scene(int(row["seed"]))
        assert json.loads((tmp_path / row["truth"]).read_text()) == scene.truth()
        assert parse_prompt(row["text"]) == [source.clause for source in scene.sources]
        with av.open(str(tmp_path / row["video"])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name in ("vp9", "libvpx-vp9") and not container.streams.audio
            frames = list(container.decode(stream))
        assert [float(frame.time) for frame in frames] == pytest.approx(scene.config.frame_times().tolist(), abs=1e-3)
        error = np.stack([f.to_ndarray(format="rgb24") for f in frames]) - render_video(scene).astype(float)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 33
        audio, rate = soundfile.read(str(tmp_path / row["audio"]), dtype="float32")
        assert rate == 16000 and np.abs(audio - render_audio(scene)).max() < 1e-4


def test_same_seed_same_files_and_longer_sets_extend(tmp_path: Path) -> None:
    make(tmp_path / "a", 4, 1, SHORT)
    make(tmp_path / "b", 2, 1, SHORT)
    result = make(tmp_path / "b", 4, 1, SHORT)
    assert (result.written, result.skipped) == (2, 2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make(tmp_path / "c", 4, 2, SHORT)
    assert contents(tmp_path / "a")["clip_000000.wav"] != contents(tmp_path / "c")["clip_000000.wav"]


def test_only_unfinished_clips_are_made_again(tmp_path: Path) -> None:
    make(tmp_path, 4, 1, SHORT)
    whole = contents(tmp_path)
    (tmp_path / "clip_000001.json").unlink()
    (tmp_path / "clip_000002.json").write_bytes(b"\x00broken")
    (tmp_path / "clip_000003.mp4").unlink()
    assert make(tmp_path, 4, 1, SHORT).written == 3
    assert contents(tmp_path) == whole


def test_interrupted_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_module.os, "replace", full)
    with pytest.raises(FailedError, match="No space left"):
        make(tmp_path, 2, 1, SHORT)
    monkeypatch.undo()
    assert contents(tmp_path) == {}

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 4, 1, SHORT, progress=interrupt)
    assert {Path(name).stem for name in contents(tmp_path)} == {"clip_000000", "clip_000001"}
    assert make(tmp_path, 4, 1, SHORT).skipped == 2


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    for count in (0, -3, 1.5, True, 2_000_000):
        with pytest.raises(UsageError, match="count"):
            make(tmp_path / "new", count, 0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="seed"):
        make(tmp_path / "new", 2, -1)
    assert not (tmp_path / "new").exists()
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for path in (blocked, blocked / "below"):
        with pytest.raises(UsageError, match="cannot write"):
            make(path, 1, 0)
    make(tmp_path / "set", 1, 0, SHORT)
    with pytest.raises(UsageError, match="another seed"):
        make(tmp_path / "set", 1, 1, SHORT)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        make(tmp_path, 1, 0)


def test_spectrogram_shows_a_tone_where_it_is() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    tone[:8000] = 0
    levels = log_spectrogram(tone, 16000)
    frequencies = np.geomspace(150, 7000, 96)
    assert frequencies[levels[:, 187].argmax()] == pytest.approx(1000, rel=0.05)
    assert levels[:, 187].max() == pytest.approx(0, abs=1.5) and levels[:, 60].max() == -70


def test_contact_sheet_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    contact_sheet(tmp_path / "sheet.png", [sample_scene(seed) for seed in range(3)])
    data = (tmp_path / "sheet.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(FailedError, match="cannot write"):
        contact_sheet(tmp_path / "missing" / "sheet.png", [sample_scene(0)])
