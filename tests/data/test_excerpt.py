"""Frames and sound of an excerpt: the right ones, of the same moment, from any container."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from javis.data.excerpt import (
    BadClip,
    Cover,
    ExcerptRequest,
    Slice,
    VideoIndex,
    choose_frames,
    cover,
    decode_excerpt,
    decode_frames,
    index_video,
    read_excerpt,
    resample,
)

from .media import RAMP, frames_by_number, number_of, ramp, regular, write_video, write_wav

WANTED = ExcerptRequest(
    path="", audio_path="", num_frames=16, height=32, width=48, fps=16, sample_rate=16000, start=0, audio_gap=0.25
)


def wanted(path: Path | str, audio: Path | str = "", **changes: object) -> ExcerptRequest:
    return dataclasses.replace(WANTED, path=str(path), audio_path=str(audio), **changes)  # type: ignore[arg-type]


def index_of(times: list[float], tick: float = 1e-4, interval: float | None = None) -> VideoIndex:
    pts = np.array([round(t / tick) for t in times])
    return VideoIndex("vp9", 32, 48, pts, pts[:1], tick, interval or times[1] - times[0], 2)


def test_at_the_files_own_rate_every_frame_is_taken_once() -> None:
    for fps in (16, 24, 30, 30000 / 1001):
        for tick in (1 / 12000, 1 / 1000):  # webm rounds time stamps to milliseconds
            index = index_of([k / fps for k in range(60)], tick, 1 / fps)
            for start in (0.0, 0.3, 0.999):
                frames = choose_frames(index, wanted("", fps=fps, start=start)).frames
                assert (np.diff(frames) == 1).all()


def test_other_rates_take_the_frame_that_is_on_screen() -> None:
    index = index_of([k / 30 for k in range(60)], 1 / 30000)
    frames = choose_frames(index, wanted("", fps=24)).frames
    assert frames.tolist() == [k * 30 // 24 for k in range(16)]
    frames = choose_frames(index, wanted("", fps=60, num_frames=8)).frames
    assert frames.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    uneven = index_of([0, 0.1, 0.5, 0.55, 1.0, 1.2], interval=0.1)
    assert choose_frames(uneven, wanted("", fps=10, num_frames=12)).frames.tolist() == [0, 1, 1, 1, 1, 2] + [3] * 4 + [
        4, 4,
    ]  # fmt: skip


def test_the_excerpt_can_begin_at_every_frame_that_leaves_enough() -> None:
    index = index_of([k / 16 for k in range(32)])
    begins = {choose_frames(index, wanted("", start=u)).start for u in np.linspace(0, 0.9999, 200)}
    assert sorted(begins) == pytest.approx([k / 16 for k in range(17)], abs=1e-4)
    whole = choose_frames(index, wanted("", num_frames=32, start=0.99))
    assert whole.start == 0 and whole.frames.tolist() == list(range(32))
    with pytest.raises(BadClip, match="lasts 2 s, and 2.06 s are wanted"):
        choose_frames(index, wanted("", num_frames=33))


@pytest.mark.parametrize(
    "size, to, expected",
    [
        ((64, 64), (64, 64), Cover(64, 64, 0, 0)),
        ((100, 200), (50, 50), Cover(50, 100, 0, 25)),
        ((200, 100), (50, 50), Cover(100, 50, 25, 0)),
        ((720, 1280), (240, 426), Cover(240, 427, 0, 0)),
        ((32, 32), (64, 96), Cover(96, 96, 16, 0)),
    ],
)
def test_frames_cover_the_wanted_size(size: tuple[int, int], to: tuple[int, int], expected: Cover) -> None:
    assert cover(*size, *to) == expected


@pytest.mark.parametrize("suffix, codec", [(".mp4", "libvpx-vp9"), (".webm", "libvpx"), (".mkv", "libx264")])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.99])
def test_picture_and_sound_are_of_the_same_moment(tmp_path: Path, suffix: str, codec: str, start: float) -> None:
    tick = Fraction(1, 12000) if suffix == ".mp4" else Fraction(1, 1000)
    video = write_video(tmp_path / f"v{suffix}", frames_by_number(40), regular(40, 16), codec, tick=tick)
    sound = write_wav(tmp_path / "a.wav", ramp(2.5, 48000), 48000)
    frames, wave = decode_excerpt(wanted(video, sound, start=start))
    numbers = number_of(frames)
    assert (np.diff(numbers) == 1).all()
    assert numbers[0] == int(start * 25)
    told = wave[1:-1] * RAMP  # what the sound says about its time; the ends of the file ring
    inside = slice(200, None) if numbers[0] == 0 else slice(None, -200)
    assert told[inside] == pytest.approx((numbers[0] / 16 + np.arange(1, 15999) / 16000)[inside], abs=2e-4)


def test_another_rate_keeps_picture_and_sound_together(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", frames_by_number(45), regular(45, 30))
    sound = write_wav(tmp_path / "a.wav", ramp(1.5, 16000), 16000)
    for fps, count in ((24, 24), (12, 10), (60, 40)):
        frames, wave = decode_excerpt(wanted(video, sound, fps=fps, num_frames=count, start=0.4))
        assert len(wave) == round(count / fps * 16000)
        for k, number in enumerate(number_of(frames)):
            moment = float(wave[round(k / fps * 16000)]) * RAMP
            assert number == int(moment * 30 + 0.01)


def test_sound_inside_a_file_follows_the_clock_of_the_container(tmp_path: Path) -> None:
    """Both streams in one file, the picture a quarter of a second late."""
    import av

    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libvpx", rate=16)
        picture.height, picture.width, picture.pix_fmt = 32, 48, "yuv420p"
        picture.time_base = picture.codec_context.time_base = Fraction(1, 1000)
        picture.options = {"crf": "4", "lag-in-frames": "0"}
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for number, image in enumerate(frames_by_number(32)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = 250 + round(number * 62.5), Fraction(1, 1000)
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        samples = (ramp(2.5, 16000) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    frames, wave = decode_excerpt(wanted(path, path, start=0.5))
    first = number_of(frames)[0]
    assert first > 0
    assert float(wave[0]) * RAMP == pytest.approx(0.25 + first / 16, abs=2e-3)
    assert read_excerpt(wanted(path, path), False).sound is None  # DALI has no decoder for sound in there


def test_a_long_file_is_sought_and_its_sound_stays_in_place(tmp_path: Path) -> None:
    frames = frames_by_number(40)
    frames = np.concatenate([frames[:1]] * 60 + [frames])  # 100 frames at 10 fps, key frames every 12
    video = write_video(tmp_path / "v.mp4", frames, regular(100, 10))
    sound = write_wav(tmp_path / "a.wav", ramp(10, 44100), 44100)
    request = wanted(video, sound, fps=10, num_frames=10, start=0.999)
    got, wave = decode_excerpt(request)
    assert number_of(got).tolist() == list(range(30, 40))
    assert wave[:-400] * RAMP == pytest.approx(9 + np.arange(15600) / 16000, abs=3e-4)
    # Most of the file is not resampled; the samples are those of the whole file, at the same instants.
    tone = np.sin(2 * np.pi * 3001 / 44100 * np.arange(441000)).astype(np.float32)
    write_wav(sound, tone, 44100)
    assert decode_excerpt(request)[1] == pytest.approx(resample(tone, 44100, 16000)[144000:160000], abs=1e-5)


def test_parts_of_a_file_are_read_like_files(tmp_path: Path) -> None:
    """Members of a tar, as the shards have them."""
    video = write_video(tmp_path / "v.mp4", frames_by_number(24), regular(24, 16)).read_bytes()
    sound = write_wav(tmp_path / "a.wav", ramp(1.5, 16000), 16000).read_bytes()
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"#" * 700 + video + b"#" * 55 + sound)
    parts = Slice(str(tar), 700, len(video)), Slice(str(tar), 755 + len(video), len(sound))
    whole = decode_excerpt(wanted(tmp_path / "v.mp4", tmp_path / "a.wav", start=0.5))
    for prefix in ("", "file://"):  # the latter through fsspec
        own = [part._replace(path=prefix + part.path) for part in parts]
        request = dataclasses.replace(WANTED, path=own[0], audio_path=own[1], start=0.5)
        for got, expected in zip(decode_excerpt(request), whole, strict=True):
            assert (got == expected).all()
        files = read_excerpt(request, False)
        assert files.video == video and files.sound == sound
    cut = dataclasses.replace(WANTED, path=Slice(str(tar), 700, 10**6), audio_path=parts[1])
    with pytest.raises(BadClip, match=r"cannot be read: .*x.tar ends \d+ bytes before it does"):
        decode_excerpt(cut)
    with pytest.raises(BadClip, match="cannot be read: .*nonsense"):
        decode_excerpt(wanted("nonsense://x/v.mp4", tmp_path / "a.wav"))


def test_seeking_and_decoding_from_the_beginning_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (36, 8, 12, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    video = write_video(tmp_path / "v.mp4", frames, regular(36, 16), gop=8)
    request = wanted(video, start=0.999)
    index = index_video(str(video))
    assert len(index.keys) > 2
    excerpt = choose_frames(index, request)
    sought = decode_frames(index, excerpt, request)
    through = decode_frames(index._replace(keys=index.keys[:1]), excerpt, request)
    assert excerpt.frames[0] == 20 and (sought == through).all()


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone_in_place(rate: int) -> None:
    def tone(t: np.ndarray) -> np.ndarray:
        return 0.5 * np.sin(2 * np.pi * 440 * t) + 0.3 * np.sin(2 * np.pi * 2900 * t + 1)

    got = resample(tone(np.arange(rate) / rate).astype(np.float32), rate, 16000)
    assert len(got) == 16000
    assert got[200:-200] == pytest.approx(tone(np.arange(16000) / 16000)[200:-200], abs=1e-4)


def test_channels_are_averaged_and_16_bits_are_exact(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", frames_by_number(16), regular(16, 16))
    left, right = ramp(1, 16000), np.full(16000, -0.25, np.float32)
    both = write_wav(tmp_path / "a.wav", np.stack([left, right], 1), 16000)
    assert decode_excerpt(wanted(video, both))[1] == pytest.approx((left - 0.25) / 2, abs=1e-7)
    values = np.arange(-8000, 8000, dtype=np.int16)
    coarse = write_wav(tmp_path / "b.wav", values, 16000, "PCM_16")
    assert (decode_excerpt(wanted(video, coarse))[1] == values / np.float32(32768)).all()


def test_a_little_sound_may_be_missing_and_is_silent_then(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", frames_by_number(16), regular(16, 16))
    sound = write_wav(tmp_path / "a.wav", np.full(14000, 0.5, np.float32), 16000)
    wave = decode_excerpt(wanted(video, sound))[1]
    assert (wave[:14000] == 0.5).all() and (wave[14000:] == 0).all() and len(wave) == 16000
    with pytest.raises(BadClip, match="sound is missing for 0.125 s of 1 s"):
        decode_excerpt(wanted(video, sound, audio_gap=0.1))


def test_what_is_wrong_with_a_clip_is_said(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", frames_by_number(24), regular(24, 16))
    sound = write_wav(tmp_path / "a.wav", ramp(1.5, 16000), 16000)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:300])
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.wav").write_bytes(b"")
    nan = write_wav(tmp_path / "nan.wav", np.full(24000, np.nan, np.float32), 16000)
    for path, audio, message in (
        (tmp_path / "none.mp4", sound, "cannot be read: No such file"),
        (cut, sound, "cannot be decoded: Invalid data"),
        (noise, sound, "cannot be decoded|has no picture"),
        (sound, sound, "has no picture"),
        (video, tmp_path / "none.wav", r"sound file .*none.wav cannot be read: No such file"),
        (video, tmp_path / "empty.wav", r"sound file .*empty.wav cannot be decoded"),
        (video, "", "has no sound"),
        (video, video, "^has no sound"),
        (video, nan, "sound has values that are not finite"),
        (tmp_path, sound, "cannot be read: Is a directory"),
    ):
        with pytest.raises(BadClip, match=message):
            decode_excerpt(wanted(path, audio))
