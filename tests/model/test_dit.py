"""JavisDiT: the split into ``condition`` and ``denoise``, what a sample may see, given frames, sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT, Velocity

from .small import MODES, SIZES, check_equal, distance, frame_masks, make_inputs, pick, run, small_config, small_model

# -- condition once, denoise many --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_condition_then_denoise(masked: bool) -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    masks = frame_masks(2) if masked else {}
    with torch.no_grad():
        whole = model(**noisy, **masks, **{k: v for k, v in told.items() if not k.endswith("_sizes")})
    check_equal(whole, run(model, noisy, told, **masks), tolerance=0)


def test_conditioning_serves_all_timesteps_unchanged() -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    with torch.no_grad():
        kept = model.condition(**told)
        for t in (1000.0, 700.0, 12.5, 0.0):
            step = noisy | {"timestep": torch.full((2,), t)}
            again = model.denoise(**step, condition=kept)
            check_equal(again, run(model, step, told), tolerance=0)
            noisy = noisy | {"video": again.video[:, :4], "audio": again.audio[:, :8]}


# -- what a sample may see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_three_clips_in_a_batch_equal_three_single_ones(mode: str, masked: bool) -> None:
    model = small_model(prior_mode=mode)
    noisy, told = make_inputs(model.config, batch=3)
    masks = frame_masks(3) if masked else {}
    batch = run(model, noisy, told, **masks)
    for i in range(3):
        one = slice(i, i + 1)
        single = run(model, pick(noisy, one), pick(told, one), **pick(masks, one))
        check_equal(Velocity(batch.video[one], batch.audio[one]), single)


def test_batch_scope_lets_samples_see_each_other() -> None:
    model = small_model()
    noisy, told = make_inputs(model.config, batch=3)
    batch = run(model, noisy, told | {"prior_scope": "batch"})
    for i in range(3):
        one = slice(i, i + 1)
        alone = pick(noisy, one), pick(told, one) | {"prior_scope": "batch"}
        single = run(model, *alone)
        assert distance(Velocity(batch.video[one], batch.audio[one]), single) > 1e-3
        check_equal(single, run(model, pick(noisy, one), pick(told, one)))  # alone the scopes are the same


@pytest.mark.parametrize("spatial", [True, False])
def test_batch_scope_is_dense_attention_over_the_flattened_batch(spatial: bool) -> None:
    """The official computation: prior tokens repeated per frame (or place), one softmax over all of them."""
    model = small_model().double()
    block = model.layers[0].video_prior
    assert block is not None
    attention = block.spatial if spatial else block.temporal
    batch, frames, places, width, heads = 3, 4, 5, 32, 2
    g = torch.Generator().manual_seed(3)
    y = torch.randn(batch, frames * places, width, generator=g, dtype=torch.float64)
    tokens = torch.randn(batch, 3 if spatial else 5, width, generator=g, dtype=torch.float64)
    linear = {name: (p.detach().numpy()) for name, p in attention.attn.named_parameters()}
    repeated = tokens.repeat_interleave(frames if spatial else places, dim=0).reshape(-1, width).numpy()
    queries = y.reshape(-1, width).numpy() @ linear["q.weight"].T + linear["q.bias"]
    keys_values = repeated @ linear["kv.weight"].T + linear["kv.bias"]
    out = torch.zeros(batch * frames * places, width, dtype=torch.float64)
    size = width // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = torch.from_numpy(queries[:, part] @ keys_values[:, :width][:, part].T / size**0.5)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        out[:, part] = weights @ torch.from_numpy(keys_values[:, width:][:, part])
    expected = out.numpy() @ linear["proj.weight"].T + linear["proj.bias"]
    with torch.no_grad():
        actual = attention(y, attention.condition(tokens, 0, "batch"), frames, spatial)
    torch.testing.assert_close(actual, torch.from_numpy(expected).view_as(actual), rtol=1e-10, atol=1e-10)


def test_repeated_prior_tokens_change_nothing() -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    longer = small_model(spatial_prior_len=9, temporal_prior_len=10)
    state = {k: v for k, v in model.state_dict().items() if k != "embed.prior.null"}
    assert longer.load_state_dict(state, strict=False).missing_keys == ["embed.prior.null"]
    repeated = {"spatial_prior": told["spatial_prior"].repeat(1, 3, 1),
                "temporal_prior": told["temporal_prior"].repeat_interleave(2, dim=1)}  # fmt: skip
    check_equal(run(longer, noisy, told | repeated), run(model, noisy, told))


def test_masking_words_equals_leaving_them_out() -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    keep = torch.tensor([True, False, True, True, False, False])
    masked = run(model, noisy, told | {"text_mask": keep.expand(2, -1)})
    shorter = run(model, noisy, told | {"text": told["text"][:, keep], "text_mask": None})
    check_equal(masked, shorter)
    other_words = torch.where(keep[None, :, None], told["text"], torch.randn(2, 6, 8))
    check_equal(run(model, noisy, told | {"text": other_words, "text_mask": keep.expand(2, -1)}), masked, tolerance=0)


def test_left_out_blocks() -> None:
    """Without bidirectional attention the branches do not see each other; without priors the prior does not matter."""
    model = small_model()
    noisy, told = make_inputs(model.config)
    other = noisy | {"audio": torch.randn(2, 8, *SIZES[1])}
    apart = told | {"with_bidirectional": False}
    assert distance(run(model, noisy, told), run(model, other, told)) > 1e-3
    torch.testing.assert_close(run(model, noisy, apart).video, run(model, other, apart).video, rtol=0, atol=0)
    assert (run(model, noisy, told).video - run(model, other, told).video).abs().max() > 1e-4
    without = told | {"with_prior": False}
    other_prior = without | {"spatial_prior": None, "temporal_prior": None}
    check_equal(run(model, noisy, without), run(model, noisy, other_prior), tolerance=0)
    assert distance(run(model, noisy, told), run(model, noisy, without)) > 1e-3


# -- frames that are given ---------------------------------------------------------------------------------------------


def streams_before_the_final_layers(
    model: JavisDiT, noisy: dict[str, Tensor], told: dict[str, Any], **masks: Tensor
) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    finals = (model.video_final, model.audio_final)
    handles = [f.register_forward_pre_hook(lambda _module, args: seen.append(args[0])) for f in finals]
    run(model, noisy, told, **masks)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


def test_given_frames_are_modulated_as_at_timestep_0() -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    (frames, _, _), (bands, _) = SIZES
    everything = {"video_mask": torch.ones(2, frames).bool(), "audio_mask": torch.ones(2, bands).bool()}
    nothing = {name: ~mask for name, mask in everything.items()}
    check_equal(run(model, noisy, told, **everything), run(model, noisy, told))
    clean = noisy | {"timestep": torch.zeros(2)}
    at_zero = streams_before_the_final_layers(model, clean, told)
    given = streams_before_the_final_layers(model, noisy, told, **nothing)
    for a, e in zip(given, at_zero, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    mixed = streams_before_the_final_layers(model, noisy, told, video_mask=everything["video_mask"], **{
        "audio_mask": nothing["audio_mask"]})  # fmt: skip
    assert (mixed[0] - at_zero[0]).abs().max() > 1e-3


def test_final_layer_modulates_given_frames_twice() -> None:
    """Per frame and in float64: y = mod_t(x) for noisy frames, mod_0(mod_t(x)) for given ones."""
    layer = small_model().double().video_final
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, time, time0 = draw(2, 6, 32), draw(2, 32), draw(2, 32)
    mask = torch.tensor([[True, False, True], [False, False, True]])

    def modulate(row: Tensor, at: Tensor) -> Tensor:
        centred = row - row.mean()
        normed = centred / (centred.square().mean() + 1e-6).sqrt()
        return normed * (1 + layer.modulation[1] + at) + layer.modulation[0] + at

    with torch.no_grad():
        actual = layer(x, time, time0, mask)
        for b in range(2):
            for n in range(6):  # two places a frame
                y = modulate(x[b, n], time[b])
                if not mask[b, n // 2]:
                    y = modulate(y, time0[b])
                expected = layer.linear.weight @ y + layer.linear.bias
                torch.testing.assert_close(actual[b, n], expected, rtol=1e-10, atol=1e-10)


def test_mask_of_a_patch_is_that_of_its_first_latent() -> None:
    model = small_model()  # audio patch 4 in time
    noisy, told = make_inputs(model.config)
    first = torch.zeros(2, 10).bool()
    first[:, 4] = True
    whole = torch.zeros(2, 10).bool()
    whole[:, 4:8] = True
    check_equal(run(model, noisy, told, audio_mask=first), run(model, noisy, told, audio_mask=whole), tolerance=0)
    later = whole.clone()
    later[:, 4] = False
    assert distance(run(model, noisy, told, audio_mask=later), run(model, noisy, told, audio_mask=whole)) > 1e-3


# -- sizes and precision -----------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[JavisDiTConfig, tuple[tuple[int, ...], tuple[int, ...]], bool]:
    heads = draw(st.sampled_from([1, 2, 3]))
    config = small_config(
        depth=1,
        hidden_size=heads * draw(st.sampled_from([8, 12])),
        num_heads=heads,
        video_patch=draw(st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 2, 1), (1, 4, 2)])),
        audio_patch=draw(st.sampled_from([(4, 1), (2, 2), (4, 2), (2, 1)])),
        prior_mode=draw(st.sampled_from(MODES)),
        qk_norm=draw(st.booleans()),
        pred_sigma=draw(st.booleans()),
        clock=draw(st.booleans()),
        use_prior=draw(st.booleans()),
        use_bidirectional=draw(st.booleans()),
        spatial_prior_len=draw(st.integers(1, 5)),
    )
    sizes = (tuple(draw(st.integers(1, 5)) for _ in range(3)), (draw(st.integers(1, 11)), draw(st.integers(1, 5))))
    return config, sizes, draw(st.booleans())


@settings(max_examples=40, deadline=None)
@given(problem=problems(), batch=st.integers(1, 2))
def test_any_size_equals_its_padded_clip(
    problem: tuple[JavisDiTConfig, tuple[tuple[int, ...], tuple[int, ...]], bool], batch: int
) -> None:
    """Outputs have the size of the latents, and zeros added up to whole patches by hand change nothing."""
    config, sizes, masked = problem
    model = small_model(**config.to_dict())
    noisy, told = make_inputs(config, batch, sizes)
    whole = tuple(
        tuple(-(-n // p) * p for n, p in zip(size, patch, strict=True))
        for size, patch in zip(sizes, (config.video_patch, config.audio_patch), strict=True)
    )
    padded = dict(noisy)
    masks, padded_masks = {}, {}
    for name, size in zip(("video", "audio"), whole, strict=True):
        full = torch.zeros(*noisy[name].shape[:2], *size)
        full[tuple(slice(n) for n in noisy[name].shape)] = noisy[name]
        padded[name] = full
        if masked:
            mask = torch.rand(batch, noisy[name].shape[2], generator=torch.Generator().manual_seed(1)) < 0.5
            masks[f"{name}_mask"] = mask
            padded_masks[f"{name}_mask"] = torch.cat((mask, torch.ones(batch, size[0] - mask.shape[1]).bool()), 1)
    out = run(model, noisy, told, **masks)
    reference = run(model, padded, told | {"video_sizes": whole[0], "audio_sizes": whole[1]}, **padded_masks)
    factor = 2 if config.pred_sigma else 1
    assert out.video.shape == (batch, factor * config.video_channels, *sizes[0])
    assert out.audio.shape == (batch, factor * config.audio_channels, *sizes[1])
    for a, e in zip(out, reference, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e[tuple(slice(n) for n in a.shape)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_float32_agrees_with_float64(mode: str) -> None:
    model = small_model(prior_mode=mode)
    wide = copy.deepcopy(model).double()
    noisy, told = make_inputs(model.config)
    out, exact = run(model, noisy, told, **frame_masks(2)), run(wide, noisy, told, **frame_masks(2))
    assert exact.video.dtype == torch.float64
    for a, e in zip(out, exact, strict=True):
        assert (a - e).abs().max() < 2e-5 * e.abs().max()


def test_inputs_of_a_student() -> None:
    """Begins as its teacher whatever it is told; then each input changes the output; others are refused."""
    teacher = small_model()
    student = JavisDiT(small_config(guidance_input=True, step_input=True))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[1] for name in missing} == {"end", "guidance"}
    noisy, told = make_inputs(teacher.config)

    def asked(video: float = 2.0, audio: float = 4.0, end: float = 100.0) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return told | {"guidance": torch.tensor([[video, audio]]).expand(2, 2)}, {"end": torch.full((2,), end)}

    check_equal(run(student, noisy, asked()[0], **asked()[1]), run(teacher, noisy, told), tolerance=0)
    for embedder in student.embed.student_inputs():
        torch.nn.init.normal_(embedder.fc2.weight, std=0.1)
    first = run(student, noisy, asked()[0], **asked()[1])
    for other in (asked(video=2.01), asked(audio=4.01), asked(end=99.0)):
        assert distance(run(student, noisy, other[0], **other[1]).video, first.video) > 1e-5
    guided, end = asked()
    for model, conditions, step, message in (
        (teacher, told, end, "step_input only"),
        (teacher, guided, {}, "guidance_input only"),
        (student, told, end, "guidance was not given"),
        (student, guided, {}, "end was not given"),
        (student, told | {"guidance": torch.zeros(2)}, end, "guidance must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, noisy, conditions, **step)
