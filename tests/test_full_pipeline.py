"""The full-size pipeline at toy size: the classes of the real one, few channels and layers, random weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from javis import JavisPipeline, batches, component_specs, components
from javis.clip_batch import ClipBatch
from javis.durations import clip_length
from javis.errors import UsageError
from javis.generation import clip_noise
from javis.model.dit import JavisDiT

PROMPTS = ["Rain falls on a tin roof.", "a dog barks twice", "a train passes by, then a bell rings"]
QUICK: dict[str, Any] = {"steps": 2, "seconds": 0.3}


@pytest.fixture(scope="module")
def toy() -> JavisPipeline:
    return JavisPipeline.with_random_weights("toy", device="cpu")


def check_same(a: ClipBatch, b: ClipBatch) -> None:
    """As far as batching allows: a level of the picture, the fourth decimal of the sound."""
    assert a.video.shape == b.video.shape and a.audio.shape == b.audio.shape
    assert np.abs(a.video.astype(int) - b.video.astype(int)).max() <= 1
    assert np.abs(a.audio - b.audio).max() < 1e-4
    assert a.video.std() > 1 and np.abs(a.audio).max() > 1e-3  # there is something to compare


def check_equal(a: ClipBatch, b: ClipBatch) -> None:
    assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)


# -- a clip -----------------------------------------------------------------------------------------------------------


def test_from_text_to_a_file(toy: JavisPipeline, tmp_path: Path) -> None:
    clip = toy(PROMPTS[0], seed=3)
    assert clip.video.shape == (1, 12, 64, 64, 3) and clip.video.dtype == np.uint8  # 0.5 s at 24 a second
    assert clip.audio.shape == (1, 8000) and clip.audio.dtype == np.float32
    assert (clip.fps, clip.sample_rate, clip.seconds, clip.steps, clip.guidance) == (24, 16000, 0.5, 4, 7.0)
    assert clip.random_weights and toy.random_weights
    assert clip.prompts == ["rain falls on a tin roof. aesthetic score: 6.5."]
    assert set(clip.seconds_per_stage) == {"text", "prior", "condition", "denoise", "video_decode", "audio_decode"}
    assert clip.save(tmp_path / "clip.mp4").stat().st_size > 1000
    check_equal(clip, toy(PROMPTS[0], seed=3))
    other = toy(PROMPTS[0], seed=4)
    assert np.abs(clip.video.astype(int) - other.video).max() > 5 and np.abs(clip.audio - other.audio).max() > 1e-3


def test_a_clip_depends_on_its_seed_and_not_on_the_batch(toy: JavisPipeline) -> None:
    seeds = [11, 5, 2**62 + 1]
    clips = toy(PROMPTS, seed=seeds, **QUICK)
    check_same(clips, toy(PROMPTS, seed=seeds, batch_size=2, **QUICK))
    for i in range(3):
        single = toy(PROMPTS[i], seed=seeds[i], **QUICK)
        assert np.abs(single.video[0].astype(int) - clips.video[i]).max() <= 1
        assert np.abs(single.audio[0] - clips.audio[i]).max() < 1e-4


@pytest.mark.parametrize("name", ["text_encoder", "prior_text_encoder"])
def test_both_text_encoders_tell_the_model_something(
    toy: JavisPipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = toy(PROMPTS[0], seed=1, guidance=1, **QUICK)
    encoder = getattr(toy, name)
    monkeypatch.setattr(toy, name, lambda captions: encoder(["nothing of the kind"] * len(captions)))
    after = toy(PROMPTS[0], seed=1, guidance=1, **QUICK)
    assert not np.array_equal(before.video, after.video) and not np.array_equal(before.audio, after.audio)


def test_one_generator_or_one_per_prompt(toy: JavisPipeline) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in (1, 2)]

    clips = toy(PROMPTS[:2], generator=generators(), **QUICK)
    assert clips.seeds == toy(PROMPTS[:2], generator=generators(), **QUICK).seeds
    assert clips.seeds[0] == toy(PROMPTS[0], generator=generators()[0], **QUICK).seeds[0]
    with pytest.raises(UsageError, match="2 generators for 1 prompts"):
        toy(PROMPTS[0], generator=generators(), **QUICK)


@pytest.mark.parametrize(
    ("options", "shape", "samples"),
    [
        ({"fps": 10, "seconds": 0.5}, (5, 64, 64), 8000),
        ({"fps": 23.976, "seconds": 0.75}, (18, 64, 64), 12012),  # two windows of 17 frames, 16 of them cut
        ({"resolution": "32x48"}, (7, 48, 32), 4667),
        ({"resolution": "144p", "ratio": "16:9"}, (7, 256, 144), 4667),
        ({"resolution": "144p", "ratio": "9:21"}, (7, 120, 288), 4667),  # 125 x 291: what fills no latent is cut
    ],
)
def test_formats(toy: JavisPipeline, options: dict[str, Any], shape: tuple[int, ...], samples: int) -> None:
    clip = toy(PROMPTS[0], seed=0, **(QUICK | {"steps": 1, "guidance": 1} | options))
    assert clip.video.shape == (1, *shape, 3) and clip.audio.shape == (1, samples)
    assert clip.fps == options.get("fps", 24)
    assert abs(clip.audio.shape[1] / 16000 - clip.video.shape[1] / clip.fps) < 1 / 16000


# -- what the model is asked ------------------------------------------------------------------------------------------


def test_sampling_is_the_official_one(toy: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop of its own: no batched guidance, timesteps and update written out, one call per sample."""
    steps, guidance, seed, (height, width) = 3, 7.0, 5, (96, 64)
    seen: list[tuple[Tensor, Tensor]] = []
    asked: list[dict[str, Any]] = []
    decode, condition = batches.decode, JavisDiT.condition

    def decoding(pipe: JavisPipeline, video: Tensor, audio: Tensor, *rest: Any) -> Any:
        seen.append((video, audio))
        return decode(pipe, video, audio, *rest)

    def conditioning(model: JavisDiT, text: Tensor, **told: Any) -> Any:
        asked.append(told)
        return condition(model, text, **told)

    monkeypatch.setattr(batches, "decode", decoding)
    monkeypatch.setattr(JavisDiT, "condition", conditioning)
    toy(PROMPTS[0], seed=seed, steps=steps, guidance=guidance, seconds=1.0, fps=20, resolution="64x96")
    monkeypatch.undo()

    length = clip_length(1.0, 20, 16000, window=17)
    assert (length.frames, length.model_frames) == (20, 34)
    told = asked[0]
    assert told["fps"].tolist() == [20.0] * 2
    assert (told["height"].tolist(), told["width"].tolist()) == ([height] * 2, [width] * 2)
    assert told["video_sizes"] == (10, 12, 8)  # two windows of 5 latents
    assert told["audio_sizes"] == (48, 16)  # 1.7 s: 170 mel frames, up to 192, over 4

    caption = toy.captions([PROMPTS[0]])
    text, mask = toy.text_encoder(caption)
    assert toy.prior_text_encoder is not None
    priors = toy.estimate_priors(toy.prior_text_encoder(caption)[0], [seed])
    model, device = toy.model, torch.device("cpu")
    sizes = {name: told[name] for name in ("video_sizes", "audio_sizes")}
    sizes |= {name: told[name][:1] for name in ("fps", "height", "width")}
    null_spatial, null_temporal = (null[None] for null in model.null_prior)
    with torch.no_grad():
        prompted = model.condition(
            text, text_mask=mask, spatial_prior=priors.spatial, temporal_prior=priors.temporal, **sizes
        )
        null = model.condition(
            model.null_text[None], text_mask=mask, spatial_prior=null_spatial, temporal_prior=null_temporal, **sizes
        )
        z = [clip_noise((4, 10, 12, 8), [seed], 1, device), clip_noise((8, 48, 16), [seed], 2, device)]
        ratio = math.sqrt(height * width / 512**2) * math.sqrt(34 // 17 * 5)
        times = [1 - i / steps for i in range(steps)]
        times = [ratio * t / (1 + (ratio - 1) * t) for t in times] + [0.0]
        for now, after in pairwise(times):
            t = torch.tensor([1000 * now])
            for_prompt, for_null = (model.denoise(z[0], z[1], t, c) for c in (prompted, null))
            for i in range(2):
                channels = z[i].shape[1]
                assert for_prompt[i].shape[1] == 2 * channels  # the second half, sigma, is not used
                velocity, other = for_prompt[i][:, :channels], for_null[i][:, :channels]
                z[i] = z[i] + (other + guidance * (velocity - other)) * (now - after)
    for made, expected in zip(seen[0], z, strict=True):
        assert expected.std() > 0.1
        torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-4)


def test_the_defaults_are_the_official_ones() -> None:
    description = components._description({"components": {}})
    assert (description["sampling"]["steps"], description["sampling"]["guidance"]) == (30, 7.0)
    assert (description["clip"]["fps"], description["clip"]["sample_rate"]) == (24, 16000)
    configs = component_specs.configurations("full")
    assert (configs["model"].depth, configs["model"].hidden_size, configs["text_encoder"].max_length) == (28, 1152, 300)
    component_specs.check_fit({name: type("Part", (), {"config": config}) for name, config in configs.items()})


def test_callbacks_see_and_replace_latents(toy: JavisPipeline) -> None:
    calls: list[tuple[int, float]] = []
    latents = {"video_latents": torch.randn(2, 4, 5, 8, 8), "audio_latents": torch.randn(2, 8, 24, 16)}

    def see(pipe: JavisPipeline, step: int, timestep: float, given: dict[str, Tensor]) -> None:
        assert pipe is toy and {n: v.shape[1:] for n, v in given.items()} == {
            n: v.shape[1:] for n, v in latents.items()
        }
        calls.append((step, timestep))

    plain = toy(PROMPTS, seed=1, batch_size=2, callback_on_step_end=see, **QUICK)
    check_same(plain, toy(PROMPTS, seed=1, batch_size=2, **QUICK))
    assert [step for step, _ in calls] == [0, 1, 0, 1]
    assert calls[0][1] == pytest.approx(1000) and 0 < calls[1][1] < 999

    def put(pipe: JavisPipeline, step: int, timestep: float, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return latents if step == 1 else None

    def put_video(pipe: JavisPipeline, step: int, timestep: float, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"video_latents": latents["video_latents"]}

    replaced = toy(PROMPTS[:2], seed=1, callback_on_step_end=put, **QUICK)
    length = clip_length(0.3, 24, 16000, window=17)
    picture, sound = batches.decode(toy, latents["video_latents"], latents["audio_latents"], [1, 2], length)
    assert np.array_equal(replaced.video, picture) and np.array_equal(replaced.audio, sound)
    only_video = toy(PROMPTS[:2], seed=1, callback_on_step_end=put_video, **QUICK)
    assert np.array_equal(only_video.video, picture) and not np.array_equal(only_video.audio, sound)
    with pytest.raises(ValueError, match="in place of"):
        toy(PROMPTS[0], callback_on_step_end=lambda *_: {"video_latents": torch.zeros(1)}, **QUICK)


# -- where and in what ------------------------------------------------------------------------------------------------


def test_bfloat16_weights_make_a_clip_like_float32(toy: JavisPipeline, tmp_path: Path) -> None:
    half = JavisPipeline.from_pretrained(toy.save_pretrained(tmp_path / "toy"), device="cpu", dtype=torch.bfloat16)
    a, b = (pipe(PROMPTS[0], seed=3, guidance=1, **QUICK) for pipe in (toy, half))
    for x, y in ((a.video, b.video), (a.audio, b.audio)):
        error = (x.astype(float) - y).std() / x.std()
        assert 0 < error < 0.3  # the same clip but for the rounding: of unrelated ones it is about 1.4
    half.to(dtype=torch.float32)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_random_weights_are_random_everywhere_and_repeatable(toy: JavisPipeline) -> None:
    again = JavisPipeline.with_random_weights("toy", device="cpu")
    other = JavisPipeline.with_random_weights("toy", seed=100, device="cpu")
    for name, component in toy.components.items():
        same = dict(again.components[name].named_parameters())
        differs = dict(other.components[name].named_parameters())
        for key, parameter in component.named_parameters():
            assert torch.equal(parameter, same[key]), key
            assert not parameter.requires_grad
            if parameter.ndim > 1:
                assert parameter.any(), key
                assert not torch.equal(parameter, differs[key]), key


@pytest.mark.parametrize("policy", ["offload", "staged"])
def test_residency_changes_no_bit(toy: JavisPipeline, tmp_path: Path, policy: Any) -> None:
    folder = toy.save_pretrained(tmp_path / "toy")
    pipe = JavisPipeline.from_pretrained(folder, device="cpu", residency=policy)
    assert pipe.residency.policy == policy
    check_equal(pipe(PROMPTS[:2], seed=1, **QUICK), toy(PROMPTS[:2], seed=1, **QUICK))
    assert {record.stage for record in pipe.residency.records} >= {"text", "prior", "denoise", "video_decode"}
    pipe.residency.release()
    if policy == "staged":
        assert all(p.is_meta for p in pipe.model.parameters())
        with pytest.raises(UsageError, match="not in memory"):
            pipe.save_pretrained(tmp_path / "again")


def test_an_offloaded_pipeline(toy: JavisPipeline) -> None:
    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    pipe.enable_model_cpu_offload("cpu")
    born = JavisPipeline.with_random_weights("toy", device="cpu", residency="offload")
    for offloaded in (pipe, born):
        assert offloaded.residency.policy == "offload"
        check_equal(offloaded(PROMPTS[0], seed=1, **QUICK), toy(PROMPTS[0], seed=1, **QUICK))
    with pytest.raises(UsageError, match="cannot be loaded again"):
        pipe.set_residency("staged")
    with pytest.raises(UsageError, match="cannot be loaded again"):
        JavisPipeline.with_random_weights("toy", device="cpu", residency="staged")
    with pytest.raises(UsageError, match="moved by the residency"):
        pipe.to("cpu")


@pytest.mark.parametrize("wanted", [True, False])
def test_the_progress_bar(toy: JavisPipeline, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    seen: list[float] = []
    totals: list[int] = []

    @contextlib.contextmanager
    def bar(label: str, total: int) -> Iterator[Any]:
        totals.append(total)
        yield seen.append

    monkeypatch.setattr(batches, "progress_bar", bar)
    monkeypatch.setattr(toy, "shows_progress", True)
    toy.set_progress_bar_config(disable=not wanted)
    toy(PROMPTS, seed=1, batch_size=2, **QUICK)
    assert (totals, seen) == (([4], [1, 2, 3, 4]) if wanted else ([], []))
    toy(PROMPTS[0], seed=1, progress=lambda *_: None, **QUICK)
    assert len(totals) == wanted  # whoever wants to know gets no bar


# -- unusable arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty prompt"),
        (" \n\t", {}, "empty prompt"),
        ([], {}, "no prompt"),
        ("a " * 5000, {}, "10000 characters"),
        ("caf\udce9", {}, "not text in UTF-8"),
        ("rain", {"negative_prompt": "  "}, "empty prompt"),
        ("rain", {"negative_prompt": "a.png"}, "nothing is left of the prompt 'a.png'"),
        ("rain", {"seconds": 0}, "seconds must be above 0"),
        ("rain", {"seconds": 61}, "at most 60"),
        ("rain", {"seconds": math.nan}, "seconds"),
        ("rain", {"fps": 0}, "fps must be"),
        ("rain", {"resolution": "huge"}, "unknown resolution 'huge'"),
        ("rain", {"resolution": "100x100"}, "the nearest is 96x96"),
        ("rain", {"resolution": "240p", "ratio": "1:7"}, "no size for the ratio"),
        ("rain", {"steps": 0}, "steps"),
        ("rain", {"guidance": -1}, "guidance"),
    ],
)
def test_unusable_arguments(toy: JavisPipeline, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        toy(prompt, **(QUICK | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "quantum"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(UsageError, match="device"):
        JavisPipeline.with_random_weights("toy", device=device)


def test_an_unknown_size() -> None:
    with pytest.raises(UsageError, match="unknown size 'huge'; expected full or toy"):
        JavisPipeline.with_random_weights("huge")  # type: ignore[arg-type]


# -- the whole architecture -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_width_at_reduced_depth(tmp_path: Path) -> None:
    """Every component in its official width, with one layer where it has many; 64x64, from text to mp4."""
    from javis.media import read_clip

    full = component_specs.configurations("full")
    fewer = {
        "model": replace(full["model"], depth=1),
        "text_encoder": replace(full["text_encoder"], num_layers=1),
        "prior_text_encoder": replace(full["prior_text_encoder"], layers=1),
    }
    pipe = components.with_random_weights(JavisPipeline, "full", device="cpu", configs=fewer)
    clip = pipe(PROMPTS[0], seed=0, resolution="64x64", seconds=0.5, steps=2)
    assert clip.video.shape == (1, 12, 64, 64, 3) and clip.audio.shape == (1, 8000)
    assert np.isfinite(clip.audio).all() and clip.video.std() > 1
    back = read_clip(clip.save(tmp_path / "clip.mp4"))
    assert (len(back.video), len(back.audio)) == (12, 8000)
