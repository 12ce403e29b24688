"""What sampling computes in another way than training, once per clip, gives the same: folded priors, cut captions."""

from __future__ import annotations

import pytest
import torch

from javis.model.blocks import CrossAttention, FoldedPrior, KeyValue
from javis.model.ops import ModelOps, cross_attention, fold_prior, folded_prior_injection
from tests.model.small import make_inputs, pick, small_model


def test_folded_equals_unfolded_in_float64() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(24, 3, ModelOps()).double().requires_grad_(False)
    for linear in (attention.q, attention.kv, attention.proj):
        torch.nn.init.normal_(linear.weight)
        torch.nn.init.normal_(linear.bias)
    y, tokens = torch.randn(2, 7, 24).double(), torch.randn(2, 5, 24).double()
    k, v = attention.key_value(tokens)
    expected = attention.proj(cross_attention(attention.q(y), k, v))
    q, out = attention.q, attention.proj
    actual = folded_prior_injection(y, *fold_prior(k, v, q.weight, q.bias, out.weight, out.bias), heads=3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_a_model_without_gradients_folds_and_gives_the_same(scope: str) -> None:
    """2 heads of 3 and 5 keys are fewer columns than the width of 32; in float64 the algebra shows to 1e-10."""
    model = small_model().double()
    noisy, told = make_inputs(model.config)
    noisy, told = ({n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in d.items()}
                   for d in (noisy, told))  # fmt: skip
    told["prior_scope"] = scope
    condition = model.condition(**told)
    assert isinstance(condition.layers[0].video_prior[0], KeyValue)  # type: ignore[index]
    expected = model.denoise(**noisy, condition=condition)
    with torch.no_grad():
        folded = model.condition(**told)
        actual = model.denoise(**noisy, condition=folded)
    for layer in folded.layers:
        for prior in (*layer.video_prior, *layer.audio_prior):  # type: ignore[misc]
            assert isinstance(prior, FoldedPrior)
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0.05
        torch.testing.assert_close(a, e.detach(), rtol=1e-10, atol=1e-10)
    mixed = model.denoise(**noisy, condition=folded)  # folded outside, gradients inside: still differentiable
    assert mixed.video.requires_grad
    if scope == "sample":
        with torch.no_grad():
            alone = model.denoise(**pick(noisy, slice(1)), condition=model.condition(**pick(told, slice(1))))
        torch.testing.assert_close(alone.video, actual.video[:1], rtol=1e-10, atol=1e-10)


def test_many_keys_are_not_folded() -> None:
    """16 heads of 32 keys save nothing at width 64."""
    model = small_model(hidden_size=64, num_heads=16, spatial_prior_len=32, temporal_prior_len=1)
    _, told = make_inputs(model.config)
    with torch.no_grad():
        prior = model.condition(**told).layers[0].video_prior
    assert prior is not None
    assert isinstance(prior[0], KeyValue)
    assert isinstance(prior[1], FoldedPrior)


def test_sampling_drops_what_lies_behind_the_longest_caption() -> None:
    """... and gives what all tokens give with a mask, which is what training sees."""
    model = small_model().double()
    noisy, told = make_inputs(model.config)
    noisy, told = ({n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in d.items()}
                   for d in (noisy, told))  # fmt: skip
    length = model.config.caption_length
    told["text_mask"] = torch.tensor(
        [[True, False, True] + [False] * (length - 3), [True, True] + [False] * (length - 2)]
    )
    expected = model.denoise(**noisy, condition=model.condition(**told))
    with torch.no_grad():
        short = model.condition(**told)
        actual = model.denoise(**noisy, condition=short)
    assert short.text_mask is not None
    assert short.text_mask.tolist() == [[True, False, True], [True, True, False]]
    assert {kv.k.shape[2] for layer in short.layers for kv in layer.text} == {3}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-10, atol=1e-10)
    told["text_mask"] = torch.arange(length).lt(4).expand(2, -1)
    with torch.no_grad():
        assert model.condition(**told).text_mask is None  # two captions of four tokens need no mask
