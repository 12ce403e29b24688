"""The data doctor: every kind of fault is found, named and left out, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from javis import cli
from javis.data import doctor
from javis.data.doctor import examine
from javis.data.doctor_rules import KINDS, Checked, Tolerances, corrected, diagnose, duplicates
from javis.data.manifest import ClipRow, Manifest
from javis.data.probe import ClipFacts, ClipFiles, Picture, Sound, measure
from javis.errors import UsageError
from tests.data.media_files import FPS, FRAMES, RATE, SIDE, cut, pictures, tone, write_video, write_wav
from tests.data.rows import clip_row

FAST_START = {"movflags": "+faststart"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with one clip per fault; the id of a clip is the fault, or begins with "good"."""
    folder = tmp_path_factory.mktemp("zoo")
    rows: list[ClipRow] = []

    def clip(identity: str, seed: int, suffix: str = ".mp4", **changes: object) -> Path:
        row = clip_row(
            identity, path=str(folder / f"{identity}{suffix}"), height=SIDE, width=SIDE, num_frames=FRAMES, fps=FPS,
            audio_fps=RATE,
        )  # fmt: skip
        rows.append(dataclasses.replace(row, **{"audio_path": row.path, **changes}))  # type: ignore[arg-type]
        return Path(row.path)

    def beside(identity: str, seed: int, sound: np.ndarray, **changes: object) -> Path:
        """A clip whose sound is in a wav."""
        audio = str(folder / f"{identity}.wav")
        write_video(clip(identity, seed, audio_path=audio, **changes), pictures(seed=seed))
        return write_wav(Path(audio), sound, subtype="FLOAT")

    even = [Fraction(i, FPS) for i in range(FRAMES)]
    good = write_video(clip("good_mp4", 0), pictures(), tone(), options=FAST_START)
    write_video(clip("good_webm", 1, ".webm", audio_fps=48000), pictures(seed=1), tone(2, 1, 48000), codec="libvpx",
                sound_codec="libopus", rate=48000)  # fmt: skip
    beside("good_wav", 2, tone(seed=2))
    clip("missing_file", 0)
    clip("missing_sound", 0)
    write_video(folder / "missing_sound.mp4", pictures(seed=3))
    rows[-1] = dataclasses.replace(rows[-1], audio_path=str(folder / "gone.wav"))
    clip("garbage", 0).write_bytes(np.random.default_rng(0).bytes(5000))
    clip("empty", 0).write_bytes(b"")
    clip("text", 0).write_text("not a video")
    os.mkfifo(clip("pipe", 0))
    clip("folder", 0).mkdir()
    cut(good, clip("cut_mp4", 0), 0.7)
    plain = write_video(folder / "plain.mp4", pictures(seed=4), tone())
    cut(plain, clip("cut_plain", 0), 0.7)  # its index was at the end
    cut(folder / "good_webm.webm", clip("cut_webm", 0, ".webm", audio_fps=48000), 0.6)
    wav = beside("cut_wav", 5, tone(seed=5))
    cut(wav, wav, 0.9)
    beside("cut_flac", 21, tone(seed=21))
    (folder / "cut_flac.wav").unlink()
    flac = write_wav(folder / "cut_flac.flac", tone(seed=21))
    cut(flac, flac, 0.8)
    rows[-1] = dataclasses.replace(rows[-1], audio_path=str(flac))
    damaged = clip("damaged", 0)
    data = bytearray(write_video(folder / "whole.webm", pictures(seed=6), codec="libvpx-vp9").read_bytes())
    data[len(data) // 4 : len(data) // 4 + 400] = bytes(400)
    damaged.write_bytes(data)
    write_wav(folder / "damaged.wav", tone())
    rows[-1] = dataclasses.replace(rows[-1], audio_path=str(folder / "damaged.wav"))
    write_video(clip("no_audio", 0), pictures(seed=7))
    write_video(clip("unnamed_audio", 0, audio_path="", audio_fps=0), pictures(seed=8))
    beside("no_samples", 9, tone()[:0])
    beside("length_mismatch", 10, tone(1.5))
    write_video(clip("offset_mismatch", 0), pictures(seed=11), tone(), sound_start=0.25)
    # The header of a Matroska file has a frame rate of its own.
    slow = [Fraction(i, FPS) * Fraction(11, 10) for i in range(FRAMES)]
    write_video(clip("fps_drift", 0, ".mkv", fps=FPS / 1.1), pictures(seed=12), tone(2.2), stamps=slow)
    gap = [time + (Fraction(1, 4) if i > 20 else 0) for i, time in enumerate(even)]
    write_video(clip("variable_frame_rate", 0, fps=FRAMES / 2.25), pictures(seed=13), tone(2.25), stamps=gap)
    beside("silence", 14, 5e-4 * tone())
    broken = tone()
    broken[100] = np.nan
    beside("bad_samples", 15, broken)
    write_video(clip("good_twin", 0), pictures(seed=16), tone(seed=16))
    write_video(clip("same_id", 0), pictures(seed=17), tone(seed=17))
    rows[-1] = dataclasses.replace(rows[-1], id="good_twin")
    shutil.copy(good, clip("duplicate_file", 0))
    # A free box behind the rest: other bytes, the same frames and samples.
    clip("duplicate_content", 0).write_bytes(good.read_bytes() + b"\0\0\0\x08free")
    write_video(clip("no_caption", 0, text=" "), pictures(seed=18), tone(seed=18))
    write_video(clip("placeholder", 0, text="NaN"), pictures(seed=19), tone(seed=19))
    write_video(
        clip("wrong_numbers", 0, fps=25.0, num_frames=50, height=64, aspect_ratio=2.0, resolution=2048, audio_fps=8000),
        pictures(seed=20), tone(seed=20),
    )  # fmt: skip
    path = folder / "zoo.csv"
    Manifest(tuple(rows)).write(path)
    with path.open("a") as file:
        file.write("broken,broken_row\n")
    return path


EXPECTED = {
    "good_mp4": set(), "good_webm": set(), "good_wav": set(), "good_twin": {"duplicate_id"},
    "missing_file": {"missing_file"}, "missing_sound": {"missing_file"}, "pipe": {"missing_file"},
    "folder": {"missing_file"}, "garbage": {"unreadable"}, "empty": {"unreadable"}, "text": {"unreadable"},
    "cut_mp4": {"truncated", "unreadable"}, "cut_plain": {"truncated", "unreadable"}, "cut_webm": {"truncated"},
    "cut_wav": {"truncated"}, "cut_flac": {"truncated", "unreadable"}, "damaged": {"unreadable"},
    "no_audio": {"no_audio"}, "unnamed_audio": {"no_audio"},
    "no_samples": {"no_audio"}, "length_mismatch": {"length_mismatch"}, "offset_mismatch": {"offset_mismatch"},
    "fps_drift": {"fps_drift"}, "variable_frame_rate": {"variable_frame_rate"}, "silence": {"silence"},
    "bad_samples": {"bad_samples"}, "duplicate_file": {"duplicate_file"}, "duplicate_content": {"duplicate_content"},
    "no_caption": {"no_caption"}, "placeholder": {"no_caption"}, "wrong_numbers": {"wrong_numbers"},
    "broken_row": {"broken_row"},
}  # fmt: skip
CLEAN = ["good_mp4", "good_webm", "good_wav", "good_twin", "wrong_numbers"]


def test_every_fault_is_found_and_nothing_else(zoo: Path) -> None:
    before = zoo.read_bytes()
    report = examine(zoo, processes=2, timeout=60)
    found: dict[str, set[str]] = {identity: set() for identity in EXPECTED}
    for finding in report.findings:
        found[finding.id].add(finding.kind)
    assert found == EXPECTED
    assert [row.id for row in report.clean] == CLEAN
    fixed = report.clean[-1]
    assert (fixed.fps, fixed.num_frames, fixed.height, fixed.aspect_ratio, fixed.resolution, fixed.audio_fps) == (
        FPS, FRAMES, SIDE, 1.0, SIDE * SIDE, RATE,
    )  # fmt: skip
    assert set(KINDS) == {finding.kind for finding in report.findings}, "a kind that nothing shows"
    assert report.counts["no_caption"] == 2 and report.rows == len(EXPECTED) + 1
    assert zoo.read_bytes() == before
    line_of = {line.split(",")[1]: number for number, line in enumerate(before.decode().splitlines(), 1)}
    assert all(f.line == line_of[f.id] for f in report.findings if f.id != "good_twin")


def test_the_command_writes_report_and_clean_manifest(zoo: Path, tmp_path: Path, capsys) -> None:
    clean, told = tmp_path / "clean.csv", tmp_path / "report.json"
    few = tmp_path / "few.csv"
    wanted = ("good_wav", "silence", "wrong_numbers", "no_audio")
    Manifest(tuple(r for r in doctor.parse_manifest(zoo).rows if r.id in wanted)).write(few)
    arguments = ["data", "check", str(few), "--out", str(clean), "--json", str(told), "--keep", "silence"]
    assert cli.main([*arguments, "--processes", "1"]) == 0
    assert sorted(row.id for row in Manifest.read(clean)) == ["good_wav", "silence", "wrong_numbers"]
    facts = json.loads(told.read_text())
    assert facts["rows"] == 4 and facts["clean"] == 3 and facts["kept_although"] == ["silence"]
    assert facts["kinds"]["no_audio"]["clips"] == 1
    (entry,) = facts["kinds"]["no_audio"]["found"]
    assert entry["id"] == "no_audio" and entry["path"].endswith("no_audio.mp4") and entry["line"] > 1
    printed = capsys.readouterr().out
    assert "4 rows, 3 of them good" in printed and "silence" in printed and "kept" in printed
    assert cli.main([*arguments, "--strict", "--processes", "1"]) == 1


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_the_manifest_is_never_written_to(zoo: Path, tmp_path: Path, option: str, capsys) -> None:
    link = tmp_path / "link.csv"
    link.hardlink_to(zoo)
    before = zoo.read_bytes()
    assert cli.main(["data", "check", str(zoo), option, str(link)]) == 2
    assert "is the manifest that is checked" in capsys.readouterr().err
    assert zoo.read_bytes() == before


def test_unusable_arguments(zoo: Path) -> None:
    with pytest.raises(UsageError, match="unknown kind 'silent'"):
        examine(zoo, keep=("silent",))
    with pytest.raises(UsageError, match="timeout"):
        examine(zoo, timeout=0)


def test_a_clip_that_kills_its_reader_is_one_clip(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tmp_path / "few.csv"
    Manifest(tuple(r for r in doctor.parse_manifest(zoo).rows if r.id in ("good_mp4", "good_wav"))).write(few)
    monkeypatch.setattr(doctor, "measure", fall_on_wav)
    report = examine(few, processes=1, timeout=60)
    (finding,) = report.findings
    assert (finding.id, finding.kind) == ("good_wav", "unreadable") and "SIGSEGV" in finding.detail
    assert [row.id for row in report.clean] == ["good_mp4"]


def fall_on_wav(files: ClipFiles) -> ClipFacts:
    if files.audio_path.endswith(".wav"):
        os.kill(os.getpid(), 11)
    return measure(files)


# -- rules by themselves ----------------------------------------------------------------------------------------------


def facts(**changes: object) -> ClipFacts:
    picture = Picture(32, 64, 64, 16.0, 16.0, 0.0, 2.0, 0.0, "p")
    sound = Sound(32000, 16000, 0.0, 2.0, 0.5, True, "s")
    own: dict[str, object] = {"picture": picture, "sound": sound, "file_digest": "f", "faults": ()}
    for name, value in changes.items():
        part, _, key = name.partition("_")
        own[part] = dataclasses.replace(own[part], **{key: value})  # type: ignore[type-var]
    return ClipFacts(**own)  # type: ignore[arg-type]


def kinds(row: ClipRow, found: ClipFacts) -> list[str]:
    return [finding.kind for finding in diagnose(Checked(2, row, found), Tolerances())]


@pytest.mark.parametrize(
    "just_right, too_much, kind",
    [
        ({"sound_seconds": 2.099}, {"sound_seconds": 2.101}, "length_mismatch"),
        ({"sound_start": 0.049}, {"sound_start": 0.051}, "offset_mismatch"),
        ({"picture_uneven": 0.24}, {"picture_uneven": 0.26}, "variable_frame_rate"),
        ({"sound_peak": 1.01e-3}, {"sound_peak": 0.99e-3}, "silence"),
        # 31 intervals of 1/16 s: 1.9375 s. 1 % is 19.4 ms, 1.1 % is 21 ms.
        ({"picture_header_fps": 16 / 1.01}, {"picture_header_fps": 16 / 1.011}, "fps_drift"),
    ],
)
def test_tolerances(just_right: dict, too_much: dict, kind: str) -> None:
    assert kinds(clip_row(), facts(**just_right)) == []
    assert kinds(clip_row(), facts(**too_much)) == [kind]


@pytest.mark.parametrize("given, right", [(23.976, True), (24000 / 1001, True), (23.98, True), (24.0, False)])
def test_a_frame_rate_may_be_rounded_but_not_wrong(given: float, right: bool) -> None:
    # Over 60 s, 24 for 23.976 puts the last frame 60 ms from its time stamp.
    fps = 24000 / 1001
    found = facts(
        picture_frames=1439, picture_fps=fps, picture_header_fps=fps, picture_seconds=60.02, sound_seconds=60.0
    )
    row = clip_row(num_frames=1439, fps=given)
    assert (kinds(row, found) == []) == right
    assert corrected(row, found).fps == (given if right else fps)


def test_the_duplicate_that_stays_is_a_good_one() -> None:
    clips = [Checked(line, clip_row(f"clip{line}"), facts()) for line in (2, 3, 4)]
    found = duplicates(clips, unusable=[2])
    assert [(f.line, f.kind) for f in found] == [(2, "duplicate_file"), (4, "duplicate_file")]
    assert all("clip3" in f.detail for f in found)


def test_the_same_picture_with_another_sound_is_another_clip() -> None:
    other = dataclasses.replace(facts(sound_digest="t"), file_digest="g")
    assert duplicates([Checked(2, clip_row("a"), facts()), Checked(3, clip_row("b"), other)], []) == []


def test_headers_alone_are_quick_and_agree(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    path = str(zoo.parent / "good_mp4.mp4")
    whole = measure(ClipFiles(path, path))
    refuse: Callable[..., None] = lambda *_: pytest.fail("decoded")  # noqa: E731
    monkeypatch.setattr("javis.data.probe._update", refuse)
    heads = measure(ClipFiles(path, path, decode=False))
    assert whole.picture and heads.picture and whole.sound and heads.sound
    assert dataclasses.replace(heads.picture, digest=whole.picture.digest) == whole.picture
    assert heads.sound.sample_rate == whole.sound.sample_rate and av is not None


def test_damage_at_random_never_stops_the_doctor(zoo: Path, tmp_path: Path) -> None:
    """Sixty files with some bytes replaced, cut off or inserted: each has an answer, and none is an exception."""
    from javis.data.workers import Failure, isolated_map

    rng = np.random.default_rng(0)
    sources = [zoo.parent / name for name in ("good_mp4.mp4", "good_webm.webm", "good_wav.wav", "whole.webm")]
    files = []
    for number in range(60):
        source = sources[number % 4]
        data = bytearray(source.read_bytes())
        for _ in range(int(rng.integers(1, 30))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        place = int(rng.integers(len(data)))
        if number % 3 == 1:
            del data[place : place + int(rng.integers(1, len(data)))]
        elif number % 3 == 2:
            data[place:place] = rng.bytes(int(rng.integers(1, 2000)))
        path = tmp_path / f"{number}{source.suffix}"
        path.write_bytes(data)
        video = str(path) if path.suffix != ".wav" else str(sources[0])
        files.append(ClipFiles(video, str(path)))
    answers = dict(isolated_map(measure, files, processes=2, timeout=30))
    assert len(answers) == 60
    failures = [answer.reason for answer in answers.values() if isinstance(answer, Failure)]
    assert failures == []
