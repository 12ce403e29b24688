"""ImageBind: the text tower is taken, everything else is named as left out; the tokenizer comes with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from javis.convert import convert
from javis.model.encoders.imagebind import ImageBindTextConfig, ImageBindTextEncoder

from .official import imagebind_state


def reference(state: dict[str, torch.Tensor], ids: torch.Tensor, heads: int) -> torch.Tensor:
    """ImageBind's text trunk, from the modules its public code is built of (nn.MultiheadAttention, pre-norm blocks)."""
    x = (
        state["modality_preprocessors.text.token_embedding.weight"][ids]
        + state["modality_preprocessors.text.pos_embed"]
    )
    width = x.shape[-1]
    for i in range(2):
        own = {n.split(f"blocks.{i}.")[1]: v for n, v in state.items() if f"trunks.text.blocks.{i}." in n}
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True).double()
        attention.load_state_dict({n[5:]: v for n, v in own.items() if n.startswith("attn.")})
        norm = lambda x, n, own=own: torch.nn.functional.layer_norm(  # noqa: E731
            x, (width,), own[f"norm_{n}.weight"], own[f"norm_{n}.bias"], eps=1e-6
        )
        y = norm(x, 1)
        mask = state["modality_preprocessors.text.mask"]
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = torch.nn.functional.gelu(norm(x, 2) @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
        x = x + y @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
    return x


def test_the_text_tower_computes_what_imagebind_computes(tmp_path: Path) -> None:
    state = imagebind_state(width=128)
    torch.save(state, tmp_path / "imagebind_huge.pth")
    report = convert(tmp_path / "imagebind_huge.pth", tmp_path / "out")
    assert report.kind == "imagebind" and not report.problems()
    folder = tmp_path / "out" / "prior_text_encoder"
    config = ImageBindTextConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert (config.heads, config.layers, config.context_length, config.vocab_size) == (2, 2, 12, 50)
    encoder = ImageBindTextEncoder(config).eval().double()
    encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    state = {name: value.double() for name, value in state.items()}
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(ids), reference(state, ids, config.heads), atol=1e-9, rtol=1e-9)
    assert report.components["prior_text_encoder"]["assumed"] == {"heads": 2}


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    state = imagebind_state()
    torch.save(state, tmp_path / "imagebind_huge.pth")
    report = convert(tmp_path / "imagebind_huge.pth", tmp_path / "out")
    reasons = {row["reason"] for row in report.ignored}
    assert reasons == {
        "the modality vision",
        "the modality audio",
        "not used for the prior: the states of all tokens are",
    }
    assert len(report.ignored) + len(report.used) == len(state) and not report.unexpected
    assert any("no vocabulary beside the weights" in note for note in report.notes)


def test_the_vocabulary_beside_the_weights_becomes_the_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "bpe").mkdir(parents=True)
    torch.save(imagebind_state(), source / "imagebind_huge.pth")
    (source / "bpe" / "bpe_simple_vocab_16e6.txt").write_text("#version: 0.2\na b</w>\nc d\n")
    convert(source, tmp_path / "out")
    folder = tmp_path / "out" / "prior_text_encoder"
    assert (folder / "merges.txt").read_text() == "#version: 0.2\na b</w>\nc d\n"
    assert json.loads((folder / "vocab.json").read_text())["cd"] == 513
