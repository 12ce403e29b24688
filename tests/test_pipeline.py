"""JavisPipeline on a tiny checkpoint with random weights: what a clip depends on, exact lengths, one-line errors."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from javis import JavisPipeline
from javis.errors import FailedError, UsageError
from javis.kernels import OPS, native, use_backend
from javis.model.ops import ModelOps
from javis.pipeline import ClipBatch

from .tiny import write_tiny_checkpoint

PROMPTS = ["a red ball bounces on the left", "a large blue box swings", "an unseen metal bell rings"]
QUICK: dict[str, Any] = {"steps": 2, "seconds": 0.5}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pipeline(checkpoint: Path) -> JavisPipeline:
    return JavisPipeline.from_pretrained(checkpoint)


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def differs(a: ClipBatch, b: ClipBatch) -> tuple[int, float]:
    """Largest difference of the pictures in levels, and of the sounds."""
    levels = np.abs(a.video.astype(int) - b.video.astype(int)).max()
    return int(levels), float(np.abs(a.audio - b.audio).max())


def check_same(a: ClipBatch, b: ClipBatch) -> None:
    levels, sound = differs(a, b)
    assert levels <= 1 and sound < 1e-4
    assert a.video.std() > 1 and np.abs(a.audio).max() > 1e-3  # there is something to compare


def test_it_runs_on_the_kernels_unless_told_otherwise(checkpoint: Path, pipeline: JavisPipeline) -> None:
    assert pipeline.model.layers[0].video_spatial.ops.ada_layer_norm is OPS["ada_layer_norm"].function
    plain = JavisPipeline.from_pretrained(checkpoint, ops=ModelOps())
    assert plain.model.layers[0].video_spatial.ops == ModelOps()
    check_same(pipeline(PROMPTS, seed=3, **QUICK), plain(PROMPTS, seed=3, **QUICK))


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
def test_a_whole_clip_on_a_backend_that_not_every_op_has(pipeline: JavisPipeline) -> None:
    """As with JAVIS_BACKEND=cpu: the solver's update and the captions' attention have no such kernel."""
    with use_backend("cpu"):
        clip = pipeline(PROMPTS[0], seed=3, **QUICK)
    check_same(clip, pipeline(PROMPTS[0], seed=3, **QUICK))


# -- what a clip depends on --------------------------------------------------------------------------------------------


def test_a_clip_depends_on_its_seed_and_not_on_the_batch(pipeline: JavisPipeline) -> None:
    seeds = [11, 5, 2**62 + 1]
    clips = pipeline(PROMPTS, seed=seeds, **QUICK)
    assert clips.seeds == seeds and len(clips) == 3
    check_same(clips, pipeline(PROMPTS, seed=seeds, batch_size=2, **QUICK))
    for i in range(3):
        single = pipeline(PROMPTS[i], seed=seeds[i], **QUICK)
        assert single.prompts == [clips.prompts[i]]
        levels = np.abs(single.video[0].astype(int) - clips.video[i]).max()
        assert levels <= 1 and np.abs(single.audio[0] - clips.audio[i]).max() < 1e-4
    order = [2, 0, 1]
    turned = pipeline([PROMPTS[i] for i in order], seed=[seeds[i] for i in order], **QUICK)
    for position, i in enumerate(order):
        assert np.abs(turned.video[position].astype(int) - clips.video[i]).max() <= 1
        assert np.abs(turned.audio[position] - clips.audio[i]).max() < 1e-4


def test_same_call_same_bytes_other_seed_other_clip(pipeline: JavisPipeline) -> None:
    first, again, other = (pipeline(PROMPTS[0], seed=s, **QUICK) for s in (3, 3, 4))
    assert np.array_equal(first.video, again.video) and np.array_equal(first.audio, again.audio)
    levels, sound = differs(first, other)
    assert levels > 10 and sound > 1e-3


def test_one_seed_counts_up(pipeline: JavisPipeline) -> None:
    clips = pipeline(PROMPTS[:2], seed=7, **QUICK)
    assert clips.seeds == [7, 8]
    check_same(clips, pipeline(PROMPTS[:2], seed=[7, 8], **QUICK))


def test_a_generator_draws_the_seeds(pipeline: JavisPipeline) -> None:
    clips, again = (pipeline(PROMPTS[:2], generator=torch.Generator().manual_seed(1), **QUICK) for _ in range(2))
    assert clips.seeds == again.seeds and clips.seeds[0] != clips.seeds[1]
    check_same(clips, pipeline(PROMPTS[:2], seed=clips.seeds, **QUICK))
    generator = torch.Generator().manual_seed(1)
    assert (
        pipeline(PROMPTS[0], generator=generator, **QUICK).seeds
        != pipeline(PROMPTS[0], generator=generator, **QUICK).seeds
    )


def test_wording_does_not_matter_but_the_meaning_does(pipeline: JavisPipeline) -> None:
    plain = pipeline("a red ball bounces on the left", seed=1, **QUICK)
    check_same(plain, pipeline("A RED circle, bouncing (left)!", seed=1, **QUICK))
    assert differs(plain, pipeline("a red ball bounces on the right", seed=1, **QUICK))[0] > 1


def test_the_sound_has_a_guidance_of_its_own(pipeline: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"seed": 1, "order": "together", **QUICK, "steps": 1}  # of one step, nothing mixes
    both = pipeline(PROMPTS[0], guidance=3.0, **options)
    check_same(both, pipeline(PROMPTS[0], guidance=3.0, audio_guidance=3.0, **options))
    louder = pipeline(PROMPTS[0], guidance=3.0, audio_guidance=9.0, **options)
    picture, sound = differs(both, louder)
    assert picture <= 1 and sound > 1e-3
    assert (louder.guidance, louder.audio_guidance) == (3.0, 9.0)
    monkeypatch.setitem(pipeline.description["sampling"], "audio_guidance", 9.0)
    usual = pipeline(PROMPTS[0], **options)
    assert usual.audio_guidance == 9.0
    assert pipeline(PROMPTS[0], guidance=3.0, **options).audio_guidance == 3.0  # one number given is for both


def test_guidance_1_does_not_ask_the_null_caption(checkpoint: Path) -> None:
    pipeline = JavisPipeline.from_pretrained(checkpoint)
    before = {g: pipeline(PROMPTS[0], seed=1, guidance=g, **QUICK) for g in (1, 2.0)}
    with torch.no_grad():
        pipeline.model.embed.video_text.null.add_(1.0)
    check_same(before[1], pipeline(PROMPTS[0], seed=1, guidance=1, **QUICK))
    assert differs(before[2.0], pipeline(PROMPTS[0], seed=1, guidance=2.0, **QUICK))[0] > 1
    assert differs(before[1], before[2.0])[0] > 1


def test_negative_prompt_takes_the_place_of_the_null_caption(pipeline: JavisPipeline) -> None:
    """At guidance 0 only the unconditional half counts: the prompt does not matter, the negative prompt does."""
    options: dict[str, Any] = {"seed": [4, 9], "guidance": 0, **QUICK}
    one = pipeline(PROMPTS[:2], negative_prompt=PROMPTS[2], **options)
    check_same(one, pipeline([PROMPTS[1], PROMPTS[1]], negative_prompt=[PROMPTS[2]] * 2, batch_size=1, **options))
    assert differs(one, pipeline(PROMPTS[:2], negative_prompt=PROMPTS[0], **options))[0] > 1
    assert differs(one, pipeline(PROMPTS[:2], **options))[0] > 1
    plain = {"seed": 4, "guidance": 1, **QUICK}
    check_same(pipeline(PROMPTS[0], **plain), pipeline(PROMPTS[0], negative_prompt=PROMPTS[1], **plain))


def test_ablations(pipeline: JavisPipeline) -> None:
    def clip(*ablate: Any) -> ClipBatch:
        return pipeline(PROMPTS[0], seed=1, guidance=1, ablate=ablate, **QUICK)

    full, prior, bidirectional = clip(), clip("prior"), clip("bidirectional")
    for a, b in ((full, prior), (full, bidirectional), (prior, bidirectional)):
        levels, sound = differs(a, b)
        assert levels > 1 and sound > 1e-3
    check_same(clip("prior", "bidirectional"), clip("bidirectional", "prior"))


# -- lengths and records -----------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seconds=st.floats(0.25, 4.0))
def test_picture_and_sound_last_equally_long(pipeline: JavisPipeline, seconds: float) -> None:
    clips = pipeline(PROMPTS[0], seed=0, steps=1, guidance=1, seconds=seconds)
    frames = clips.video.shape[1]
    assert clips.video.shape == (1, frames, 32, 32, 3) and clips.video.dtype == np.uint8
    assert abs(frames / 16 - seconds) <= 0.5 / 16 and frames == pipeline.frames_of(seconds)
    assert clips.audio.shape == (1, frames * 1000) and clips.audio.dtype == np.float32  # 16 fps, 16 kHz
    assert clips.seconds == clips.audio.shape[1] / clips.sample_rate
    assert np.abs(clips.audio).max() <= 1


@pytest.mark.parametrize(("seconds", "frames"), [(0.25, 4), (1, 16), (2.0, 32), (1.03125, 16), (1.04, 17), (4, 64)])
def test_seconds_become_whole_frames(pipeline: JavisPipeline, seconds: float, frames: int) -> None:
    assert pipeline.frames_of(seconds) == frames


def test_defaults_come_from_the_checkpoint(checkpoint: Path, pipeline: JavisPipeline) -> None:
    sampling = json.loads((checkpoint / "config.json").read_text())["sampling"]
    clips = pipeline(PROMPTS[0])
    assert (clips.steps, clips.guidance) == (sampling["steps"], sampling["guidance"])
    assert (clips.fps, clips.sample_rate, clips.seconds) == (16, 16000, 2.0)
    stages = {"text", "prior", "condition", "denoise", "video_decode", "audio_decode"}
    assert set(clips.seconds_per_stage) == stages
    assert all(value >= 0 for value in clips.seconds_per_stage.values())


def test_progress_counts_every_step_of_every_batch(pipeline: JavisPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(PROMPTS, seed=0, steps=3, seconds=0.25, batch_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


# -- unusable arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no prompt was given"),
        ("", {}, "empty prompt"),
        ("  \n ", {}, "empty prompt"),
        ("a " * 5000, {}, "10000 characters"),
        ("a pink elephant bounces", {}, r"unknown word\(s\) 'pink', 'elephant'.*knows: .*red"),
        (["a red ball bounces", "a red\nunicorn"], {}, "'unicorn'"),
        ("a red ball bounces", {"negative_prompt": "sad music"}, "unknown word"),
        ("a red ball bounces", {"negative_prompt": ["a ball"] * 2}, "2 negative prompts for 1 prompts"),
        ("a red ball bounces", {"steps": 0}, "steps must be .*got 0"),
        ("a red ball bounces", {"steps": -3}, "steps"),
        ("a red ball bounces", {"steps": 2.5}, "steps must be a whole number"),
        ("a red ball bounces", {"steps": 10**6}, "steps"),
        ("a red ball bounces", {"seconds": math.nan}, "seconds must be between 0.25 and 4.0, got nan"),
        ("a red ball bounces", {"seconds": -1}, "seconds"),
        ("a red ball bounces", {"seconds": 0}, "seconds"),
        ("a red ball bounces", {"seconds": math.inf}, "seconds"),
        ("a red ball bounces", {"seconds": 4.01}, "seconds"),
        ("a red ball bounces", {"seconds": "2"}, "seconds"),
        ("a red ball bounces", {"guidance": math.nan}, "guidance"),
        ("a red ball bounces", {"guidance": -1}, "guidance"),
        ("a red ball bounces", {"guidance": math.inf}, "guidance"),
        ("a red ball bounces", {"audio_guidance": math.nan}, "audio_guidance"),
        ("a red ball bounces", {"batch_size": 0}, "batch size"),
        ("a red ball bounces", {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ("a red ball bounces", {"seed": -1}, "between 0 and"),
        ("a red ball bounces", {"seed": 2**63}, "between 0 and"),
        ("a red ball bounces", {"ablate": ["priors"]}, "'priors'.*prior, bidirectional"),
    ],
)
def test_unusable_arguments(pipeline: JavisPipeline, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipeline(prompt, **(QUICK | options))
    assert "\n" not in str(caught.value)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def check_refused(folder: Path, message: str) -> None:
    with pytest.raises((UsageError, FailedError), match=message) as caught:
        JavisPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_missing_checkpoints(copied: Path, tmp_path: Path) -> None:
    check_refused(tmp_path / "nowhere", "config.json is missing")
    check_refused(copied / "config.json", "config.json is missing")  # a file, not a folder
    (copied / "model.safetensors").rename(copied / "weights.safetensors")
    check_refused(copied, "model.safetensors is missing")


@pytest.mark.parametrize("damage", ["random", "truncated", "empty", "header", "directory"])
def test_corrupt_weights(copied: Path, damage: str) -> None:
    path = copied / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
        check_refused(copied, "model.safetensors")
        return
    path.write_bytes({
        "random": np.random.default_rng(0).bytes(5000),
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "header": b"\xff" * 8 + content[8:],
    }[damage])  # fmt: skip
    check_refused(copied, "model.safetensors is corrupt")


def edit_config(folder: Path, *path: str, value: Any) -> None:
    description = json.loads((folder / "config.json").read_text())
    part = description
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "hidden_size"), 48),
        (("model", "depth"), 2),
        (("model", "video_channels"), 7),
        (("prior", "out_dim"), 16),
        (("codecs", "video", "coefficients"), 5),
    ],
)
def test_weights_that_do_not_fit_the_configuration(copied: Path, path: tuple[str, ...], value: int) -> None:
    edit_config(copied, *path, value=value)
    check_refused(copied, "do not fit config.json|not usable")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "3", '"demo"', "{}", "\x00\xff"])
def test_configurations_that_are_none(copied: Path, content: str) -> None:
    (copied / "config.json").write_bytes(content.encode("latin-1"))
    check_refused(copied, "config.json is not usable")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((part,), None) for part in ("model", "prior", "codecs", "text", "clip", "sampling")),
        (("clip", "fps"), None),
        (("clip", "fps"), 0),
        (("clip", "size"), "large"),
        (("clip", "sample_rate"), -1),
        (("sampling", "steps"), None),
        (("sampling", "timestep_ratio"), "none"),
        (("model", "num_heads"), 0),
        (("model", "hidden_size"), -24),
        (("model", "hidden_size"), "wide"),
        (("model", "depth"), 1.5),
        (("model", "colour"), "red"),
        (("text", "vocabulary"), 3),
        (("codecs", "mel", "hop"), 0),
    ],
)
def test_unusable_configurations(copied: Path, path: tuple[str, ...], value: Any) -> None:
    edit_config(copied, *path, value=value)
    check_refused(copied, "config.json")


def test_weights_that_are_not_finite_are_noticed(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.video_final.linear.weight"][0, 0] = math.nan
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(FailedError, match="not finite; check the checkpoint") as caught:
        JavisPipeline.from_pretrained(copied)(PROMPTS[0], **QUICK)
    assert "\n" not in str(caught.value)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sprung = copied / "sprung"
    for name in ("model.pt", "pytorch_model.bin", "model.safetensors.pt", "config.pkl"):
        (copied / name).write_bytes(pickle.dumps(Trap(sprung)))
    JavisPipeline.from_pretrained(copied)
    assert not sprung.exists()
    (copied / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    check_refused(copied, "corrupt")
    (copied / "model.safetensors").unlink()
    check_refused(copied, "model.safetensors is missing")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
