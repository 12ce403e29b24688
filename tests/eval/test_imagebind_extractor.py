"""ImageBind by its public names: every name has its place, and what the towers compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from javis.errors import UsageError
from javis.eval.extractors import find_extractor
from javis.eval.extractors import i3d as i3d_module
from javis.eval.extractors import imagebind as imagebind_module
from javis.eval.extractors.imagebind import ImageBind, ImageBindConfig, ImageBindExtractor
from javis.model.encoders.imagebind import ImageBindTextConfig
from javis.model.encoders.tokens import HashTokenizer

from .test_extractors import RATE, frames, randomise, tone


def public_names(vision_layers=32, audio_layers=12, text_layers=24) -> set[str]:
    """Names of the tensors of ImageBind's state dict that embeddings of pictures, sounds and texts depend on."""
    names = set()
    for m, layers in (("vision", vision_layers), ("audio", audio_layers), ("text", text_layers)):
        trunk = f"modality_trunks.{m}."
        if m == "vision":
            names |= {f"{trunk}pre_transformer_layer.0.{p}" for p in ("weight", "bias")}
        for i in range(layers):
            names |= {
                f"{trunk}blocks.{i}.{part}.{p}"
                for part in ("attn.out_proj", "norm_1", "norm_2", "mlp.fc1", "mlp.fc2")
                for p in ("weight", "bias")
            }
            names |= {f"{trunk}blocks.{i}.attn.in_proj_{p}" for p in ("weight", "bias")}
            if m == "audio":
                names |= {f"{trunk}blocks.{i}.attn.bias_{p}" for p in "kv"}
    for m in ("vision", "audio"):
        stem = f"modality_preprocessors.{m}."
        names |= {f"{stem}cls_token", f"{stem}pos_embedding_helper.pos_embed"}
        names |= {f"modality_heads.{m}.0.weight", f"modality_heads.{m}.0.bias", f"modality_heads.{m}.2.weight"}
    names |= {"modality_preprocessors.vision.rgbt_stem.proj.1.weight"}
    names |= {
        f"modality_preprocessors.audio.rgbt_stem.{p}" for p in ("proj.weight", "norm_layer.weight", "norm_layer.bias")
    }
    names |= {f"modality_preprocessors.text.{p}" for p in ("token_embedding.weight", "pos_embed")}
    return names | {f"modality_heads.text.proj.{p}" for p in ("0.weight", "0.bias", "1.weight")}


def tiny_imagebind() -> ImageBindConfig:
    return ImageBindConfig(
        out=24, vision_width=32, vision_layers=2, vision_heads=4, audio_width=24, audio_layers=2, audio_heads=3,
        text=ImageBindTextConfig.toy(),
    )  # fmt: skip


def test_every_public_name_of_imagebind_has_its_place_at_the_real_size() -> None:
    with torch.device("meta"):
        model = ImageBind()
    names = public_names()
    places = [imagebind_module.rename(name) for name in names]
    assert sorted(places) == sorted(model.state_dict())
    assert model.vision.pos_embed.shape == (1, 257, 1280) and model.audio.pos_embed.shape == (1, 229, 768)
    # ViT-H/14 of OpenCLIP has 632 M parameters; here the patches are cut from two frames.
    assert sum(p.numel() for p in model.vision.parameters()) == 632_076_800 + 3 * 14 * 14 * 1280


def save_imagebind(model: ImageBind, folder: Path, **more: torch.Tensor) -> None:
    ours = model.state_dict()
    public = {name: ours[imagebind_module.rename(name)] for name in public_names(2, 2, 2)}
    public["modality_preprocessors.text.pos_embed"] = public["modality_preprocessors.text.pos_embed"][None]
    unused = {
        "modality_postprocessors.text.1.log_logit_scale": torch.tensor(2.6),
        "modality_preprocessors.text.mask": torch.zeros(16, 16),
        "modality_trunks.depth.blocks.0.norm_1.weight": torch.ones(3),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(public | unused | more, folder / "imagebind_huge.pth")


def test_imagebind_from_a_public_file(tmp_path, monkeypatch) -> None:
    model = randomise(ImageBind(tiny_imagebind()))
    save_imagebind(model, tmp_path / "imagebind")
    monkeypatch.setattr(imagebind_module, "ImageBindConfig", tiny_imagebind)
    found = find_extractor("imagebind", tmp_path)
    assert isinstance(found, ImageBindExtractor)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=0, atol=0)
    video, clip, sound = (
        found.embed_video(frames(3), 24.0),
        found.embed_clip(frames(30), 8.0),
        found.embed_audio(tone(), RATE),
    )
    assert video.shape == (3, 24) and clip.shape == (1, 24) and sound.shape == (1, 24)
    np.testing.assert_allclose(np.linalg.norm(video, axis=1), 1.0, rtol=1e-5)
    with pytest.raises(UsageError, match="no vocabulary"):
        found.embed_text(["a ball"])
    c = tiny_imagebind().text
    found.tokenizer = HashTokenizer(
        c.vocab_size, c.context_length, start_id=c.vocab_size - 2, end_id=c.vocab_size - 1, pad_id=0
    )
    texts = found.embed_text(["a ball", "a bell rings", "a ball"])
    assert texts.shape == (3, 24) and np.allclose(texts[0], texts[2]) and not np.allclose(texts[0], texts[1])
    save_imagebind(model, tmp_path / "imagebind", **{"modality_heads.vision.9.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match="no place for modality_heads.vision.9"):
        find_extractor("imagebind", tmp_path)


def test_the_picture_tower_is_a_clip_vision_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    tower = randomise(ImageBind(tiny_imagebind())).vision
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=224,
        patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, projection_dim=24,
    )  # fmt: skip
    other = transformers.CLIPVisionModelWithProjection(config).eval()
    state = {
        "embeddings.class_embedding": tower.cls_token[0, 0],
        "embeddings.patch_embedding.weight": tower.stem.weight.sum(dim=2),  # a still is two equal frames
        "embeddings.position_embedding.weight": tower.pos_embed[0],
    }
    for ours, theirs in (("first_norm", "pre_layrnorm"), ("head_norm", "post_layernorm")):
        state |= {f"{theirs}.{p}": getattr(getattr(tower, ours), p) for p in ("weight", "bias")}
    for i, block in enumerate(tower.blocks):
        to = f"encoder.layers.{i}."
        for p in ("weight", "bias"):
            packed = getattr(block.attn, f"in_proj_{p}").chunk(3)
            state |= {f"{to}self_attn.{n}_proj.{p}": v for n, v in zip("qkv", packed, strict=True)}
            state |= {
                f"{to}self_attn.out_proj.{p}": getattr(block.attn.out_proj, p),
                f"{to}layer_norm1.{p}": getattr(block.norm_1, p),
                f"{to}layer_norm2.{p}": getattr(block.norm_2, p),
                f"{to}mlp.fc1.{p}": getattr(block.mlp["fc1"], p),
                f"{to}mlp.fc2.{p}": getattr(block.mlp["fc2"], p),
            }
    prefixed = {f"vision_model.{name}": value for name, value in state.items()} | {
        "visual_projection.weight": tower.head.weight
    }
    told = other.load_state_dict(prefixed, strict=False)
    assert not told.unexpected_keys and all("position_ids" in name for name in told.missing_keys)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = nn.functional.normalize(other(pixel_values=x).image_embeds, dim=-1)
    torch.testing.assert_close(tower(x[:, :, None].repeat(1, 1, 2, 1, 1)), expected, rtol=1e-4, atol=1e-5)


def test_the_learnt_key_of_the_sound_tower_takes_part() -> None:
    block = randomise(ImageBind(tiny_imagebind()).double()).audio.blocks[0]
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    attn = block.attn
    q, k, v = nn.functional.linear(block.norm_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    k, v = torch.cat((k, attn.bias_k), dim=1), torch.cat((v, attn.bias_v), dim=1)
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k, v))
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v
    y = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
    fc1, fc2 = block.mlp["fc1"], block.mlp["fc2"]
    torch.testing.assert_close(block(x), y + fc2(nn.functional.gelu(fc1(block.norm_2(y)))))


def test_parts_of_a_clip() -> None:
    assert imagebind_module.clip_starts(4.0, 3) == [0.0, 1.0, 2.0]
    assert imagebind_module.clip_starts(1.0, 3) == [0.0, 0.0, 0.0]
    wide = torch.arange(10.0).expand(1, 3, 4, 10)
    assert [crop[0, 0, 0].tolist() for crop in imagebind_module.crops(wide, 4)] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]
    assert i3d_module.FRAMES == 16
