"""Components whose names are a library's: the library loads what was converted, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from javis.convert import convert
from javis.errors import FailedError, UsageError

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


def save_as_pickle(model: Any, folder: Path) -> Path:
    """As old releases on the hub are: config.json and pytorch_model.bin."""
    folder.mkdir(parents=True)
    config = folder / "config.json"
    config.write_text(model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_the_encoder_half_of_a_pickled_t5(tmp_path: Path) -> None:
    whole = t5()
    source = save_as_pickle(whole, tmp_path / "t5")
    (source / "spiece.model").write_bytes(b"pieces")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"torch_dtype": "float32",', 1))
    report = convert(source, tmp_path / "out", dtype="bfloat16")
    assert report.kind == "t5" and not report.problems()
    assert {row["source"].split(".")[0] for row in report.ignored} == {"decoder", "lm_head", "encoder"}
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "out" / "text_encoder" / "config.json").read_text()
    encoder = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "out" / "text_encoder", dtype=torch.bfloat16
    ).eval()
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.to(torch.bfloat16).encoder(input_ids=ids).last_hidden_state
        assert torch.equal(encoder(input_ids=ids).last_hidden_state, expected)
    assert (tmp_path / "out" / "tokenizer" / "spiece.model").read_bytes() == b"pieces"


def test_the_table_of_a_t5_may_have_either_name(tmp_path: Path) -> None:
    source = save_as_pickle(t5(), tmp_path / "t5")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    del state["shared.weight"]
    torch.save(state, source / "pytorch_model.bin")
    report = convert(source, tmp_path / "out")
    table = next(row for row in report.used if row["target"] == "shared.weight")
    assert table["source"] == "encoder.embed_tokens.weight"
    assert any("no tokenizer" in note for note in report.notes)


def test_two_tables_of_a_t5_must_be_one(tmp_path: Path) -> None:
    source = save_as_pickle(t5(), tmp_path / "t5")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    state["shared.weight"] = state["shared.weight"] + 1
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(FailedError, match=r"shared.weight and encoder.embed_tokens.weight differ"):
        convert(source, tmp_path / "out")


def test_the_mel_vae_and_the_vocoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(8, 8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "audioldm2" / "vae")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=64, upsample_initial_channel=16, upsample_rates=[5, 4], upsample_kernel_sizes=[16, 16],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
    )  # fmt: skip
    vocoder = transformers.SpeechT5HifiGan(config).eval()
    save_as_pickle(vocoder, tmp_path / "audioldm2" / "vocoder")
    for name, kind in (("vae", "audio-vae"), ("vocoder", "vocoder")):
        report = convert(tmp_path / "audioldm2" / name, tmp_path / "out")
        assert report.kind == kind and not report.problems(), report.problems()
    z, mel = torch.randn(1, 8, 4, 4), torch.randn(6, 64)
    with torch.no_grad():
        again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "audio_vae").eval()
        assert torch.equal(again.decode(z).sample, vae.decode(z).sample)
        assert torch.equal(
            transformers.SpeechT5HifiGan.from_pretrained(tmp_path / "out" / "vocoder").eval()(mel), vocoder(mel)
        )


def test_a_library_needs_its_config(tmp_path: Path) -> None:
    source = save_as_pickle(t5(), tmp_path / "t5")
    (source / "config.json").unlink()
    with pytest.raises(UsageError, match="has no config.json, which T5 needs"):
        convert(source, tmp_path / "out")


def test_another_config_than_the_weights(tmp_path: Path) -> None:
    source = save_as_pickle(t5(), tmp_path / "t5")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(FailedError, match="missing text_encoder/encoder.block.2"):
        convert(source, tmp_path / "out")
