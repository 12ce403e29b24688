"""Attention read beside the model: probabilities, truth on tokens, scores against hand-made truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from javis.eval.experiments import attention
from javis.eval.experiments.attention_record import (
    PRIOR_PICTURE,
    PRIOR_SOUND,
    TO_PICTURE,
    TO_SOUND,
    bidirectional_probabilities,
    prior_probabilities,
    recorded,
)
from javis.eval.experiments.attention_scores import Score, near, scores, side_map
from javis.eval.experiments.attention_truth import Truth, on_tokens, scenes, together, truth_of_scene
from javis.eval.sync import clause_events
from javis.pipeline import JavisPipeline
from javis.world import WorldConfig, render_audio, render_video, scene_from_prompt


@pytest.fixture(scope="module")
def pipe() -> JavisPipeline:
    return JavisPipeline.from_pretrained("demo")


@torch.no_grad()
def test_probabilities_are_those_of_the_blocks(pipe: JavisPipeline) -> None:
    """They give the block's output from its values, for folded priors, for plain keys, and with the clock."""
    model, generator = pipe.model, torch.Generator().manual_seed(0)
    text, mask, found = pipe.encode_prompts(["a red ball bounces on the left"] * 2, [1, 2])
    condition = pipe.condition(text, mask, found, frames=32, samples=32000, guided=False)
    layer, told = model._layers[1], condition.layers[1].video_prior
    assert told is not None
    y = torch.randn(2, 256, 128, generator=generator)
    attend = layer.video_prior.spatial  # type: ignore[union-attr]
    p = prior_probabilities(attend, y, told[0])
    assert p.shape == (2, 4, 256, 8)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, 256))
    folded = p.transpose(1, 2).flatten(2) @ told[0].value
    torch.testing.assert_close(folded, attend(y, told[0], 16, True), rtol=1e-4, atol=1e-5)
    tokens = model._prior_tokens(found.spatial, found.temporal, 2)[0]
    plain = attend.attn.key_value(tokens)
    torch.testing.assert_close(prior_probabilities(attend, y, plain), p, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cross_attn"):
        prior_probabilities(attend, y, y)

    block = layer.bidirectional
    assert block is not None
    video, audio = torch.randn(2, 256, 128, generator=generator), torch.randn(2, 128, 128, generator=generator)
    to_picture, to_sound = bidirectional_probabilities(block, video, audio, condition.clock)
    values = block.audio_v(block.audio_norm(audio)).unflatten(-1, (block.heads, -1)).transpose(1, 2)
    out = video + block.video_scale * block.video_out((to_picture @ values).transpose(1, 2).flatten(2))
    values = block.video_v(block.video_norm(video)).unflatten(-1, (block.heads, -1)).transpose(1, 2)
    heard = audio + block.audio_scale * block.audio_out((to_sound @ values).transpose(1, 2).flatten(2))
    expected = block(video, audio, condition.clock)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heard, expected[1], rtol=1e-4, atol=1e-5)


def test_recording_changes_nothing_and_sees_the_guided_half(pipe: JavisPipeline) -> None:
    options: dict[str, Any] = {"seed": [3], "steps": 2, "variant": "teacher"}
    before = pipe(["a red ball bounces on the left"], **options)
    with recorded(pipe.model, 1) as found:
        during = pipe(["a red ball bounces on the left"], **options)
    assert np.array_equal(before.video, during.video) and np.array_equal(before.audio, during.audio)
    assert found.calls[TO_SOUND] == dict.fromkeys(range(4), 2)
    assert found.mean(PRIOR_PICTURE).shape == (1, 4, 4, 256, 8) and found.mean(PRIOR_SOUND).shape == (1, 4, 4, 128, 8)
    assert found.mean(TO_PICTURE).shape == (1, 4, 2, 256, 128)
    torch.testing.assert_close(found.mean(TO_SOUND).sum(-1), torch.ones(1, 4, 2, 128))
    pipe(["a red ball bounces on the left"], **options)
    assert found.calls[TO_SOUND] == dict.fromkeys(range(4), 2), "the hooks are still there"


def test_sources_put_together_strike_together_as_seen_and_heard() -> None:
    for scene in scenes("simultaneous", 4, WorldConfig(), 77):
        first, second = scene.sources
        assert [e.time for e in first.events] == [e.time for e in second.events] == list(second.path.times)  # type: ignore[union-attr]
        assert {first.side, second.side} == {"left", "right"}
        clauses = [dict(s.clause) for s in scene.sources]
        for seen, _ in clause_events(render_video(scene), render_audio(scene), 16, 16000, clauses):
            assert seen == pytest.approx([e.time for e in first.events], abs=0.02)
    assert [s.sources[0].side for s in scenes("single", 4, WorldConfig(), 77)] == ["left", "right"] * 2
    with pytest.raises(ValueError, match="flashing or two knocking"):
        together(scene_from_prompt("a red ball bounces on the left and a blue box swings on the right", 1))


def test_truth_on_tokens_is_where_the_scene_has_it(pipe: JavisPipeline) -> None:
    assert np.array_equal(on_tokens(np.arange(16.0).reshape(4, 4), (2, 2)), [[2.5, 4.5], [10.5, 12.5]])
    with pytest.raises(ValueError, match="do not split"):
        on_tokens(np.zeros((5, 4)), (2, 2))
    scene = scenes("multiple", 1, WorldConfig(), 9)[0]
    truth = truth_of_scene(scene, pipe.audio_codec, (16, 4, 4), (32, 4))
    for cover, told in zip(truth.objects, scene.truth()["sources"], strict=True):
        x = (cover.sum(axis=(0, 1)) @ (16 * np.arange(4) + 8)) / cover.sum()
        assert x == pytest.approx(np.mean([c[0] for c in told["centre_px"]]), abs=4)
    ball = scene_from_prompt("a red ball flashes on the left", 2)
    cover = truth_of_scene(ball, pipe.audio_codec, (16, 4, 4), (32, 4)).objects[0]
    assert cover.sum() * 256 / 16 == pytest.approx(np.pi * ball.truth()["sources"][0]["radius_px"] ** 2, rel=0.03)
    for level, events in zip(truth.levels, truth.events, strict=True):
        loud = level.sum(axis=1)
        quiet = [s for s in range(32) if all(not -0.02 < (s + 1) / 16 - e < 0.45 for e in events)]
        assert loud[[int(e * 16) + 1 for e in events]].min() > 3 * max([loud[s] for s in quiet], default=0.0)


def hand_made() -> Truth:
    """One object in the left column of four, one event at 0.51 s of 2 s: latent frame 4 of 16, sound slot 8 of 32."""
    objects = np.zeros((1, 16, 4, 4))
    objects[0, :, 2, 0] = 0.5
    levels = np.zeros((1, 32, 4))
    levels[0, 8, 1] = 1.0
    return Truth(objects, levels, ((0.51,),), ("left",), 2.0)


def even() -> dict[str, np.ndarray]:
    shapes = {PRIOR_PICTURE: (256, 8), PRIOR_SOUND: (128, 8), TO_PICTURE: (256, 128), TO_SOUND: (128, 256)}
    return {name: np.full((1, 1, *shape), 1 / shape[-1]) for name, shape in shapes.items()}


def test_even_attention_scores_chance_and_nothing_else() -> None:
    found = scores(even(), hand_made())
    assert set(found) == set(attention.MEASURES)
    for name, score in found.items():
        np.testing.assert_allclose(score.share, score.chance, atol=1e-12, err_msg=name)
        if score.control is not None:
            np.testing.assert_allclose(score.control, score.chance, atol=1e-12, err_msg=name)
    chances = {name: round(score.chance, 6) for name, score in found.items()}
    assert chances == {
        "prior_object": 0.5 / 16,
        "prior_side": 0.5,
        "prior_sound": round(1 / 128, 6),
        "hearing_when": 3 / 16,
        "hearing_where": 0.5 / 16,
        "seeing_when": 3 / 16,
        "seeing_band": 0.25,
    }


def test_attention_on_the_truth_scores_it() -> None:
    maps = even()
    maps[PRIOR_PICTURE] = np.zeros((1, 1, 256, 8))
    maps[PRIOR_PICTURE][..., 1] = 1.0
    at = np.zeros((16, 4, 4))
    at[:, 2, 0] = 1.0
    maps[PRIOR_PICTURE][0, 0, :, 0] = at.ravel()
    maps[PRIOR_PICTURE] += 1e-12
    maps[PRIOR_SOUND] = np.full((1, 1, 128, 8), 1e-12)
    maps[PRIOR_SOUND][0, 0, 8 * 4 + 1, 0] = 1.0
    # The sound of the event looks at the object two frames off, then one frame off; other tokens at the last frame.
    looks = np.zeros((128, 256))
    looks[:, -1] = 1.0
    for frame, share in ((6, 0.25), (5, 0.75)):
        looks[8 * 4 + 1, frame * 16 + 2 * 4] = share
    looks[8 * 4 + 1, -1] = 0.0
    maps[TO_SOUND] = looks[None, None]
    listens = np.full((256, 128), 0.0)
    listens[:, 8 * 4 + 1], listens[:, 8 * 4 + 2], listens[:, 127] = 0.6, 0.2, 0.2
    maps[TO_PICTURE] = listens[None, None]
    found = scores(maps, hand_made())
    assert found["prior_object"].share[0, 0, 0] == pytest.approx(0.5)  # all mass on tokens that it covers by half
    assert found["prior_object"].control[0, 0, 0] == pytest.approx(0.0, abs=1e-9)  # type: ignore[index]
    assert found["prior_side"].share[0, 0, 0] == pytest.approx(1.0)
    assert found["prior_side"].share[0, 0, 1] == pytest.approx(0.5, abs=0.05)
    assert found["prior_sound"].share[0, 0, 0] == pytest.approx(1.0)
    assert found["hearing_when"].share[0, 0] == pytest.approx(0.75)
    assert found["hearing_when"].control[0, 0] == pytest.approx(1 / 11)  # type: ignore[index]  # of 11 quiet frames one
    assert found["hearing_where"].share[0, 0] == pytest.approx(0.5)
    assert found["hearing_where"].control[0, 0] == 0.0  # type: ignore[index]
    assert found["seeing_when"].share[0, 0] == pytest.approx(0.8)
    assert found["seeing_band"].share[0, 0] == pytest.approx(0.75)


def test_windows_and_sides() -> None:
    assert np.flatnonzero(near(0.51, 16, 16, 2.0)).tolist() == [3, 4, 5]
    assert np.flatnonzero(near(0.51, 32, 16, 2.0)).tolist() == [6, 7, 8, 9, 10, 11]
    assert np.flatnonzero(near(1.99, 16, 16, 2.0)).tolist() == [14, 15]
    left, right = side_map("left", (1, 1, 4))[0, 0], side_map("right", (1, 1, 4))[0, 0]
    np.testing.assert_allclose(left, [1, 1 / 3, 0, 0])
    np.testing.assert_allclose(right, left[::-1])
    silent = replace(hand_made(), events=((),), levels=np.zeros((1, 32, 4)))
    assert set(scores(even(), silent)) == {"prior_object", "prior_side"}


def test_the_best_head_is_chosen_on_one_half_and_scored_on_the_other() -> None:
    """Head 1 is better on the clips it is chosen on only, head 2 on all."""

    def one(number: int) -> dict[str, Score]:
        fit = attention.fitted_half(number)
        share = np.array([[0.1, 0.4 if fit else 0.0, 0.3]])
        return {name: Score(share, 0.1, None) for name in (*attention.MEASURES, attention.SWAPPED)}

    row = attention.summarise({"single": [one(i) for i in range(8)]})
    found = row["kinds"]["single"]["hearing_when"]
    assert row["best"]["hearing_when"] == [0, 1] and found["clips"] == 8
    assert found["best"]["share"]["value"] == 0.0 and found["best"]["over_chance"]["value"] == pytest.approx(-0.1)
    assert found["mean"]["share"]["value"] == pytest.approx((0.8 / 3 + 0.4 / 3) / 2)
    assert "below chance" in attention.findings({**row})[3]


def test_clips_without_a_control_are_left_out_of_its_difference() -> None:
    """A clip that is full of events has no quiet moment to compare with."""
    share = np.full((1, 1), 0.6)
    clips = [Score(share, 0.2, np.full((1, 1), 0.5)), Score(share + 0.3, 0.2, None)]
    found = attention._figures(clips, (0, 0))
    assert found["control"] == 0.5 and found["over_control"]["value"] == pytest.approx(0.1)
    assert found["share"]["value"] == pytest.approx(0.75) and found["over_chance"]["value"] == pytest.approx(0.55)
    assert attention._figures(clips[1:], (0, 0))["over_control"] is None


def test_sides_of_a_caption_are_exchanged() -> None:
    words = "a red ball bounces on the left and a blue box swings on the right"
    assert attention.exchanged_sides(words) == "a red ball bounces on the right and a blue box swings on the left"
