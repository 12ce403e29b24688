"""Attributes of clean clips over all combinations of classes, and of damaged ones."""

from __future__ import annotations

import numpy as np
import pytest

from javis.eval.attributes import check_attributes, read_objects, read_sources
from javis.world import parse_prompt, render_audio, render_video, scene_from_prompt
from javis.world.vocabulary import COLOURS, MOTIONS, SHAPES, SIDES, SIZES, TIMBRES
from tests.eval.clips import damaged_audio, damaged_video

RATE, FPS = 16000, 16


@pytest.mark.parametrize("colour", COLOURS)
def test_what_is_seen(colour: str) -> None:
    # Every colour with every shape; sides, sizes and motions go round so that each meets each colour.
    for k, shape in enumerate(SHAPES):
        number = k + COLOURS.index(colour)
        motion, side, size = MOTIONS[number % 5], SIDES[number % 3], SIZES[number // 2 % 2]
        prompt = f"a {size} {colour} {shape} {motion} on the {side}"
        video = render_video(scene_from_prompt(prompt, number))
        for clip in (video, damaged_video(video, number)):
            (found,) = read_objects(clip, FPS)
            assert (found.colour, found.shape, found.side, found.motion) == (colour, shape, side, motion), prompt
        assert read_objects(video, FPS)[0].size == size, prompt


@pytest.mark.parametrize("timbre", TIMBRES)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_heard(timbre: str, size: str) -> None:
    for seed, shape in enumerate(("ball", "star")):
        words = f"a {size} red {shape} flashes" if timbre == "electronic" else f"a {size} red {timbre} {shape} knocks"
        scene = scene_from_prompt(words, seed)
        # The clause that is told says another timbre and size: with one source it must not matter.
        told = parse_prompt(
            f"a {'large' if size == 'small' else 'small'} red {'glass' if timbre != 'glass' else 'metal'} ball"
        )
        for audio in (render_audio(scene), damaged_audio(render_audio(scene), seed)):
            (found,) = read_sources(audio, RATE, told)
            assert found is not None
            assert (found.timbre, found.pitch) == (timbre, "low" if size == "large" else "high")
            assert abs(12 * np.log2(found.f0 / scene.sources[0].f0)) < 0.8  # semitones
            assert found.score > 0.8


def test_two_objects_are_paired_with_their_clauses() -> None:
    prompt = "a large red metal ball knocks on the left and a small blue star flashes on the right"
    scene = scene_from_prompt(prompt, 1)
    video, audio = render_video(scene), render_audio(scene)
    checks = check_attributes(video, audio, FPS, RATE, parse_prompt(prompt))
    assert [sorted(check) for check in checks] == [
        ["colour", "motion", "pitch", "shape", "side", "size", "timbre"],
        ["colour", "motion", "pitch", "shape", "side", "size", "timbre"],
    ]
    assert all(all(check.values()) for check in checks)


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("a large green metal ball knocks on the left", {"colour"}),
        ("a large red metal star knocks on the left", {"shape"}),
        ("a large red metal ball knocks on the right", {"side"}),
        ("a large red glass ball knocks on the left", {"timbre"}),
        ("a small red metal ball knocks on the left", {"size", "pitch"}),
        ("a large red metal ball bounces on the left", {"motion"}),
    ],
)
def test_each_wrong_word_is_caught(told: str, wrong: set[str]) -> None:
    scene = scene_from_prompt("a large red metal ball knocks on the left", 5)
    (checks,) = check_attributes(render_video(scene), render_audio(scene), FPS, RATE, parse_prompt(told))
    assert {name for name, right in checks.items() if not right} == wrong


def test_what_is_missing_has_no_attributes() -> None:
    clauses = parse_prompt("a large red metal ball knocks on the left")
    empty, silence = np.full((32, 64, 64, 3), 30, np.uint8), np.zeros(32000, np.float32)
    assert read_objects(empty, FPS) == []
    (checks,) = check_attributes(empty, silence, FPS, RATE, clauses)
    assert not any(checks.values()) and len(checks) == 7


def test_what_the_caption_leaves_open_is_not_checked() -> None:
    prompt = "a ball bounces"
    scene = scene_from_prompt(prompt, 0)
    (checks,) = check_attributes(render_video(scene), render_audio(scene), FPS, RATE, parse_prompt(prompt))
    assert checks == {"shape": True, "motion": True}
