"""Extractors: what is missing is said, public names find their places, and what a network computes.

Random weights under the public names, at small sizes; the whole lists of names at the real size without memory.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from javis.errors import UsageError
from javis.eval.extractors import EXTRACTORS, Missing, find_extractor
from javis.eval.extractors.i3d import I3D, I3DExtractor, same_max_pool, same_padded
from javis.eval.extractors.pictures import clip_frames, letterboxed, nearest_frames, spread
from javis.eval.extractors.sound import kaldi_filterbank, mono_at, to_length
from javis.eval.extractors.weights import load_weights
from javis.model.encoders.tokens import HashTokenizer

RATE = 16000


def frames(count=20, height=40, width=64, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def tone(seconds=1.0, rate=RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Values of about unit gain everywhere, in biases and running statistics as well, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        fan_in = value[0].numel() if value.ndim > 1 else 1
        drawn = torch.randn(value.shape, generator=generator) / fan_in**0.5
        if value.ndim == 1:
            drawn = 1 + 0.1 * drawn.abs() if name.endswith(("weight", "running_var")) else 0.1 * drawn
        value.copy_(drawn)
    return module.eval().requires_grad_(False)


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EXTRACTORS if name != "builtin"])
def test_absent_weights_are_named_and_never_replaced(name, tmp_path) -> None:
    for folder in (None, tmp_path / "nowhere", tmp_path):
        (tmp_path / name).mkdir(exist_ok=True)
        found = find_extractor(name, folder)
        assert isinstance(found, Missing)
        assert re.fullmatch(rf"{name} skipped: put .+ at .+", str(found))
    assert str(tmp_path / name) in str(found)


def test_unknown_extractors_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of builtin"):
        find_extractor("vgg", None)


def test_builtin_needs_nothing_and_tells_clips_apart() -> None:
    found = find_extractor("builtin", None)
    assert not isinstance(found, Missing)
    one, other = found.embed_video(frames(seed=1), 24.0), found.embed_video(frames(seed=1) // 4, 24.0)
    assert one.shape == (1, 24) and one.dtype == np.float32 and not np.allclose(one, other)
    np.testing.assert_array_equal(one, found.embed_video(frames(seed=1), 24.0))
    assert found.embed_video(frames(1), 24.0).shape == (1, 24)
    loud, quiet = found.embed_audio(tone(), RATE), found.embed_audio(0.01 * tone(), RATE)
    assert loud.shape == (1, 24) and not np.allclose(loud, quiet)
    np.testing.assert_allclose(found.embed_audio(tone(rate=44100), 44100), loud, atol=0.05)
    with pytest.raises(UsageError, match="builtin embeds audio, video, not text"):
        found.embed_text(["a ball"])
    assert re.fullmatch("[0-9a-f]{12}", found.weights_hash)


# --- pictures and sounds ----------------------------------------------------------------------------------------------


def test_chosen_frames() -> None:
    assert spread(51, 16).tolist() == [round(k * 50 / 15) for k in range(16)]
    assert spread(1, 3).tolist() == [0, 0, 0]
    assert nearest_frames(4, 24.0, 48.0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest_frames(48, 24.0, 4.0).tolist() == [0, 6, 12, 18, 24, 30, 36, 42]


def test_clip_pictures_are_those_of_the_library() -> None:
    transformers = pytest.importorskip("transformers")
    given = frames(3, 90, 135)
    try:
        processor = transformers.CLIPImageProcessor()
        expected = processor(images=list(given), return_tensors="pt")["pixel_values"]
    except ImportError as error:  # this version of the library wants torchvision for it
        processor = getattr(transformers, "CLIPImageProcessorPil", None)
        if processor is None:
            pytest.skip(str(error))
        expected = processor()(images=list(given), return_tensors="pt")["pixel_values"]
    got = clip_frames(given)
    assert got.shape == (3, 3, 224, 224)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_letterbox() -> None:
    made = letterboxed(torch.ones(1, 3, 30, 60), 40)
    assert made.shape == (1, 3, 40, 40)
    assert made[0, 0, 10:30].min() > 0.999 and made[0, 0, :10].abs().max() == 0 and made[0, 0, 30:].abs().max() == 0


def test_kaldi_filterbank() -> None:
    assert kaldi_filterbank(tone(2.0)).shape == (128, 198)
    assert kaldi_filterbank(np.zeros(100, np.float32)).shape == (128, 1)
    np.testing.assert_allclose(kaldi_filterbank(np.zeros(800, np.float32)), np.log(np.finfo(np.float32).eps), rtol=1e-5)
    # The loudest band is the one whose centre, on the scale 1127 ln(1 + f / 700), is nearest to 440 Hz.
    low, high = (1127 * np.log1p(f / 700) for f in (20, 8000))
    centres = 700 * np.expm1((low + (high - low) * np.arange(1, 129) / 129) / 1127)
    assert abs(int(kaldi_filterbank(tone()).mean(dim=1).argmax()) - int(np.abs(centres - 440).argmin())) <= 1
    assert (
        to_length(torch.ones(2, 3), 5).tolist() == [[1, 1, 1, 0, 0]] * 2
        and to_length(torch.ones(2, 3), 2).shape[1] == 2
    )
    with pytest.raises(ValueError, match="finite"):
        mono_at(np.array([np.nan]), RATE, RATE)


# --- I3D --------------------------------------------------------------------------------------------------------------


def test_i3d_has_the_public_names_and_size() -> None:
    with torch.device("meta"):
        model = I3D()
    units = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"]
    units += [f"Mixed_{m}.{b}" for m in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
              for b in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")]  # fmt: skip
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{unit}.conv3d.weight" for unit in units} | {f"{unit}.bn.{part}" for unit in units for part in norm}
    assert set(model.state_dict()) == names | {"logits.conv3d.weight", "logits.conv3d.bias"}
    assert sum(p.numel() for p in model.parameters()) == 12_697_264
    assert model.get_parameter("Mixed_5c.b1b.conv3d.weight").shape == (384, 192, 3, 3, 3)


@pytest.mark.parametrize("size, kernel, stride", [(16, 7, 2), (15, 7, 2), (56, 3, 2), (7, 3, 1), (7, 2, 2), (5, 2, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride) -> None:
    x = torch.arange(1.0, size + 1).view(1, 1, size, 1, 1)
    padded = same_padded(x, (kernel, 1, 1), (stride, 1, 1))
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    before = int((padded[0, 0, :, 0, 0] != 0).nonzero()[0])
    assert (padded.shape[2], before) == (size + total, total // 2)
    assert same_max_pool(x, (kernel, 1, 1), (stride, 1, 1)).shape[2] == out


def test_i3d_in_float64_by_hand_at_its_ends() -> None:
    model = randomise(I3D(classes=5, divide=16).double())
    x = torch.rand(1, 3, 9, 224, 224, dtype=torch.float64) * 2 - 1
    first = model.Conv3d_1a_7x7(x)
    conv, bn = model.Conv3d_1a_7x7.conv3d, model.Conv3d_1a_7x7.bn
    # 224 -> 112 with 2 zeros before and 3 behind; 9 -> 5 with 3 and 3.
    padded = nn.functional.pad(x, (2, 3, 2, 3, 3, 3))
    patch = padded[0, :, 4:11, 20:27, 40:47]  # output (2, 10, 20)
    value = (patch * conv.weight[1]).sum()
    value = (value - bn.running_mean[1]) / (bn.running_var[1] + 1e-3).sqrt() * bn.weight[1] + bn.bias[1]
    assert first.shape == (1, 4, 5, 112, 112)
    torch.testing.assert_close(first[0, 1, 2, 10, 20], value.clamp_min(0))
    assert model(x).shape == (1, 5)
    with pytest.raises(RuntimeError):
        model(x[:, :, :8])  # one moment is left, the average takes two


def test_i3d_loads_what_fits_exactly(tmp_path) -> None:
    model = randomise(I3D(classes=4, divide=16))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    folder = tmp_path / "i3d"
    folder.mkdir()
    file = folder / "i3d_pretrained_400.pt"
    torch.save(state, file)
    again = I3D(classes=4, divide=16)
    digest = load_weights(again, folder, "I3D")
    x = torch.rand(1, 3, 16, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert not again.training

    def refused(change, match) -> None:
        torch.save(change(dict(state)), file)
        with pytest.raises(UsageError, match=match):
            load_weights(I3D(classes=4, divide=16), folder, "I3D")

    refused(lambda s: {k: v for k, v in s.items() if k != "logits.conv3d.bias"}, "it lacks logits.conv3d.bias")
    refused(lambda s: s | {"Mixed_6a.b0.conv3d.weight": torch.zeros(1)}, "no place for Mixed_6a")
    refused(
        lambda s: s | {"logits.conv3d.bias": torch.zeros(5)}, r"other shapes: logits.conv3d.bias \[5\] instead of \[4\]"
    )
    torch.save(state | {"logits.conv3d.bias": torch.ones(4)}, file)
    assert load_weights(I3D(classes=4, divide=16), folder, "I3D") != digest


def test_i3d_is_found_in_its_folder_and_refuses_other_weights(tmp_path) -> None:
    (tmp_path / "i3d").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "i3d" / "i3d_pretrained_400.pt")
    with pytest.raises(UsageError, match="is not I3D"):
        find_extractor("i3d", tmp_path)
    torch.save({"weight": print}, tmp_path / "i3d" / "i3d_pretrained_400.pt")
    with pytest.raises(UsageError, match="refused"):
        find_extractor("i3d", tmp_path)


class Recorder(nn.Module):
    """Keeps what it is given."""

    def forward(self, x):
        self.given = x
        return torch.zeros(len(x), 400)


def test_i3d_sees_the_whole_range_but_officially() -> None:
    clip = np.stack([np.zeros((30, 60, 3), np.uint8), np.full((30, 60, 3), 255, np.uint8)])
    for protocol, low, high in (("corrected", -1.0, 1.0), ("official", 0.0, 1.0)):
        model = Recorder()
        found = I3DExtractor(model, "", "cpu", protocol).embed_video(clip, 24.0)
        assert found.shape == (1, 400) and model.given.shape == (1, 3, 16, 224, 224)
        middle = model.given[:, :, :, 112]
        assert float(middle[:, :, 0].max()) == pytest.approx(low, abs=0.01)
        assert float(middle[:, :, -1].min()) == pytest.approx(high, abs=0.01)


# --- models of the library --------------------------------------------------------------------------------------------


def test_clip_from_a_local_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 63, "bos_token_id": 62}  # fmt: skip
    model = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    ).eval()
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"vocab\.json is missing"):
        find_extractor("clip", tmp_path)
    HashTokenizer(64, 12, start_id=62, end_id=63, pad_id=63).save(folder)
    found = find_extractor("clip", tmp_path)
    assert not isinstance(found, Missing)
    video, texts = found.embed_video(frames(5, 40, 40), 24.0), found.embed_text(["a red ball", "a bell"])
    assert video.shape == (48, 16) and texts.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([video, texts]), axis=1), 1.0, rtol=1e-5)
    given = clip_frames(frames(5, 40, 40), 32)[[0, 4]]
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=given).pooler_output)
    np.testing.assert_allclose(video[[0, -1]], nn.functional.normalize(expected, dim=-1).numpy(), atol=1e-5)
    with pytest.raises(UsageError, match="embeds text, video, not audio"):
        found.embed_audio(tone(), RATE)


def test_clap_from_a_local_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "clap"
    audio = {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
             "num_hidden_layers": 2, "num_mel_bins": 64, "spec_size": 256, "window_size": 8}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 300, "max_position_embeddings": 90}  # fmt: skip
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=16)
    model = transformers.ClapModel(config).eval()
    model.save_pretrained(folder)
    transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad").save_pretrained(folder)
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["a dog barks"], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    found = find_extractor("clap", tmp_path)
    assert not isinstance(found, Missing)
    sound, texts = found.embed_audio(tone(1.0, 48000), 48000), found.embed_text(["a dog barks", "rain"])
    assert sound.shape == (1, 16) and texts.shape == (2, 16)
    long = tone(11.0, 48000) * np.linspace(1, 0.1, 11 * 48000, dtype=np.float32)
    np.testing.assert_array_equal(found.embed_audio(long, 48000), found.embed_audio(long[:480_000], 48000))
    np.testing.assert_array_equal(found.embed_audio(long, 48000), found.embed_audio(long, 48000))
