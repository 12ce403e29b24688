"""The plain PyTorch ops against separate float64 computations: loops, complex rotations, explicit softmaxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.model import ops
from javis.model.embed import PatchEmbed, rope_table, sinusoid, unpatchify, video_positions


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rotate(x: np.ndarray) -> np.ndarray:
    """RoPE as multiplication of complex numbers (x_2i + i x_2i+1) by exp(i p / 10000^(2i/D)); x [..., L, D]."""
    length, size = x.shape[-2:]
    turns = np.exp(1j * np.arange(length)[:, None] * 10000.0 ** (-2 * np.arange(size // 2) / size))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


# -- attention ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    axis=st.sampled_from(["temporal", "spatial"]),
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(1, 3), st.sampled_from([2, 8])
    ),
    normed=st.booleans(),
    rotated=st.booleans(),
)
def test_factorized_attention(axis: str, sizes: tuple[int, int, int, int, int], normed: bool, rotated: bool) -> None:
    batch, frames, places, heads, size = sizes
    qkv = 2 * draw(batch, frames, places, 3, heads, size)
    weights = (1 + draw(size, seed=1), 1 + draw(size, seed=2)) if normed else (None, None)
    length = frames if axis == "temporal" else places
    actual = ops.factorized_attention(
        qkv, axis, q_weight=weights[0], k_weight=weights[1], rope=rope_table(length, size) if rotated else None
    )
    assert actual.shape == (batch, frames * places, heads * size)
    x = qkv.double().numpy()
    expected = np.zeros((batch, frames, places, heads, size))
    for b in range(batch):
        for h in range(heads):
            for other in range(places if axis == "temporal" else frames):
                place = (b, slice(None), other) if axis == "temporal" else (b, other)
                q, k, v = (x[place][:, i, h] for i in range(3))
                if normed:
                    q, k = (
                        y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * w.double().numpy()
                        for y, w in zip((q, k), weights, strict=True)
                    )
                if rotated:
                    q, k = rotate(q), rotate(k)
                expected[place][:, h] = softmax(q @ k.T / math.sqrt(size)) @ v
    np.testing.assert_allclose(actual.numpy(), expected.reshape(actual.shape), rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    q, k = draw(8), draw(8, seed=1)
    rope = rope_table(12, 8)
    scores = ops.apply_rope(q.expand(12, 8), rope) @ ops.apply_rope(k.expand(12, 8), rope).T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert scores[0].std() > 0.1


@pytest.mark.parametrize("heads", [1, 3])
def test_bidirectional_attention_is_two_attentions(heads: int) -> None:
    """Rows: video asks audio. Columns: audio asks video, with the roles of queries and keys exchanged."""
    batch, nv, na, width = 2, 7, 5, 12
    qv, qa, vv, va = (
        draw(batch, nv, width),
        draw(batch, na, width, seed=1),
        draw(batch, nv, width, seed=2),
        draw(batch, na, width, seed=3),
    )
    to_video, to_audio = ops.bidirectional_attention(qv, qa, vv, va, heads)
    size = width // heads
    for b in range(batch):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            a, c, d, e = (x[b, :, part].double().numpy() for x in (qv, qa, vv, va))
            scores = a @ c.T / math.sqrt(size)
            np.testing.assert_allclose(to_video[b, :, part], softmax(scores) @ e, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(to_audio[b, :, part], softmax(scores.T) @ d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(masked: bool) -> None:
    batch, tokens, heads, keys, size = 2, 5, 3, 4, 6
    q, k, v = (
        draw(batch, tokens, heads * size),
        draw(batch, heads, keys, size, seed=1),
        draw(batch, heads, keys, size, seed=2),
    )
    mask = torch.tensor([[True, True, False, True], [False, False, True, False]])
    actual = ops.cross_attention(q, k, v, mask=mask if masked else None)
    for b in range(batch):
        kept = mask[b] if masked else torch.ones(keys).bool()
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[b, :, part].double() @ k[b, h, kept].double().T / math.sqrt(size)
            expected = softmax(scores.numpy()) @ v[b, h, kept].double().numpy()
            np.testing.assert_allclose(actual[b, :, part], expected, rtol=1e-4, atol=1e-5)


# -- norms and residuals -----------------------------------------------------------------------------------------------


def modulation(batch: int, width: int) -> dict[str, Tensor]:
    names = ("shift", "scale", "gate", "shift0", "scale0", "gate0")
    return {name: draw(batch, width, seed=10 + i) for i, name in enumerate(names)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_residual_and_norm_by_loop(masked: bool, gated: bool) -> None:
    batch, frames, places, width = 2, 3, 4, 10
    x, h = 3 * draw(batch, frames * places, width) + 1, draw(batch, frames * places, width, seed=1)
    m = modulation(batch, width)
    mask = torch.tensor([[True, False, True], [False, False, True]]) if masked else None
    zero = {"shift0": m["shift0"], "scale0": m["scale0"]} if masked else {}
    gate = m["gate"] if gated else None
    residual, normed = ops.gated_residual_ada_layer_norm(
        x, h, gate, m["shift"], m["scale"], frame_mask=mask, gate0=m["gate0"] if masked and gated else None, **zero
    )
    alone = ops.ada_layer_norm(x, m["shift"], m["scale"], frame_mask=mask, **zero)
    for b in range(batch):
        for n in range(frames * places):
            noisy = mask is None or bool(mask[b, n // places])
            at = {name: m[name if noisy else name + "0"][b].double().numpy() for name in ("shift", "scale", "gate")}

            def norm(row: np.ndarray, at: dict[str, np.ndarray] = at) -> np.ndarray:
                return (row - row.mean()) / np.sqrt(row.var() + 1e-6) * (1 + at["scale"]) + at["shift"]

            before, update = x[b, n].double().numpy(), h[b, n].double().numpy()
            after = before + (at["gate"] if gated else 1) * update
            np.testing.assert_allclose(residual[b, n], after, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(normed[b, n], norm(after), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(alone[b, n], norm(before), rtol=1e-4, atol=1e-5)


def test_frame_mask_needs_both_modulations() -> None:
    m = modulation(1, 8)
    with pytest.raises(ValueError, match="modulation of timestep 0"):
        ops.ada_layer_norm(draw(1, 4, 8), m["shift"], m["scale"], frame_mask=torch.ones(1, 2).bool())


def test_low_precision_is_normalised_in_float32() -> None:
    """A large mean survives: in bfloat16 arithmetic the variance of these rows would be lost."""
    x = (256 + draw(1, 6, 64)).bfloat16()
    zero = torch.zeros(1, 64)
    actual = ops.ada_layer_norm(x, zero.bfloat16(), zero.bfloat16())
    row = x.double()
    expected = (row - row.mean(-1, keepdim=True)) / (row.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).abs().max() < 2e-2  # one rounding of values up to 3


def test_gelu_linear() -> None:
    x, weight, bias = draw(3, 5), draw(4, 5, seed=1), draw(4, seed=2)
    y = x.double() @ weight.double().T + bias.double()
    expected = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    torch.testing.assert_close(ops.gelu_linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-6)


# -- embeddings --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    video=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    patch=st.sampled_from([(1, 2, 2), (2, 1, 3), (1, 1, 1)]),
)
def test_patch_embedding_is_a_strided_convolution(video: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
    embed = PatchEmbed(3, patch, 6)
    x = draw(2, 3, *video)
    pad = [n for size, p in zip(reversed(video), reversed(patch), strict=True) for n in (0, -size % p)]
    expected = embed.proj(torch.nn.functional.pad(x, pad)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected, rtol=1e-4, atol=1e-5)


def test_unpatchify_by_index() -> None:
    grid, patch, channels, sizes = (2, 3), (4, 2), 3, (7, 5)
    tokens = draw(2, 6, 4 * 2 * channels)
    x = unpatchify(tokens, grid, patch, sizes)
    assert x.shape == (2, channels, *sizes)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            token, inside = (i // 4) * 3 + j // 2, ((i % 4) * 2 + j % 2) * channels
            torch.testing.assert_close(x[:, :, i, j], tokens[:, token, inside : inside + channels], rtol=0, atol=0)


def test_sinusoid() -> None:
    value = torch.tensor([0.0, 1.0, 731.5])
    embedded = sinusoid(value, 8)
    for row, v in zip(embedded, value.tolist(), strict=True):
        for i in range(4):
            angle = v * 10000.0 ** (-2 * i / 8)
            assert row[i] == pytest.approx(math.sin(angle), abs=1e-4)
            assert row[4 + i] == pytest.approx(math.cos(angle), abs=1e-4)
    torch.testing.assert_close(sinusoid(value, 8, cos_first=True), embedded.roll(4, -1))


def test_video_positions_cover_the_same_range_whatever_the_aspect() -> None:
    """Column in the first half, row in the second; coordinates i * base / n / scale with base = round(sqrt(H * W))."""
    rows, columns, size = 3, 5, 16
    scale = torch.tensor([0.5, 2.0])
    table = video_positions((rows, columns), scale, size)
    base = round(math.sqrt(rows * columns))
    for b in range(2):
        for i in range(rows):
            for j in range(columns):
                y, x = i * base / rows / scale[b], j * base / columns / scale[b]
                expected = torch.cat((sinusoid(x, size // 2), sinusoid(y, size // 2)))
                torch.testing.assert_close(table[b, i * columns + j], expected, rtol=1e-4, atol=1e-5)
