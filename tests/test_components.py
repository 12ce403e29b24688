"""Folders of the full-size pipeline: what is written, what is read back, and what is refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from javis import JavisPipeline
from javis.component_files import write_weights
from javis.components import folder_fingerprint
from javis.errors import UsageError

from .test_pipeline import Trap
from .tiny import write_tiny_checkpoint

FOLDERS = (
    "text_encoder", "tokenizer", "prior_text_encoder", "prior", "transformer", "video_vae", "audio_vae", "vocoder",
)  # fmt: skip
WEIGHTS = {
    "text_encoder": "model", "prior_text_encoder": "model", "prior": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model", "video_vae": "diffusion_pytorch_model",
    "audio_vae": "diffusion_pytorch_model", "vocoder": "model",
}  # fmt: skip
QUICK: dict[str, Any] = {"steps": 1, "seconds": 0.1, "guidance": 1, "seed": 3}


@pytest.fixture(scope="session")
def toy() -> JavisPipeline:
    return JavisPipeline.with_random_weights("toy", device="cpu")


@pytest.fixture(scope="session")
def saved(toy: JavisPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save_pretrained(tmp_path_factory.mktemp("full") / "checkpoint")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def check_refused(folder: Path, *messages: str) -> None:
    with pytest.raises(UsageError) as caught:
        JavisPipeline.from_pretrained(folder, device="cpu")
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text and len(text) < 700
    for message in messages:
        assert message in text


def check_same_folder(folder: Path, other: Path) -> None:
    """The same files; json byte by byte, weights by value (the order of a safetensors header is not fixed)."""
    names, others = ({p.relative_to(root) for p in root.rglob("*")} for root in (folder, other))
    assert names == others
    for name in names:
        if name.suffix == ".json":
            assert (folder / name).read_bytes() == (other / name).read_bytes()
        elif name.suffix == ".safetensors":
            a, b = load_file(folder / name), load_file(other / name)
            assert set(a) == set(b) and all(torch.equal(value, b[key]) for key, value in a.items())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- round trips ------------------------------------------------------------------------------------------------------


def test_the_folder_is_as_diffusers_has_it(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {"model_index.json", *FOLDERS}
    for name, stem in WEIGHTS.items():
        assert (saved / name / f"{stem}.safetensors").is_file() and (saved / name / "config.json").is_file()
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "JavisPipeline" and index["random_weights"] is True
    assert index["components"] == {
        "text_encoder": "T5Encoder", "prior_text_encoder": "ImageBindTextEncoder", "prior": "PriorEstimator",
        "transformer": "JavisDiT", "video_vae": "OpenSoraVideoCodec", "audio_vae": "AudioLDM2Codec",
    }  # fmt: skip
    assert set(index["clip"]) >= {"fps", "resolution", "seconds"} and index["sampling"]["guidance"] == 7.0


def test_the_libraries_read_their_own_folders(saved: Path, toy: JavisPipeline) -> None:
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan, T5EncoderModel

    for library, folder, own in (
        (T5EncoderModel, "text_encoder", toy.text_encoder.model),  # type: ignore[attr-defined]
        (SpeechT5HifiGan, "vocoder", toy.audio_codec.vocoder),  # type: ignore[attr-defined]
        (AutoencoderKL, "audio_vae", toy.audio_codec.vae),  # type: ignore[attr-defined]
    ):
        theirs = library.from_pretrained(saved / folder).state_dict()
        assert set(theirs) == set(own.state_dict())
        assert all(torch.equal(theirs[name], value) for name, value in own.state_dict().items())


def test_what_was_saved_comes_back_bit_by_bit(saved: Path, toy: JavisPipeline, tmp_path: Path) -> None:
    pipe = JavisPipeline.from_pretrained(saved, device="cpu")
    assert pipe.random_weights and pipe.description == toy.description | {"javis": pipe.description["javis"]} | {
        "_class_name": "JavisPipeline"
    }
    for name, component in toy.components.items():
        state = pipe.components[name].state_dict()
        assert not any(value.is_meta for value in (*state.values(), *pipe.components[name].buffers()))
        assert all(torch.equal(state[key], value) for key, value in component.state_dict().items())
    a, b = toy("rain", **QUICK), pipe("rain", **QUICK)
    assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
    check_same_folder(pipe.save_pretrained(tmp_path / "again"), saved)


def test_dtype_and_ties_on_loading(saved: Path) -> None:
    pipe = JavisPipeline.from_pretrained(str(saved), device="cpu", dtype=torch.bfloat16)
    for name, component in pipe.components.items():
        expected = torch.float32 if name == "audio_codec" else torch.bfloat16
        assert {p.dtype for p in component.parameters()} == {expected}
    t5 = pipe.text_encoder.model  # type: ignore[attr-defined]
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert np.abs(pipe("rain", **QUICK).audio).max() > 0


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vocoder"])
def test_shards(copied: Path, toy: JavisPipeline, name: str) -> None:
    file = copied / name / f"{WEIGHTS[name]}.safetensors"
    state = load_file(file)
    file.unlink()
    write_weights(file.parent, WEIGHTS[name], state, max_shard_bytes=20_000)
    shards = sorted(file.parent.glob("*-of-*.safetensors"))
    assert len(shards) > 1 and (file.parent / f"{WEIGHTS[name]}.safetensors.index.json").is_file()
    a, b = toy("rain", **QUICK), JavisPipeline.from_pretrained(copied, device="cpu")("rain", **QUICK)
    assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
    shards[1].unlink()
    check_refused(copied, repr(name), shards[1].name, "is missing")


def test_weights_as_older_libraries_wrote_them(copied: Path, toy: JavisPipeline) -> None:
    """The decoder of a whole T5 is left out; attention has other names in autoencoders of before diffusers 0.18."""
    t5 = copied / "text_encoder" / "model.safetensors"
    save_file(load_file(t5) | {"decoder.final_layer_norm.weight": torch.ones(3), "lm_head.weight": torch.ones(2)}, t5)
    vae = copied / "audio_vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in load_file(vae).items():
        for new, before in old.items():
            name = name.replace(new, before)
        state[name] = value
    assert any(".proj_attn." in name for name in state)
    save_file(state, vae)
    a, b = toy("rain", **QUICK), JavisPipeline.from_pretrained(copied, device="cpu")("rain", **QUICK)
    assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)


def test_an_index_may_leave_the_defaults_out(copied: Path) -> None:
    """As the conversion of official checkpoints writes it."""
    (copied / "model_index.json").write_text(
        '{"_class_name": "JavisPipeline", "components": {}, "clip": {"seconds": 4}}'
    )
    pipe = JavisPipeline.from_pretrained(copied, device="cpu")
    assert pipe.description["clip"] == {
        "fps": 24, "resolution": "240p", "ratio": "9:16", "seconds": 4, "sample_rate": 16000
    }  # fmt: skip
    assert pipe.description["sampling"]["steps"] == 30 and not pipe.random_weights
    assert (pipe.frame_size, pipe.fps) == ((240, 426), 24)


def test_another_vocabulary_is_another_checkpoint(copied: Path) -> None:
    """Clips are known as finished by the checkpoint they were made with."""
    found = {folder_fingerprint(copied)}
    for name in ("tokenizer/spiece.model", "prior_text_encoder/merges.txt", "text_encoder/model.safetensors"):
        (copied / name).write_bytes(b"other")
        found.add(folder_fingerprint(copied))
    (copied / "transformer" / "notes.md").write_text("mine")
    assert len(found | {folder_fingerprint(copied)}) == 4


# -- saving -----------------------------------------------------------------------------------------------------------


def test_saving_replaces_a_checkpoint_only_if_told_to(toy: JavisPipeline, saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    toy.save_pretrained(target)  # an empty folder is as good as none
    (target / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="already and a checkpoint; overwrite=True replaces it"):
        toy.save_pretrained(target)
    assert (target / "note.txt").is_file()
    toy.save_pretrained(target, overwrite=True)
    assert not (target / "note.txt").exists()
    check_same_folder(target, saved)
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UsageError, match="not a checkpoint; give another"):
        toy.save_pretrained(precious, overwrite=True)
    with pytest.raises(UsageError, match="not a checkpoint"):
        toy.save_pretrained(precious / "cat.jpg", overwrite=True)
    assert (precious / "cat.jpg").read_bytes() == b"cat"
    assert {p.name for p in tmp_path.iterdir()} == {"there", "photos"}


def test_a_failure_while_saving_leaves_what_was_there(
    toy: JavisPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = toy.save_pretrained(tmp_path / "there")
    before = folder_fingerprint(target)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    for place in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            toy.save_pretrained(place, overwrite=True)
    assert folder_fingerprint(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_folder_that_cannot_be_renamed_leaves_what_was_there(
    toy: JavisPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = toy.save_pretrained(tmp_path / "there"), Path.rename
    before = folder_fingerprint(target)

    def fail(path: Path, place: Path) -> Path:
        if path.suffix == ".part":
            raise OSError(5, "Input/output error")
        return rename(path, place)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        toy.save_pretrained(target, overwrite=True)
    assert folder_fingerprint(target) == before and [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_small_model_is_saved_as_it_came(tmp_path: Path) -> None:
    pipe = JavisPipeline.from_pretrained(write_tiny_checkpoint(tmp_path / "tiny"))
    again = JavisPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "again"))
    prompt: dict[str, Any] = {"prompt": "a red ball bounces", "seed": 1, "steps": 1, "seconds": 0.25}
    a, b = pipe(**prompt), again(**prompt)
    assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}
    assert not pipe.random_weights
    for options in ({"resolution": "64x64"}, {"fps": 24}):
        with pytest.raises(UsageError, match="this checkpoint makes"):
            pipe(**prompt, **options)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_folder(copied: Path, name: str) -> None:
    shutil.rmtree(copied / name)
    check_refused(copied, name, "is missing")


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_files(copied: Path, name: str) -> None:
    weights, config = (copied / name / file for file in (f"{WEIGHTS[name]}.safetensors", "config.json"))
    hidden = weights.with_name("elsewhere")
    weights.rename(hidden)
    check_refused(copied, repr(name), weights.name, "is missing")
    hidden.rename(weights)
    config.unlink()
    check_refused(copied, repr(name), "config.json is missing")


@pytest.mark.parametrize("damage", ["random", "truncated", "empty", "header"])
@pytest.mark.parametrize("name", ["transformer", "vocoder"])
def test_corrupt_weights(copied: Path, name: str, damage: str) -> None:
    path = copied / name / f"{WEIGHTS[name]}.safetensors"
    content = path.read_bytes()
    path.write_bytes({
        "random": np.random.default_rng(0).bytes(5000),
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "header": b"\xff" * 8 + content[8:],
    }[damage])  # fmt: skip
    check_refused(copied, repr(name), path.name, "is corrupt")


@pytest.mark.parametrize("name", WEIGHTS)
def test_tensors_that_are_missing_unexpected_or_of_another_shape(copied: Path, name: str) -> None:
    path = copied / name / f"{WEIGHTS[name]}.safetensors"
    state = load_file(path)
    first = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != first}, path)
    check_refused(copied, repr(name), f"lacks '{first}'")
    save_file(state | {"surplus": torch.ones(2)}, path)
    check_refused(copied, repr(name), "holds 'surplus'")
    save_file(state | {first: torch.ones(7, 7)}, path)
    check_refused(copied, repr(name), f"has '{first}' as [7, 7], but config.json asks for")


def test_a_pickle_is_named_and_not_loaded(copied: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (copied / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (copied / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    check_refused(copied, "'transformer'", "diffusion_pytorch_model.bin is a pickle", "javis convert")
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("transformer/config.json", {"hidden_size": 64}, "'transformer': diffusion_pytorch_model.safetensors has"),
        ("transformer/config.json", {"num_heads": 0}, "'transformer': config.json is not usable"),
        ("transformer/config.json", {"colour": "red"}, "unknown model configuration fields ['colour']"),
        ("transformer/config.json", {"depth": "many"}, "config.json is not usable"),
        ("transformer/config.json", {"caption_channels": 4096},
         "'text_encoder' has 32 channels of the captions, 'transformer' expects 4096"),
        ("transformer/config.json", {"prior_channels": 128}, "'prior' has 16 channels of the priors"),
        ("transformer/config.json", {"video_channels": 16}, "'video_vae' has 4 channels of the video latents"),
        ("prior/config.json", {"spatial_token_num": 32}, "'prior' has 32 spatial prior tokens"),
        ("prior_text_encoder/config.json", {"width": 64}, "'prior_text_encoder' has 64 channels"),
        ("video_vae/config.json", {"shift": [0.0]}, "'video_vae': config.json is not usable (shift needs 4 values"),
        ("vocoder/config.json", {"sampling_rate": 44100}, "44100"),
        ("model_index.json", {"components": {"transformer": "UNet"}}, "'transformer' is a 'UNet'"),
        ("model_index.json", {"clip": {"fps": 0}}, "fps must be a positive number, got 0"),
        ("model_index.json", {"clip": {"resolution": "wide"}}, "unknown resolution 'wide'"),
        ("model_index.json", {"sampling": [30]}, "'sampling' must be an object"),
        ("model_index.json", {"sampling": {"steps": "many"}}, "steps must be a positive number"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(copied: Path, path: str, changes: dict[str, Any], message: str) -> None:
    edit(copied / path, **changes)
    check_refused(copied, message)


@pytest.mark.parametrize("path", ["model_index.json", "transformer/config.json", "video_vae/config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00\xff"])
def test_json_that_is_none(copied: Path, path: str, content: str) -> None:
    (copied / path).write_bytes(content.encode("latin-1"))
    check_refused(copied, Path(path).name, "is not usable")


# -- hub ids ----------------------------------------------------------------------------------------------------------


def test_a_hub_id(saved: Path, toy: JavisPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipe = JavisPipeline.from_pretrained("someone/javis", revision="v1", device="cpu")
    assert asked == [("someone/javis", "v1")] and pipe.folder == saved
    Path("someone").mkdir()
    Path("someone/javis").symlink_to(saved)
    JavisPipeline.from_pretrained("someone/javis", device="cpu")
    assert len(asked) == 1  # a folder comes first


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="no such folder here, and the hub does not give it") as caught:
        JavisPipeline.from_pretrained("someone/who-is-not-there")
    assert "\n" not in str(caught.value) and "'someone/who-is-not-there'" in str(caught.value)
