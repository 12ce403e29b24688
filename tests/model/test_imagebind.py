"""The prior's text encoder against ImageBind's layout in torch's own attention, and against transformers' CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.encoders.imagebind import (
    ImageBindTextConfig,
    ImageBindTextEncoder,
    imagebind_text_keys,
    imagebind_text_state,
)
from javis.model.encoders.tokens import load_tokenizer, write_clip_tokenizer
from javis.model.prior import PriorConfig, PriorEstimator

from .test_tokens import write_merges

CONFIG = ImageBindTextConfig.toy()
CAPTIONS = ["a red ball bounces", "", "🎉 rain", "a dog barks " * 900]


def official_state(config: ImageBindTextConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with ImageBind's names, among them those of other modalities and of the text head."""
    width, generator = config.width, torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + 0.3 * torch.randn(shape, generator=generator)

    state = {
        "modality_preprocessors.text.token_embedding.weight": draw(config.vocab_size, width),
        "modality_preprocessors.text.pos_embed": draw(1, config.context_length, width),
        "modality_preprocessors.text.mask": torch.zeros(config.context_length, config.context_length),
        "modality_preprocessors.vision.cls_token": draw(1, 1, width),
        "modality_trunks.vision.blocks.0.norm_1.weight": draw(width),
        "modality_heads.text.proj.0.weight": draw(width, mean=1.0),
        "modality_heads.text.proj.0.bias": draw(width),
        "modality_heads.text.proj.1.weight": draw(width, width),
        "modality_heads.vision.0.weight": draw(width),
        "modality_postprocessors.text.1.log_logit_scale": draw(),
    }
    for i in range(config.layers):
        block = f"modality_trunks.text.blocks.{i}."
        for name in ("norm_1", "norm_2"):
            state |= {f"{block}{name}.weight": draw(width, mean=1.0), f"{block}{name}.bias": draw(width)}
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
            ("mlp.fc1.", 4 * width, width), ("mlp.fc2.", width, 4 * width),
        ):  # fmt: skip
            state |= {f"{block}{name}weight": draw(rows, columns), f"{block}{name}bias": draw(rows)}
    return state


def trunk(state: dict[str, Tensor], ids: Tensor, config: ImageBindTextConfig = CONFIG) -> Tensor:
    """ImageBind's text trunk in float64: ``nn.MultiheadAttention`` over [L, B, C] with an additive causal mask."""
    w = {name: value.double() for name, value in state.items()}
    length, width = ids.shape[1], config.width
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    x = w["modality_preprocessors.text.token_embedding.weight"][ids] + w["modality_preprocessors.text.pos_embed"]
    x = x.transpose(0, 1)
    for i in range(config.layers):
        block = {
            n.split(f"blocks.{i}.")[1]: v for n, v in w.items() if n.startswith(f"modality_trunks.text.blocks.{i}.")
        }
        attention = nn.MultiheadAttention(width, config.heads, dtype=torch.float64)
        attention.load_state_dict({n.removeprefix("attn."): v for n, v in block.items() if n.startswith("attn.")})
        y = F.layer_norm(x, (width,), block["norm_1.weight"], block["norm_1.bias"], 1e-6)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0].detach()
        y = F.layer_norm(x, (width,), block["norm_2.weight"], block["norm_2.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"])), block["mlp.fc2.weight"])
        x = x + y + block["mlp.fc2.bias"]
    return x.transpose(0, 1)


def make_encoder(**changes: bool) -> ImageBindTextEncoder:
    config = ImageBindTextConfig(**{**CONFIG.to_dict(), **changes})
    encoder = ImageBindTextEncoder(config).eval()
    encoder.load_state_dict(imagebind_text_state(official_state(), final_norm=config.final_norm), strict=True)
    return encoder


@pytest.mark.parametrize("final_norm", [False, True])
def test_hidden_states_are_those_of_imagebind(final_norm: bool) -> None:
    encoder, state = make_encoder(final_norm=final_norm), official_state()
    hidden, mask = encoder(CAPTIONS)
    ids, real = encoder.tokenizer(CAPTIONS)
    expected = trunk(state, ids)
    if final_norm:
        w, b = (state[f"modality_heads.text.proj.0.{name}"].double() for name in ("weight", "bias"))
        expected = F.layer_norm(expected, (CONFIG.width,), w, b, 1e-6)
    assert hidden.shape == (4, 16, 32) and hidden.dtype == torch.float32
    torch.testing.assert_close(hidden.double(), expected, atol=3e-5, rtol=1e-5)
    assert mask.dtype == torch.bool and mask.shape == (4, 16) and mask.all() and not real.all()


def test_hidden_states_are_those_of_clip() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, hidden_act="gelu", layer_norm_eps=1e-6, bos_token_id=126, eos_token_id=127,
    )  # fmt: skip
    clip = transformers.CLIPTextModel(config).eval()
    state = official_state()
    theirs: dict[str, Tensor] = {}
    for name, value in imagebind_text_state(state, final_norm=True).items():
        if "in_proj" in name:
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = piece
        else:
            theirs[name] = value
    renamed = {}
    for name, value in theirs.items():
        for old, new in (
            ("blocks.", "encoder.layers."), ("norm_1", "layer_norm1"), ("norm_2", "layer_norm2"),
            ("attn.out", "self_attn.out"), ("token_embedding", "embeddings.token_embedding"),
            ("position_embedding", "embeddings.position_embedding.weight"),
        ):  # fmt: skip
            name = name if new in name else name.replace(old, new)
        renamed[name] = value
    prefix = "text_model." if any(name.startswith("text_model.") for name in clip.state_dict()) else ""
    clip.load_state_dict({prefix + name: value for name, value in renamed.items()}, strict=True)
    encoder, normed = make_encoder(), make_encoder(final_norm=True)
    ids, _ = encoder.tokenizer(CAPTIONS)
    with torch.no_grad():
        out = clip(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(encoder.encode(ids), out.hidden_states[CONFIG.layers], atol=3e-5, rtol=1e-5)
        torch.testing.assert_close(normed.encode(ids), out.last_hidden_state, atol=3e-5, rtol=1e-5)


def test_captions_are_cleaned_and_padded_with_token_0(tmp_path: Path) -> None:
    write_clip_tokenizer(write_merges(tmp_path / "bpe"), tmp_path)
    tokenizer = load_tokenizer(tmp_path, kind="CLIPTokenizer", length=77, pad_id=0)
    seen: list[Tensor] = []

    def record(captions: list[str]) -> tuple[Tensor, Tensor]:
        seen.append(tokenizer(captions)[0])
        return tokenizer(captions)

    config = ImageBindTextConfig(**{**CONFIG.to_dict(), "vocab_size": 600, "context_length": 77})
    encoder = ImageBindTextEncoder(config)
    encoder.tokenizer = record  # type: ignore[assignment]
    hidden, mask = encoder(["  The\n DOG &amp;amp; ball ", "the dog & ball", "ball " * 2000])
    ids = seen[0]
    assert torch.equal(ids[0], ids[1]) and (ids[0, 6:] == 0).all() and ids[0, 5] == ids[2, 76] == ids.max()
    assert hidden.shape == (3, 77, 32) and mask.all()
    torch.testing.assert_close(hidden[0], hidden[1])


def test_a_token_does_not_see_what_follows() -> None:
    encoder = make_encoder()
    short, long = encoder(["a red ball", "a red ball bounces"])[0]
    torch.testing.assert_close(short[:4], long[:4], atol=1e-6, rtol=0)
    assert not torch.allclose(short[4], long[4], atol=1e-2)


def test_the_names_of_a_whole_checkpoint() -> None:
    state = official_state()
    found = imagebind_text_keys(list(state))
    assert set(found.values()) == set(ImageBindTextEncoder(CONFIG).state_dict())
    left = set(state) - set(found)
    assert {name.split(".")[1] for name in found} == {"text"}
    assert {name for name in left if ".text." in name} == {
        "modality_preprocessors.text.mask",
        "modality_heads.text.proj.0.weight",
        "modality_heads.text.proj.0.bias",
        "modality_heads.text.proj.1.weight",
        "modality_postprocessors.text.1.log_logit_scale",
    }
    assert len(imagebind_text_keys(list(state), final_norm=True)) == len(found) + 2
    with pytest.raises(RuntimeError, match="Missing key"):
        ImageBindTextEncoder(CONFIG).load_state_dict(imagebind_text_state(dict(list(state.items())[1:])), strict=True)


def test_full_size_without_memory() -> None:
    with torch.device("meta"):
        full = ImageBindTextEncoder()
    width = 1024
    block = 12 * width * width + 13 * width
    assert sum(p.numel() for p in full.parameters()) == 49408 * width + 77 * width + 24 * block == 352_982_016
    assert not list(full.buffers()), "a buffer that is no part of the state dict would stay on the meta device"
    with torch.device("meta"):
        empty = ImageBindTextEncoder(CONFIG)
    empty.load_state_dict(imagebind_text_state(official_state()), strict=True, assign=True)
    assert torch.equal(empty(CAPTIONS)[0], make_encoder()(CAPTIONS)[0])


def test_the_prior_estimator_takes_the_hidden_states() -> None:
    prior = PriorEstimator(
        PriorConfig(text_channels=32, hidden_size=16, num_heads=2, out_dim=8, encode_va=False)
    ).eval()
    hidden, _ = make_encoder()(CAPTIONS)
    with torch.no_grad():
        priors = prior.encode(hidden, noise=torch.zeros(4, 64, 8))
    assert priors.spatial.shape == priors.temporal.shape == (4, 32, 8)


def test_configurations() -> None:
    for config in (ImageBindTextConfig(), CONFIG, ImageBindTextConfig(final_norm=True)):
        assert ImageBindTextConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="divisible by heads"):
        ImageBindTextConfig(heads=3)
