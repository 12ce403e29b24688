"""Sounds: onsets at their times, pitch, loudness, length."""

import itertools

import numpy as np
import pytest

from javis.world import WorldConfig, render_audio, sample_scene, scene_from_prompt
from javis.world import vocabulary as words
from javis.world.synth import PITCHES, SOUND_SECONDS, draw_pitch, gain, modal_tone

from .measure import onset_near

RATE = 16000


def test_onsets_at_event_times() -> None:
    for seed in range(120):
        scene = sample_scene(seed)
        audio = render_audio(scene)
        times = [time for time, _, _ in scene.events]
        apart = [t for i, t in enumerate(times) if all(abs(t - u) > 0.2 for j, u in enumerate(times) if j != i)]
        for time in apart:
            assert abs(onset_near(audio, RATE, time) - time) < 0.005


def test_silence_elsewhere() -> None:
    for seed in range(60):
        scene = sample_scene(seed)
        audio, t = render_audio(scene), np.arange(scene.config.samples) / RATE
        near = np.zeros(len(t), bool)
        for time, _, _ in scene.events:
            near |= (t >= time - 1 / RATE) & (t <= time + SOUND_SECONDS + 1 / RATE)
        assert not audio[~near].any()


@pytest.mark.parametrize("timbre", words.TIMBRES)
@pytest.mark.parametrize("size", words.SIZES)
def test_pitch_is_the_strongest_frequency(timbre: str, size: str) -> None:
    what = "flashes" if timbre == "electronic" else "knocks"
    for seed in range(8):
        shape = words.SHAPES[seed % 4]
        material = "" if timbre == "electronic" else timbre
        scene = scene_from_prompt(f"a {size} {material} {shape} {what}", seed)
        source = scene.sources[0]
        assert source.timbre == timbre and source.pitch_class == ("low" if size == "large" else "high")
        start = round(source.events[0].time * RATE)
        piece = render_audio(scene)[start + 80 : start + 2000]
        spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 2**15))
        assert np.argmax(spectrum) * RATE / 2**15 == pytest.approx(source.f0, rel=0.02)
        assert 200 < source.f0 < 3000


def test_small_is_at_least_five_semitones_higher() -> None:
    rng = np.random.default_rng(0)
    for timbre in PITCHES:
        draws = {
            size: [draw_pitch(timbre, size, shape, rng) for shape in words.SHAPES for _ in range(200)]
            for size in words.SIZES
        }
        assert 12 * np.log2(min(draws["small"]) / max(draws["large"])) >= 5


def test_louder_when_struck_harder() -> None:
    """RMS of the tone after each event, within one scene, rises with the strength."""
    compared = 0
    for seed in range(150):
        scene = sample_scene(seed, WorldConfig(seconds=3), sources=1)
        audio, events = render_audio(scene), scene.events
        if any(b[0] - a[0] < SOUND_SECONDS for a, b in itertools.pairwise(events)):
            continue
        loud = {}
        for time, _, strength in events:
            start = round(time * RATE)
            loud[strength] = float(np.sqrt(np.mean(audio[start + 400 : start + 1600] ** 2)))
        ordered = sorted(loud)
        for weak, strong in itertools.pairwise(ordered):
            if strong - weak > 0.03:
                assert loud[weak] < loud[strong]
                assert loud[strong] / loud[weak] == pytest.approx(gain(strong) / gain(weak), rel=0.1)
                compared += 1
    assert compared > 50


def test_tones_die_within_their_time_and_timbres_differ() -> None:
    tones = {timbre: modal_tone(timbre, 440.0, RATE) for timbre in words.TIMBRES}
    for tone in tones.values():
        assert np.abs(tone).max() == pytest.approx(1, abs=1e-6)
        assert abs(tone[-1]) < 1e-3
        # 0.2 s later a new onset stands out: what is left of the old one is 15 dB down at least.
        late, early = tone[round(0.2 * RATE) :][:160], tone[:160]
        assert (late**2).mean() < 10**-1.5 * (early**2).mean()
    length = {name: np.flatnonzero(np.abs(tone) > 0.1)[-1] / RATE for name, tone in tones.items()}
    assert length["wooden"] < length["glass"] < length["metal"]


def test_silent_scene_is_silent() -> None:
    assert not render_audio(scene_from_prompt("a red ball floats silently on the left", 0)).any()
