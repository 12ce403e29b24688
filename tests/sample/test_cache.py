"""Caches across steps: bits when off, what is computed when on, and clips that do not depend on their batch."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from javis.cache_options import CacheConfig
from javis.errors import UsageError
from javis.flow import timesteps
from javis.model.dit import Conditioning, JavisDiT, StepStart, Velocity
from javis.model.ops import ModelOps
from javis.sample import sample, sample_in_order
from javis.sample.cache import CachedDenoiser, relative_change
from javis.sample.graph import GraphedDenoiser
from tests.model.small import frame_masks, make_inputs, pick, small_config, small_model
from tests.sample.test_graph import Recorder

STEPS, DEPTH = 5, 3
ALWAYS = {"video": math.inf, "audio": math.inf}
STREAMS = ("video", "audio")


def model_of(**changes: Any) -> JavisDiT:
    return small_model(depth=DEPTH, **changes)


def setting(kind: Any = "first-block", **changes: Any) -> CacheConfig:
    return CacheConfig(kind=kind, **changes)


@torch.no_grad()
def clip(model: JavisDiT, batch: int = 2, seed: int = 0) -> tuple[tuple[Tensor, Tensor], Conditioning]:
    noisy, told = make_inputs(model.config, batch, seed=seed)
    return (noisy["video"], noisy["audio"]), model.condition(**told)


def clip_of(model: JavisDiT, rows: slice, batch: int = 2, seed: int = 0) -> Conditioning:
    """Conditioning of some samples, computed from their captions alone."""
    with torch.no_grad():
        return model.condition(**pick(make_inputs(model.config, batch, seed=seed)[1], rows))


def count_blocks(model: JavisDiT) -> Counter[str]:
    """Calls of the blocks from now on, by stream and for the bidirectional attention."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        return lambda *_: calls.update([name])

    for layer in model._layers:
        for name, block in layer.blocks().items():
            block.register_forward_hook(counted("both" if name == "bidirectional" else name.split("_")[0]))
    return calls


def loop(
    model: Any, noise: tuple[Tensor, Tensor], condition: Conditioning, steps: int = STEPS, **options: Any
) -> tuple[Tensor, Tensor]:
    return sample(model, *noise, condition, timesteps(steps, 2.0), **options)


def at(model: Any, z: tuple[Tensor, Tensor], t: float, condition: Conditioning, **masks: Tensor) -> Velocity:
    with torch.no_grad():
        return model.denoise(*z, torch.full((len(z[0]),), t), condition, **masks)


# -- off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(),
        setting("first-block"),
        setting("tea"),
        setting("attention"),
        setting("first-block", video=1e-30, audio=1e-30),
        setting("tea", video=1e-30),
        setting("attention", temporal=2, prior=3, text=4, low=0.0, high=0.5),
    ],
    ids=["none", "first-block", "tea", "attention", "first-block tiny", "tea tiny", "attention elsewhere"],
)
def test_off_or_never_reused_gives_the_same_bits(config: CacheConfig) -> None:
    model = model_of()
    noise, condition = clip(model)
    cached = CachedDenoiser(model, config)
    for options in ({}, {"video_mask": torch.tensor([[0.0, 1, 1], [1, 1, 1]])}):
        expected = loop(model, noise, condition, **options)
        for a, e in zip(loop(cached, noise, condition, **options), expected, strict=True):
            assert torch.equal(a, e)
    done = cached.report()["computed"]
    assert done in (
        {"video": 1.0, "audio": 1.0},
        {name: {"temporal": 1.0, "prior": 1.0, "text": 1.0} for name in STREAMS},
    )


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "video", "audio", "both"),
    [
        # layers: all three in the first evaluation, then one (first-block) or none (tea) in each of four
        (setting("first-block", **ALWAYS), 3 + 4, 3 + 4, 3 + 4),
        (setting("tea", **ALWAYS), 3, 3, 3),
        (setting("first-block", video=math.inf), 3 + 4, 15, 3 + 4),
        (setting("tea", audio=math.inf), 15, 3, 3),
        # all, two re-uses, all, one re-use
        (setting("tea", **ALWAYS, most=2), 6, 6, 6),
        (setting("first-block", video=math.inf, most=1), 3 + 1 + 3 + 1 + 3, 15, 3 + 1 + 3 + 1 + 3),
    ],
)
def test_layers_that_are_computed(config: CacheConfig, video: int, audio: int, both: int) -> None:
    model = model_of()
    noise, condition = clip(model)
    calls = count_blocks(model)
    cached = CachedDenoiser(model, config)
    loop(cached, noise, condition)
    assert calls == {"video": 3 * video, "audio": 3 * audio, "both": both}
    shares = {"video": round(video / 15, 4), "audio": round(audio / 15, 4)}
    assert cached.report(1)["computed"] == shares


def test_attentions_that_are_computed() -> None:
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[f"{name} {args[1]}" if name == "factorized_attention" else name] += 1
            return getattr(ModelOps(), name)(*args, **kwargs)

        return call

    names = ("factorized_attention", "text_cross_attention", "folded_prior_injection", "prior_injection")
    model = JavisDiT(small_config(depth=1), ModelOps(**{name: counted(name) for name in names})).eval()
    model.load_state_dict(small_model(depth=1).state_dict())
    noise, condition = clip(model)
    config = setting("attention", temporal=2, prior=3, text=5, audio_text=1, low=200.0, high=999.0)
    cached = CachedDenoiser(model, config)
    for t in (1000.0, 900.0, 800.0, 700.0, 600.0, 100.0):
        at(cached, noise, t, condition)
    prior = counts.pop("prior_injection", 0) + counts.pop("folded_prior_injection", 0)
    # Outside of 200..999 everything is computed: in the first and the last of six evaluations.
    assert counts == {
        "factorized_attention spatial": 2 * 6,
        "factorized_attention temporal": 2 * (1 + 2 + 1),
        "text_cross_attention": 2 * (1 + 1 + 1) + 2 * 6,
    }
    assert prior == 2 * 2 * (1 + 2 + 1)
    assert cached.report()["computed"] == {
        "video": {"temporal": round(4 / 6, 4), "prior": round(4 / 6, 4), "text": 0.5},
        "audio": {"temporal": round(4 / 6, 4), "prior": round(4 / 6, 4), "text": 1.0},
    }


@pytest.mark.parametrize("kind", ["first-block", "tea", "attention"])
def test_what_has_not_changed_is_reused_without_error(kind: Any) -> None:
    """The same latents at the same time twice: all that is re-used is what would be computed."""
    model = model_of()
    noise, condition = clip(model)
    expected = at(model, noise, 700.0, condition)
    limits = {"temporal": 2, "prior": 2, "text": 2} if kind == "attention" else {"video": 0.01, "audio": 0.01}
    calls = count_blocks(model)
    cached = CachedDenoiser(model, setting(kind, **limits))
    for _ in range(2):
        for a, e in zip(at(cached, noise, 700.0, condition), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    if kind != "attention":
        assert calls["video"] == 3 * (DEPTH + (1 if kind == "first-block" else 0))


# -- its error ---------------------------------------------------------------------------------------------------------


def constant_layers(model: JavisDiT) -> None:
    """Every block adds ``gate(t) * bias`` of its MLP and nothing else: what a layer adds depends on the time alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers.") and (".proj." in name or "mlp.fc2.weight" in name or "_out." in name):
                parameter.zero_()


def gained(model: JavisDiT, stream: str, start: StepStart) -> list[Tensor]:
    """What each layer of `constant_layers` adds to a stream, [B, C] each, from the gates by hand."""
    step = start.video_step if stream == "video" else start.audio_step
    layers = []
    for layer in model._layers:
        total = torch.zeros(())
        for name in ("spatial", "temporal", "prior"):
            block = getattr(layer, f"{stream}_{name}")
            time = step.prior_time if name == "prior" else step.time
            gate = block.modulation[-1] + time.unflatten(-1, block.modulation.shape)[:, -1]
            total = total + gate * block.mlp.fc2.bias
        layers.append(total)
    return layers


@pytest.mark.parametrize("kind", ["first-block", "tea"])
@torch.no_grad()
def test_error_in_closed_form(kind: Any) -> None:
    """Layers re-used from t1 at t2 are wrong by the sum of (gate(t1) - gate(t2)) * bias over them."""
    model = model_of()
    constant_layers(model)
    noise, condition = clip(model)
    cached = CachedDenoiser(model, setting(kind, **ALWAYS))
    first, second = 900.0, 300.0
    at(cached, noise, first, condition)
    actual = at(cached, noise, second, condition)
    starts = {t: model.begin(*noise, torch.full((2,), t), condition) for t in (first, second)}
    alone = 1 if kind == "first-block" else 0
    tokens = []
    for name in STREAMS:
        now, then = gained(model, name, starts[second]), gained(model, name, starts[first])
        added = sum([*now[:alone], *then[alone:]])
        assert float((added - sum(now)).abs().max()) > 0.05  # the error is there
        tokens.append(getattr(starts[second], name) + added[:, None])
    expected = model.finish(*tokens, starts[second], *noise, torch.full((2,), second), condition)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alone", STREAMS)
@torch.no_grad()
def test_a_stream_computed_alone_keeps_what_the_other_gave_it(alone: str) -> None:
    model = model_of()
    noise, condition = clip(model)
    other = "audio" if alone == "video" else "video"
    cached = CachedDenoiser(model, setting("tea", **{other: math.inf}))
    at(cached, noise, 900.0, condition)
    actual = at(cached, noise, 300.0, condition)
    given, x = [], dict(zip(STREAMS, model.begin(*noise, torch.full((2,), 900.0), condition)[:2], strict=True))
    start = model.begin(*noise, torch.full((2,), 900.0), condition)
    for number in range(DEPTH):
        x = {name: model.stream(name, number, z, start, condition) for name, z in x.items()}  # type: ignore[arg-type]
        met = dict(zip(STREAMS, model.meet(number, x["video"], x["audio"], condition), strict=True))
        given.append(met[alone] - x[alone])
        x = met
    old = {name: x[name] - getattr(start, name) for name in STREAMS}
    start = model.begin(*noise, torch.full((2,), 300.0), condition)
    z = getattr(start, alone)
    for number in range(DEPTH):
        z = model.stream(alone, number, z, start, condition) + given[number]  # type: ignore[arg-type]
    tokens = {alone: z, other: getattr(start, other) + old[other]}
    expected = model.finish(tokens["video"], tokens["audio"], start, *noise, torch.full((2,), 300.0), condition)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_smaller_thresholds_come_closer() -> None:
    model = model_of()
    noise, condition = clip(model)
    exact = loop(model, noise, condition, 10)
    errors, shares = [], []
    for threshold in (math.inf, 0.9, 0.0):
        cached = CachedDenoiser(model, setting("first-block", video=threshold, audio=threshold))
        made = loop(cached, noise, condition, 10)
        errors.append(max(float((a - e).abs().max()) for a, e in zip(made, exact, strict=True)))
        shares.append(cached.report()["computed"]["video"])
    assert errors[0] > errors[1] > errors[2] == 0 and shares[0] < shares[1] < shares[2] == 1


# -- whose decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["first-block", "tea"])
def test_a_clip_does_not_depend_on_its_batch(kind: Any) -> None:
    """Rows 0 and 2, and 1 and 3, are clips with guidance. The second clip's latents are large: it changes otherwise."""
    model = model_of()
    noise, condition = clip(model, 4)
    scale = torch.tensor([0.3, 3.0])
    noise = tuple(z[:2] * scale.view(-1, *[1] * (z.ndim - 1)) for z in noise)  # type: ignore[assignment]
    differed = False
    for threshold in (0.7, 0.95):
        config = setting(kind, video=threshold, audio=threshold)
        together = CachedDenoiser(model, config, clips=2)
        made = loop(together, noise, condition, 10, guidance=3.0)
        for i in range(2):
            alone = CachedDenoiser(model, config, clips=1)
            own = clip_of(model, slice(i, None, 2), 4)
            expected = loop(alone, tuple(z[i : i + 1] for z in noise), own, 10, guidance=3.0)  # type: ignore[arg-type]
            for a, e in zip(made, expected, strict=True):
                torch.testing.assert_close(a[i : i + 1], e, rtol=1e-3, atol=1e-3)
            assert alone.report() == together.report(i)
        differed |= together.report(0) != together.report(1) and together.report(0)["computed"]["video"] < 1
    assert differed


def test_the_halves_of_guidance_decide_as_one() -> None:
    new, old = torch.ones(4, 3, 2), torch.ones(4, 3, 2)
    new[3] += 0.5
    assert relative_change(new, old, 2).tolist() == [0.0, 0.5] and relative_change(new, old, 4).tolist()[1] == 0.0
    x, y = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    expected = np.abs(x.numpy() - y.numpy()).sum((1, 2)) / np.abs(y.numpy()).sum((1, 2))
    np.testing.assert_allclose(relative_change(x, y, 2).numpy(), expected, rtol=1e-12)


# -- when a clip begins ------------------------------------------------------------------------------------------------


def test_nothing_is_taken_from_another_clip() -> None:
    model = model_of()
    cached = CachedDenoiser(model, setting("tea", **ALWAYS))
    noise, condition = clip(model)
    at(cached, noise, 500.0, condition)
    for name, other, t, masks in (
        ("conditioning", replace(condition), 400.0, {}),
        ("time goes up", condition, 900.0, {}),
        ("masks", condition, 800.0, frame_masks(2)),
        ("other masks", condition, 700.0, {k: ~v for k, v in frame_masks(2).items()}),
        ("no masks", condition, 600.0, {}),
    ):
        for a, e in zip(at(cached, noise, t, other, **masks), at(model, noise, t, other, **masks), strict=True):
            assert torch.equal(a, e), name
    later = at(cached, noise, 500.0, condition)
    assert not torch.equal(later.video, at(model, noise, 500.0, condition).video)  # as it was, it is re-used
    cached.reset()
    assert torch.equal(at(cached, noise, 400.0, condition).video, at(model, noise, 400.0, condition).video)


def test_the_sound_first_begins_anew() -> None:
    """The second half of the steps has masks and starts at 1000 again: its first evaluation is complete."""
    model = model_of()
    noise, condition = clip(model)
    calls = count_blocks(model)
    sample_in_order(CachedDenoiser(model, setting("tea", **ALWAYS)), *noise, condition, 6, order="sound_first")
    assert calls == {"video": 3 * 2 * DEPTH, "audio": 3 * 2 * DEPTH, "both": 2 * DEPTH}


def test_two_conditionings_side_by_side_and_their_memory() -> None:
    """As where guidance is left out in some steps: each has its own state, and a clip that is gone holds nothing."""
    model = model_of()
    noise, both = clip(model)
    half = clip_of(model, slice(0, 1))
    calls = count_blocks(model)
    cached = CachedDenoiser(model, setting("tea", **ALWAYS), clips=1)
    for t in (900.0, 800.0, 700.0):
        at(cached, noise, t, both)
        at(cached, tuple(z[:1] for z in noise), t, half)  # type: ignore[arg-type]
    assert calls["video"] == 3 * 2 * DEPTH
    added = weakref.ref(cached._states[0].streams["video"].added)
    del both
    gc.collect()
    at(cached, tuple(z[:1] for z in noise), 600.0, half)  # type: ignore[arg-type]
    assert added() is None and len(cached._states) == 1


# -- what it cannot be combined with -----------------------------------------------------------------------------------


def test_refused() -> None:
    model = model_of()
    with pytest.raises(UsageError, match="CUDA graph replays one decision"):
        CachedDenoiser(GraphedDenoiser(model, backend=Recorder()), setting(video=0.1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a Linear holds a share of them in each process"):
        CachedDenoiser(nn.Linear(1, 1), setting(video=0.1))  # type: ignore[arg-type]
    noise, condition = clip(model)
    cached = CachedDenoiser(model, setting(video=0.1), clips=3)
    with pytest.raises(ValueError, match="2 samples are no multiple of the 3 clips"):
        at(cached, noise, 500.0, condition)
    with pytest.raises(ValueError, match=r"one timestep for all samples, got 100.0 to 200.0"):
        CachedDenoiser(model, setting(video=0.1)).denoise(*noise, torch.tensor([100.0, 200.0]), condition)


@pytest.mark.slow
def test_compiled_blocks_hold_their_outputs() -> None:
    from javis.compiled import compile_blocks

    config = setting("attention", temporal=2, prior=2, text=3)
    model = model_of()
    noise, condition = clip(model)
    expected = loop(CachedDenoiser(model, config), noise, condition)
    compile_blocks(model, backend="eager")
    for a, e in zip(loop(CachedDenoiser(model, config), noise, condition), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
