"""The caption encoder against T5's definition, written out here in float64."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from javis.errors import UsageError
from javis.model.encoders.t5 import T5Encoder, T5EncoderConfig

CAPTIONS = ["a red ball bounces on the left", "", "🎉 rain", "a dog barks " * 900]
XXL = {  # config.json of T5 v1.1 XXL
    "architectures": ["T5EncoderModel"], "d_ff": 10240, "d_kv": 64, "d_model": 4096, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24,
    "num_heads": 64, "num_layers": 24, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 32128,
}  # fmt: skip


def make_encoder(seed: int = 0) -> T5Encoder:
    encoder = T5Encoder(T5EncoderConfig.toy())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return encoder


@pytest.fixture(scope="module")
def encoder() -> T5Encoder:
    return make_encoder()


def bucket(distance: int, buckets: int, furthest: int) -> int:
    """Bucket of the distance from a query to a key (Raffel et al., 2020, section 2.1), both directions."""
    half = buckets // 2
    first = half if distance > 0 else 0
    distance = abs(distance)
    exact = half // 2
    if distance < exact:
        return first + distance
    return first + min(half - 1, exact + int(math.log(distance / exact) / math.log(furthest / exact) * (half - exact)))


def by_definition(state: dict[str, Tensor], ids: Tensor, config: T5EncoderConfig) -> Tensor:
    """T5 v1.1's encoder of one caption without padding, [L] -> [L, C]: RMS norms, no biases, unscaled scores."""
    w = {name: value.double() for name, value in state.items()}
    length, heads = len(ids), config.num_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).rsqrt() * weight

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, config.d_kv)).transpose(0, 1)

    x = w["shared.weight"][ids]
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
    index = torch.tensor([[bucket(key - query, *sizes) for key in range(length)] for query in range(length)])
    bias = table[index].permute(2, 0, 1)
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        y = norm(x, w[attention + "layer_norm.weight"])
        q, k, v = (split(y @ w[f"{attention}SelfAttention.{name}.weight"].T) for name in "qkv")
        y = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + y.transpose(0, 1).flatten(1) @ w[attention + "SelfAttention.o.weight"].T
        y = norm(x, w[mlp + "layer_norm.weight"])
        gate = F.gelu(y @ w[mlp + "DenseReluDense.wi_0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ w[mlp + "DenseReluDense.wi_1.weight"].T)) @ w[mlp + "DenseReluDense.wo.weight"].T
    return norm(x, w["encoder.final_layer_norm.weight"])


def test_hidden_states_follow_the_definition(encoder: T5Encoder) -> None:
    hidden, mask = encoder(CAPTIONS)
    ids, expected_mask = encoder.tokenizer(CAPTIONS)
    assert hidden.shape == (4, 24, 32) and hidden.dtype == torch.float32 and torch.equal(mask, expected_mask)
    assert mask.sum(1).tolist() == [8, 1, 3, 24]
    for i, length in enumerate(mask.sum(1)):
        expected = by_definition(encoder.model.state_dict(), ids[i, :length], encoder.config)
        torch.testing.assert_close(hidden[i, :length].double(), expected, atol=2e-5, rtol=1e-5)


def test_a_caption_does_not_depend_on_the_batch(encoder: T5Encoder) -> None:
    together, _ = encoder(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        assert torch.allclose(encoder([caption])[0][0], together[i], atol=1e-6)


def test_bfloat16(encoder: T5Encoder) -> None:
    exact, mask = encoder(CAPTIONS)
    rounded, _ = make_encoder().to(torch.bfloat16)(CAPTIONS)
    assert rounded.dtype == torch.float32
    error = (rounded - exact)[mask].square().mean().sqrt() / exact[mask].square().mean().sqrt()
    assert 1e-4 < error < 0.05


def test_full_size_without_memory() -> None:
    with torch.device("meta"):
        full = T5Encoder()
    assert all(p.is_meta for p in full.parameters())
    width, inner, ff = 4096, 64 * 64, 10240
    layer = 4 * width * inner + 3 * width * ff + 2 * width
    assert sum(p.numel() for p in full.parameters()) == 32128 * width + 24 * layer + 32 * 64 + width == 4_762_310_656
    assert full.config.max_length == 300 and full.config.channels == 4096


def test_the_library_s_files_load(encoder: T5Encoder, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert ("shared.weight" in state) + ("encoder.embed_tokens.weight" in state) == 1
    assert (
        T5EncoderConfig.from_library(json.loads((tmp_path / "config.json").read_text()), max_length=24)
        == encoder.config
    )
    expected = encoder(CAPTIONS)[0]
    with torch.device("meta"):
        empty = T5Encoder(encoder.config)
    for load in (
        lambda e: e.to_empty(device="cpu").model.load_state_dict(state, strict=True),
        lambda e: e.model.load_state_dict(state, strict=True, assign=True),
        lambda e: e.load_state_dict({f"model.{n}": v for n, v in state.items()}, strict=True, assign=True),
        lambda e: e.model.load_state_dict({("encoder.embed_tokens.weight" if n == "shared.weight" else n): v
                                           for n, v in state.items()}, strict=True, assign=True),
    ):  # fmt: skip
        with torch.device("meta"):
            empty = T5Encoder(encoder.config)
        load(empty)
        assert torch.equal(empty.eval()(CAPTIONS)[0], expected)
        tables = {empty.model.shared.weight.data_ptr(), empty.model.encoder.embed_tokens.weight.data_ptr()}
        assert len(tables) == 1, "the embedding table lies in memory twice"


def test_loading_is_strict(encoder: T5Encoder) -> None:
    state = encoder.model.state_dict()
    for name in ("encoder.final_layer_norm.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight"):
        with pytest.raises(RuntimeError, match="Missing key"):
            make_encoder().model.load_state_dict({n: v for n, v in state.items() if n != name})
    tables = {"shared.weight", "encoder.embed_tokens.weight"}
    with pytest.raises(RuntimeError, match="Missing key"):
        make_encoder().model.load_state_dict({n: v for n, v in state.items() if n not in tables})


def test_configurations() -> None:
    assert T5EncoderConfig.from_library(XXL) == T5EncoderConfig()
    for config in (T5EncoderConfig(), T5EncoderConfig.toy()):
        assert T5EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown T5EncoderConfig fields"):
        T5EncoderConfig.from_dict({"depth": 3})


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'javis\[full\]'"):
        T5Encoder(T5EncoderConfig.toy())
