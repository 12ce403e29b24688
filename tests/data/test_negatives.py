"""Negatives against the exact truth of the world: every one is really out of place or really out of time."""

from __future__ import annotations

import numpy as np
import pytest

from javis.data import negatives as n
from javis.data import negatives_sound as sounds
from javis.data.negatives import KINDS, MAX_F1, MIN_SHIFT, TOLERANCE, NoNegative
from javis.data.negatives_clip import Material, describe, make_negative, masklet_of, material_of, sounds_alike
from javis.data.negatives_world import draw_scene, is_synchronous_scene, stem, world_clip, world_material
from javis.eval.onsets import audio_onsets
from javis.world import WorldConfig, render_audio, sample_scene
from javis.world.render import COLOURS

SEEDS = range(700_000, 700_010)
CONFIG = WorldConfig()


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed, CONFIG) for seed in SEEDS]


@pytest.fixture(scope="module")
def clips(scenes):
    return [world_clip(scene) for scene in scenes]


@pytest.fixture(scope="module")
def materials(scenes):
    return [world_material(scene, np.random.default_rng([seed, 1])) for seed, scene in zip(SEEDS, scenes, strict=True)]


def made(kind, clips, materials):
    """A negative of the kind for every clip that has one."""
    out = []
    for seed, clip, material in zip(SEEDS, clips, materials, strict=True):
        try:
            out.append((clip, make_negative(kind, clip, material, np.random.default_rng([seed, 2]))))
        except NoNegative:
            continue
    return out


def pairs(a, b):
    """Most pairs of times within the tolerance, by trying every assignment of the shorter list (few events)."""
    if not a or not b:
        return 0
    first, rest = a[0], a[1:]
    best = pairs(rest, b)
    for i, other in enumerate(b):
        if abs(first - other) <= TOLERANCE + 1e-9:
            best = max(best, 1 + pairs(rest, [*b[:i], *b[i + 1 :]]))
    return best


def f1(seen, heard):
    return 2 * pairs(list(seen), list(heard)) / max(1, len(seen) + len(heard))


def true_events(scene):
    return sorted(e.time for s in scene.sources for e in s.events)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_its_stream_and_no_other(kind, clips, materials):
    found = made(kind, clips, materials)
    assert len(found) >= 9  # nearly every clip has one of each kind
    for clip, negative in found:
        assert negative.kind == kind
        changed, original = (
            (negative.video, clip.video) if KINDS[kind].modality == "video" else (negative.waveform, clip.waveform)
        )
        assert (negative.video is None) == (KINDS[kind].modality == "audio")
        assert (negative.waveform is None) == (KINDS[kind].modality == "video")
        assert changed.shape == original.shape and changed.dtype == original.dtype
        assert np.isfinite(changed).all() and not np.array_equal(changed, original)
        if negative.waveform is not None:
            assert np.abs(negative.waveform).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_same_generator_same_negative_and_inputs_stay(kind, clips, materials):
    clip, material = clips[0], materials[0]
    video, waveform = clip.video.copy(), clip.waveform.copy()
    one, two, other = (make_negative(kind, clip, material, np.random.default_rng(seed)) for seed in (5, 5, 6))
    for stream in ("video", "waveform"):
        if getattr(one, stream) is not None:
            np.testing.assert_array_equal(getattr(one, stream), getattr(two, stream))
    assert one.changes == two.changes and (one.changes != other.changes or kind == "audio_delete")
    np.testing.assert_array_equal(clip.video, video)
    np.testing.assert_array_equal(clip.waveform, waveform)


@pytest.mark.parametrize("kind", ["audio_shift", "audio_mute", "audio_repeat", "audio_speed"])
def test_what_is_heard_after_a_temporal_change_misses_the_true_events(kind, scenes, clips, materials):
    """Onsets are measured in the changed sound; the true events are the scene's."""
    truth = {id(clip): true_events(scene) for clip, scene in zip(clips, scenes, strict=True)}
    scores = []
    for clip, negative in made(kind, clips, materials):
        heard = [event.time for event in audio_onsets(negative.waveform, clip.rate)]
        scores.append(f1(truth[id(clip)], heard))
        assert f1(truth[id(clip)], [e.time for e in audio_onsets(clip.waveform, clip.rate)]) >= 0.8  # it was in step
    # The detector may miss or invent one event of a clip; the bound holds for nearly all and clearly on average.
    assert np.mean(np.array(scores) <= MAX_F1 + 1e-9) >= 0.8 and np.mean(scores) <= MAX_F1


@pytest.mark.parametrize("kind", ["video_shift", "video_stall"])
def test_what_is_seen_after_a_temporal_change_misses_the_true_events(kind, scenes, clips, materials):
    """Each frame is found again in the original, which tells when each true event is now seen."""
    truth = {id(clip): true_events(scene) for clip, scene in zip(clips, scenes, strict=True)}
    for clip, negative in made(kind, clips, materials):
        total, fps = len(clip.video), clip.fps
        late = round(negative.changes["seconds"] * fps)
        if kind == "video_shift":
            source = [min(max(i - late, 0), total - 1) for i in range(total)]
            assert abs(late / fps) >= MIN_SHIFT
        else:
            at = round(negative.changes["at"] * fps)
            source = [i if i <= at else max(at, i - late) for i in range(total)]
        np.testing.assert_array_equal(negative.video, clip.video[source])
        # An event at time e is seen between the frames that show what came before and after it.
        seen = []
        for event in truth[id(clip)]:
            shown = [i for i in range(1, total) if source[i - 1] / fps <= event < source[i] / fps]
            seen += [i / fps - (source[i] / fps - event) for i in shown]
        assert f1(seen, truth[id(clip)]) <= MAX_F1 + 1e-9


def test_audio_shift_is_a_move_with_silence_at_the_edge(clips, materials):
    for clip, negative in made("audio_shift", clips, materials):
        shift = round(negative.changes["seconds"] * clip.rate)
        assert MIN_SHIFT * clip.rate <= abs(shift) <= 0.4 * len(clip.waveform)
        fade = round(n.RAMP * clip.rate)
        if shift > 0:
            np.testing.assert_array_equal(negative.waveform[shift:], clip.waveform[:-shift])
            assert not negative.waveform[:shift].any()
        else:
            np.testing.assert_array_equal(negative.waveform[fade:shift], clip.waveform[fade - shift :])
            assert not negative.waveform[shift:].any()


def test_a_shift_by_a_period_is_refused(monkeypatch):
    """Events every half second: half a second later nothing has changed but the ends."""
    events = list(np.arange(0.25, 10, 0.5))
    wave = np.random.default_rng(0).standard_normal(160_000).astype(np.float32) * 0.1
    frames = np.zeros((160, 8, 8, 3), np.uint8)
    for module in (n, sounds):
        monkeypatch.setattr(module, "draw_shift", lambda rng, duration: 0.5)
    with pytest.raises(NoNegative, match="agreement"):
        sounds.audio_shift(wave, np.random.default_rng(0), rate=16000, events=events)
    with pytest.raises(NoNegative, match="agreement"):
        n.video_shift(frames, np.random.default_rng(0), fps=16, events=events)
    monkeypatch.setattr(sounds, "draw_shift", lambda rng, duration: 0.25)  # halfway between two events
    assert sounds.audio_shift(wave, np.random.default_rng(0), rate=16000, events=events).kind == "audio_shift"


@pytest.mark.parametrize("kind", [k for k, what in KINDS.items() if what.axis == "temporal"])
def test_without_events_there_is_nothing_out_of_time(kind):
    clip = describe(np.zeros((16, 8, 8, 3), np.uint8), np.zeros(16000, np.float32), fps=16, rate=16000)
    assert clip.events == ()
    with pytest.raises(NoNegative, match="no events"):
        make_negative(kind, clip, None, np.random.default_rng(0))


def test_mute_silences_the_stretch_and_leaves_the_rest(scenes, clips, materials):
    truth = {id(clip): true_events(scene) for clip, scene in zip(clips, scenes, strict=True)}
    for clip, negative in made("audio_mute", clips, materials):
        begin, end = (round(negative.changes[name] * clip.rate) for name in ("begin", "end"))
        ramp = round(n.RAMP * clip.rate)
        assert not negative.waveform[begin + ramp : max(begin + ramp, end - ramp)].any()
        np.testing.assert_array_equal(negative.waveform[:begin], clip.waveform[:begin])
        np.testing.assert_array_equal(negative.waveform[end:], clip.waveform[end:])
        covered = [e for e in truth[id(clip)] if begin <= e * clip.rate < end]
        assert len(covered) >= len(truth[id(clip)]) / 2


def test_a_repeat_sounds_twice(clips, materials):
    for clip, negative in made("audio_repeat", clips, materials):
        begin, end = (round(negative.changes[name] * clip.rate) for name in ("begin", "end"))
        length, fade = end - begin, round(n.RAMP * clip.rate)
        np.testing.assert_array_equal(negative.waveform[:end], clip.waveform[:end])
        again = negative.waveform[end + fade : end + length]
        np.testing.assert_array_equal(again, clip.waveform[begin + fade : end][: len(again)])
        rest = negative.waveform[end + length + fade :]
        np.testing.assert_array_equal(rest, clip.waveform[end + fade : end + fade + len(rest)])


def test_speed_moves_a_tone_in_pitch_and_a_click_in_time():
    rate, events = 16000, [0.4, 0.9, 1.5]
    time = np.arange(2 * rate) / rate
    wave = (0.2 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    negative = sounds.audio_speed(wave, np.random.default_rng(3), rate=rate, events=events)
    factor = negative.changes["factor"]
    assert 1.3 <= max(factor, 1 / factor) <= 2
    heard = negative.waveform[: int(min(2.0, 2 / factor) * rate)]
    peak = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))).argmax() * rate / len(heard)
    assert abs(peak - 1000 * factor) < 4


def test_the_grid_hides_what_sounds(clips, materials):
    for clip, negative in made("video_grid_mask", clips, materials):
        same = (negative.video == clip.video).all(axis=(0, 3))
        black = (negative.video == 0).all(axis=(0, 3))
        assert (same | black).all() and 0.3 <= black.mean() <= 0.8
        x, y = clip.points.astype(int).clip(0, CONFIG.size - 1).T
        assert black[y, x].mean() >= 0.5


def test_the_grid_hides_what_moves_where_positions_are_unknown(clips):
    clip = clips[0]
    negative = n.video_grid_mask(clip.video, np.random.default_rng(0))
    motion = np.abs(np.diff(clip.video.astype(float), axis=0)).sum(axis=(0, 3))
    black = (negative.video == 0).all(axis=(0, 3))
    assert motion[black].sum() >= 0.5 * motion.sum()
    with pytest.raises(NoNegative, match="nothing moves"):
        n.video_grid_mask(np.full((5, 8, 8, 3), 9, np.uint8), np.random.default_rng(0))


def test_a_masklet_brings_its_own_colour_and_leaves_the_rest(clips, materials):
    for (clip, negative), material in zip(made("video_masklet", clips, materials), materials, strict=True):
        touched = (negative.video != clip.video).any(axis=3)
        assert 0.05 <= touched.mean() <= 0.25
        # What is pasted has the colours of the object that was cut out, up to its blended rim.
        inside = material.masklet.alpha == 1
        colour = np.median(material.masklet.frames[inside].astype(float), axis=0)
        assert np.abs(np.median(negative.video[touched].astype(float), axis=0) - colour).max() < 60


def test_a_masklet_of_a_still_camera_is_what_moves(clips):
    clip = clips[0]
    masklet = masklet_of(clip.video)
    moved = np.abs(clip.video.astype(int) - np.median(clip.video, axis=0)).max(axis=3) > 24
    assert masklet is not None
    np.testing.assert_array_equal(masklet.alpha > 0, moved)
    assert masklet_of(np.full((5, 8, 8, 3), 9, np.uint8)) is None


def test_what_is_added_is_the_other_sound_and_out_of_step(scenes, clips, materials):
    truth = {id(clip): true_events(scene) for clip, scene in zip(clips, scenes, strict=True)}
    source_of = {id(clip): material.source for clip, material in zip(clips, materials, strict=True)}
    for clip, negative in made("audio_add", clips, materials):
        shift, gain = round(negative.changes["seconds"] * clip.rate), negative.changes["gain"]
        source = np.zeros_like(clip.waveform)
        if shift >= 0:
            source[shift:] = source_of[id(clip)][: len(source) - shift]
        else:
            source[:shift] = source_of[id(clip)][-shift:]
        expected = clip.waveform.astype(float) + gain * source
        scale = float(expected @ negative.waveform) / float(expected @ expected)
        assert 0.5 < scale <= 1.0001  # turned down only where it would clip
        np.testing.assert_allclose(negative.waveform, scale * expected, atol=1e-4)
        added = negative.changes["added"]
        alone = [t for t in added if all(abs(t - e) > TOLERANCE for e in truth[id(clip)])]
        assert len(alone) >= len(added) / 2 and alone
        # The added onsets are there to be heard.
        heard = [e.time for e in audio_onsets(negative.waveform, clip.rate)]
        assert any(abs(t - h) < 0.05 for t in alone for h in heard)


def test_a_deleted_source_is_gone_and_the_others_are_untouched(scenes, clips, materials):
    found = made("audio_delete", clips, materials)
    two = 0
    for scene, (clip, negative) in zip(scenes, found, strict=True):
        audible = [i for i, s in enumerate(scene.sources) if s.events]
        gone = audible[negative.changes["stem"]]
        left = sum((stem(scene, i) for i in audible if i != gone), np.zeros_like(clip.waveform))
        two += len(audible) > 1
        np.testing.assert_allclose(negative.waveform, left, atol=1e-6)
    assert two
    with pytest.raises(NoNegative, match="stems"):
        sounds.audio_delete(clips[0].waveform, np.random.default_rng(0), stems=())


def test_stems_add_up_to_the_scene(scenes):
    for scene in scenes:
        total = sum(stem(scene, i) for i in range(len(scene.sources)))
        np.testing.assert_allclose(np.clip(total, -1, 1), render_audio(scene), atol=1e-6)


def test_the_volume_curve_changes_events_by_what_it_says(scenes, clips, materials):
    truth = {id(clip): true_events(scene) for clip, scene in zip(clips, scenes, strict=True)}
    for clip, negative in made("audio_volume", clips, materials):
        measured = []
        for event in truth[id(clip)]:
            a = round(event * clip.rate)
            before, after = (np.abs(w[a : a + 320]).max() for w in (clip.waveform, negative.waveform))
            measured.append(20 * np.log10(after / before))
        np.testing.assert_allclose(measured, negative.changes["decibel"], atol=1.5)
        assert np.mean(np.abs(measured) >= n.MIN_GAIN_DB - 1.5) >= 0.5


def test_material_has_what_the_scene_has_not(scenes, clips, materials):
    for scene, clip, material in zip(scenes, clips, materials, strict=True):
        assert material.masklet is not None and material.source is not None
        assert len(material.source) == len(clip.waveform) and len(material.source_events)
        # The object's colour at its brightest is none of the scene's.
        inside = material.masklet.frames[material.masklet.alpha == 1].astype(float)
        pasted = inside[inside.sum(axis=1).argmax()]
        inks = [np.array(COLOURS[s.colour], float) for s in scene.sources if s.visible]
        assert all(np.abs(pasted - ink).max() > 40 for ink in inks)


def test_a_scene_with_an_unseen_bell_is_no_positive():
    scenes = [sample_scene(seed) for seed in range(200)]
    bells = [s for s in scenes if any(x.audible and not x.visible for x in s.sources)]
    silent = [s for s in scenes if not any(x.events for x in s.sources)]
    assert bells and silent
    assert not any(is_synchronous_scene(s) for s in [*bells, *silent])
    assert all(is_synchronous_scene(draw_scene(seed, CONFIG)) for seed in range(30))


def test_real_clips_need_no_truth(clips):
    """Events heard, masklet from motion, any mono source: every kind but the one that needs the sources apart."""
    clip, *others = (describe(c.video, c.waveform, fps=c.fps, rate=c.rate) for c in clips)
    assert f1(clips[0].events, clip.events) >= 0.8
    # Another clip in which something moves far enough to be cut out, and which sounds different.
    found = [material_of(other, np.random.default_rng(0)) for other in others]
    material = next(m for m in found if m.masklet is not None and not sounds_alike(clip.waveform, m.source))
    for kind in KINDS:
        if kind == "audio_delete":
            with pytest.raises(NoNegative, match="stems"):
                make_negative(kind, clip, material, np.random.default_rng(1))
        else:
            assert make_negative(kind, clip, material, np.random.default_rng(1)).kind == kind


def test_the_same_sound_is_not_added(clips):
    clip = clips[0]
    assert sounds_alike(clip.waveform, 0.3 * np.roll(clip.waveform, 999))
    with pytest.raises(NoNegative, match="sounds like this one"):
        make_negative("audio_add", clip, Material(None, clip.waveform, clip.events), np.random.default_rng(0))


def test_an_unknown_kind_is_named(clips):
    with pytest.raises(ValueError, match="video_grid_mask"):
        make_negative("video_blur", clips[0], None, np.random.default_rng(0))
