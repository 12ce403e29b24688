"""Synchformer and CAVP: public names, and what their parts compute, against other implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from javis.errors import UsageError
from javis.eval.extractors import Missing, find_extractor
from javis.eval.extractors import cavp as cavp_module
from javis.eval.extractors import synchformer as synchformer_module
from javis.eval.extractors.cavp import Cavp, CavpExtractor
from javis.eval.extractors.synchformer import (
    DividedAttention,
    JointBlock,
    SpectrumTransformer,
    Synchformer,
    SynchformerConfig,
    segment_spectra,
)
from javis.eval.metrics import desync

from .test_extractors import RATE, frames, randomise, tone

TINY = SynchformerConfig(width=24, layers=1, heads=3, joint_layers=1, joint_heads=2)


def both(*names: str) -> set[str]:
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


# --- Synchformer ------------------------------------------------------------------------------------------------------


def synchformer_names(layers=12, joint_layers=3) -> set[str]:
    seen, heard, joint = "vfeat_extractor.", "afeat_extractor.", "transformer."
    names = {seen + n for n in ("cls_token", "pos_embed", "temp_embed")} | both(
        seen + "patch_embed_3d.proj", seen + "norm"
    )
    for i in range(layers):
        at = f"{seen}blocks.{i}."
        names |= both(*(at + n for n in ("norm1", "norm2", "norm3", "attn.qkv", "attn.proj", "timeattn.qkv",
                                         "timeattn.proj", "mlp.fc1", "mlp.fc2")))  # fmt: skip
        at = f"{heard}ast.encoder.layer.{i}."
        names |= both(*(at + n for n in ("attention.attention.query", "attention.attention.key",
                                         "attention.attention.value", "attention.output.dense", "intermediate.dense",
                                         "output.dense", "layernorm_before", "layernorm_after")))  # fmt: skip
    for at in (seen + "spatial_attn_agg.", heard + "freq_attn_agg."):
        names |= {at + n for n in ("cls_token", "self_attn.in_proj_weight", "self_attn.in_proj_bias")}
        names |= both(*(at + n for n in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")))
    at = heard + "ast.embeddings."
    names |= {at + n for n in ("cls_token", "distillation_token", "position_embeddings")}
    names |= both(at + "patch_embeddings.projection", heard + "ast.layernorm")
    names |= {joint + n for n in ("OFF_tok", "MOD_tok", "pos_emb_cfg.pos_emb")}
    names |= both(*(joint + n for n in ("vis_in_lnorm", "aud_in_lnorm", "ln_f", "off_head")))
    for i in range(joint_layers):
        at = f"{joint}blocks.{i}."
        names |= both(
            *(at + n for n in ("ln1", "ln2", "attn.key", "attn.query", "attn.value", "attn.proj", "mlp.0", "mlp.2"))
        )
    return names | both("vproj", "aproj")


def test_synchformer_has_the_public_names_at_the_real_size() -> None:
    with torch.device("meta"):
        state = Synchformer().state_dict()
    assert set(state) == synchformer_names()
    shapes = {
        "vfeat_extractor.pos_embed": (1, 197, 768),
        "vfeat_extractor.temp_embed": (1, 8, 768),
        "vfeat_extractor.patch_embed_3d.proj.weight": (768, 3, 2, 16, 16),
        "afeat_extractor.ast.embeddings.position_embeddings": (1, 74, 768),
        "transformer.pos_emb_cfg.pos_emb": (1, 198, 768),
        "transformer.off_head.weight": (21, 768),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("over_time", [True, False])
def test_divided_attention_is_full_attention_under_a_mask(over_time) -> None:
    attention = randomise(DividedAttention(12, 2).double())
    moments, places = 3, 5
    x = torch.randn(2, 1 + moments * places, 12, dtype=torch.float64)
    index = torch.arange(moments * places)
    group = index % places if over_time else index // places
    allowed = torch.ones(len(index) + 1, len(index) + 1, dtype=torch.bool)
    allowed[1:, 1:] = group[:, None] == group
    q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in attention.qkv(x).chunk(3, dim=-1))
    scores = (q @ k.transpose(-1, -2) / 6**0.5).masked_fill(~allowed, -torch.inf)
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, moments, over_time), expected)


def test_the_sound_part_is_the_ast_of_the_library() -> None:
    transformers = pytest.importorskip("transformers")
    ours = randomise(SpectrumTransformer(TINY))
    config = transformers.ASTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=96,
        max_length=66,
        num_mel_bins=128,
    )
    theirs = transformers.ASTModel(config).eval()
    state = ours.ast.state_dict()
    names = theirs.state_dict()
    renamed = {}
    for name in names:  # the library has renamed the parts of a layer since
        old = name.replace("attention.q_proj", "attention.attention.query").replace(
            "attention.k_proj", "attention.attention.key"
        )
        old = old.replace("attention.v_proj", "attention.attention.value").replace(
            "attention.o_proj", "attention.output.dense"
        )
        old = old.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        if old.startswith("layers."):
            old = "encoder.layer." + old.removeprefix("layers.")
        renamed[name] = state.pop(old)
    assert not state
    theirs.load_state_dict(renamed)
    x = torch.randn(2, 128, 66)
    with torch.no_grad():
        grid = theirs(x.transpose(1, 2)).last_hidden_state[:, 2:].unflatten(1, (12, 6))
        columns = grid.transpose(1, 2).flatten(0, 1)
        layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
        layer.load_state_dict({k: v for k, v in ours.freq_attn_agg.state_dict().items() if k != "cls_token"})
        token = ours.freq_attn_agg.cls_token.expand(len(columns), -1, -1)
        expected = layer(torch.cat((token, columns), dim=1))[:, 0].unflatten(0, (2, 6))
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_a_joint_block_is_a_pre_norm_transformer_layer() -> None:
    block = randomise(JointBlock(12, 3))
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    state = {"self_attn.out_proj": block.attn["proj"], "linear1": block.mlp[0], "linear2": block.mlp[2],
             "norm1": block.ln1, "norm2": block.ln2}  # fmt: skip
    packed = {f"{k}.{p}": getattr(m, p) for k, m in state.items() for p in ("weight", "bias")}
    for p in ("weight", "bias"):
        packed[f"self_attn.in_proj_{p}"] = torch.cat([getattr(block.attn[n], p) for n in ("query", "key", "value")])
    layer.load_state_dict(packed)
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-5)


def test_spectra_of_a_segment() -> None:
    made = segment_spectra(torch.zeros(2, 10240))
    assert made.shape == (2, 128, 66)
    silent = (np.log(1e-6) - synchformer_module.MEL_MEAN) / (2 * synchformer_module.MEL_STD)
    filled = -synchformer_module.MEL_MEAN / (2 * synchformer_module.MEL_STD)  # 65 columns, and one of zeros
    np.testing.assert_allclose(made[..., :65], silent, rtol=1e-5)
    np.testing.assert_allclose(made[..., 65], filled, rtol=1e-5)
    # HTK scale: 440 Hz is 549.6 of 2840 mels, in 129 steps.
    loudest = int(segment_spectra(torch.from_numpy(tone())[None, :10240])[0, :, 20].argmax())
    assert abs(loudest - (2595 * np.log10(1 + 440 / 700) / (2595 * np.log10(1 + 8000 / 700)) * 129 - 1)) <= 1


def test_synchformer_from_a_public_file(tmp_path, monkeypatch) -> None:
    model = randomise(Synchformer(TINY))
    folder = tmp_path / "synchformer"
    folder.mkdir()
    unused = {"vfeat_extractor.patch_embed.proj.weight": torch.zeros(2)}
    torch.save(model.state_dict() | unused, folder / "synchformer_state_dict.pth")
    monkeypatch.setattr(synchformer_module, "SynchformerConfig", lambda: TINY)
    found = find_extractor("synchformer", tmp_path)
    assert not isinstance(found, Missing)
    logits = found.sync_logits(frames(24, 32, 32), 25.0, tone(0.96), RATE)  # two segments, one window
    assert logits.shape == (1, 21) and np.isfinite(logits).all()
    assert 0.0 <= desync(logits) <= 2.0
    other = found.sync_logits(frames(24, 32, 32, seed=9), 25.0, tone(0.96), RATE)
    quiet = found.sync_logits(frames(24, 32, 32), 25.0, 0.01 * tone(0.96), RATE)
    assert not np.allclose(logits, other, atol=1e-4) and not np.allclose(logits, quiet, atol=1e-4)
    with pytest.raises(UsageError, match=r"0\.64 s of both"):
        found.sync_logits(frames(15, 32, 32), 25.0, tone(), RATE)
    with pytest.raises(UsageError, match="synchformer embeds pair, not audio"):
        found.embed_audio(tone(), RATE)


# --- CAVP -------------------------------------------------------------------------------------------------------------


def normed(*names: str) -> set[str]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{part}" for name in names for part in parts}


def cavp_names() -> set[str]:
    units = ["conv1"]
    for stage, count in enumerate((3, 4, 6, 3), start=1):
        units += [f"layer{stage}.{i}.conv{k}" for i in range(count) for k in (1, 2, 3)] + [f"layer{stage}.0.downsample"]
    names = {f"video_encoder.{unit}.conv.weight" for unit in units} | normed(
        *(f"video_encoder.{unit}.bn" for unit in units)
    )
    names |= normed("spec_encoder.bn") | both("video_project_head", "spec_encoder.fc1", "spec_encoder.final_project")
    for i in range(1, 7):
        names |= {f"spec_encoder.conv_block{i}.conv{k}.weight" for k in (1, 2)}
        names |= normed(*(f"spec_encoder.conv_block{i}.bn{k}" for k in (1, 2)))
    return names


def test_cavp_has_the_public_names_at_the_real_size() -> None:
    with torch.device("meta"):
        model = Cavp()
    assert set(model.state_dict()) == cavp_names()
    # A ResNet-50 without its classifier has 23,508,032 parameters; in the last two stages the first convolution of each
    # block is three times as large.
    inflated = 512 * 256 + 5 * 1024 * 256 + 1024 * 512 + 2 * 2048 * 512
    assert sum(p.numel() for p in model.video_encoder.parameters()) == 23_508_032 + 2 * inflated
    assert model.spec_encoder.final_project.weight.shape == (512, 2048)


def cavp_file(folder: Path, model: Cavp) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {"state_dict": state | {"module.logit_scale": torch.tensor(2.6)}, "epoch": 66}, folder / "cavp_epoch66.ckpt"
    )


def test_cavp_from_a_public_file(tmp_path, monkeypatch) -> None:
    model = randomise(Cavp(width=4, out=8, blocks=(1, 1, 1, 1)))
    cavp_file(tmp_path / "cavp", model)
    monkeypatch.setattr(cavp_module, "Cavp", lambda: Cavp(width=4, out=8, blocks=(1, 1, 1, 1)))
    found = find_extractor("cavp", tmp_path)
    assert isinstance(found, CavpExtractor)
    video, sound = found.embed_video(frames(48), 24.0), found.embed_audio(tone(2.0), RATE)
    assert video.shape == (8, 8) and sound.shape == (8, 8)  # four a second, and they begin together
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([video, sound]), axis=1), 1.0, rtol=1e-5)
    assert found.embed_audio(tone(10.0), RATE).shape == (40, 8)
    assert found.embed_audio(tone(0.01), RATE).shape == (1, 8)
    assert found.embed_video(frames(1), 24.0).shape == (1, 8)


def test_only_the_last_stages_look_at_the_neighbours_in_time() -> None:
    encoder = randomise(Cavp(width=4, out=8, blocks=(1, 1, 1, 1)).double()).video_encoder
    x = torch.rand(1, 3, 9, 32, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 4] = torch.rand(3, 32, 32)
    moved = (encoder(x) - encoder(changed)).abs().amax(dim=(0, 2)) > 1e-12
    assert moved.tolist() == [False, False, True, True, True, True, True, False, False]  # two stages, one frame each


def test_spectrum_of_cavp() -> None:
    assert cavp_module.spectrum(np.zeros(160_000, np.float32)).shape == (640, 128)
    assert cavp_module.spectrum(np.zeros(4000, np.float32)).abs().max() == 0.0  # -100 dB and below
    assert cavp_module.spectrum(np.float32(100) * tone()).max() == 1.0
    levels = cavp_module.spectrum(np.float32(0.01) * tone())
    # Ten times the amplitude is 20 dB, a fifth of the scale, where neither is clipped.
    louder = cavp_module.spectrum(np.float32(0.1) * tone())
    inside = (levels > 0.0) & (louder < 1.0)
    assert inside.sum() > 100  # a tone fills a few bands
    np.testing.assert_allclose((louder - levels)[inside], 0.2, atol=1e-4)
