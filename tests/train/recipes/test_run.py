"""Stages from a recipe to a checkpoint that samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from javis import JavisPipeline
from javis.cli import main
from javis.errors import UsageError
from javis.model.checkpoint import to_official
from javis.train.recipes.config import AudioRecipe, Draws, JointRecipe
from javis.train.recipes.parameters import part_of
from javis.train.recipes.run import prepared
from javis.train.recipes.sources import WorldSource
from javis.train.recipes.start import load_components, take_weights, training_model

QUICK = ["--batch", "2", "--steps", "2", "--log-every", "1", "--warmup", "1", "--device", "cpu"]
SHORT = ["--seconds", "0.5", *QUICK]


def weights(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {n[len(prefix) :]: v for n, v in load_file(folder / "model.safetensors").items() if n.startswith(prefix)}


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder, "model.")


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name].float(), b[name].float())}


# -- weights to start from ---------------------------------------------------------------------------------------------


def test_starting_weights(checkpoint: Path) -> None:
    """The checkpoint's own, with the audio branch from the video branch, or random ones from the seed."""
    pipe = load_components(str(checkpoint), torch.device("cpu"))
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    model = training_model(pipe, AudioRecipe(init=str(checkpoint)))
    assert pipe.model is model
    parts = {part_of(name) for name in changed(before, model.state_dict())}
    assert parts <= {"audio", "audio_text", "null"} and "audio" in parts
    assert torch.equal(model.embed.audio_text.null, model.embed.video_text.null)
    fresh = [
        training_model(load_components(str(checkpoint), torch.device("cpu")), JointRecipe(fresh=True, seed=s))
        for s in (1, 1, 2)
    ]
    assert not changed(fresh[0].state_dict(), fresh[1].state_dict())
    assert len(changed(fresh[0].state_dict(), fresh[2].state_dict())) > 30
    assert changed(fresh[0].state_dict(), before)


def test_official_weight_files(checkpoint: Path, tmp_path: Path) -> None:
    """As the official ``weight_init_from``: what fits by name and shape, whatever else the file holds."""
    pipe = load_components(str(checkpoint), torch.device("cpu"))
    model = training_model(pipe, JointRecipe())
    given = {name: torch.randn_like(value) for name, value in model.state_dict().items() if part_of(name) == "video"}
    save_file({**to_official(given), "something.else": torch.ones(1)}, tmp_path / "stdit3.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take_weights(model, tmp_path / "stdit3.safetensors")
    assert set(taken) == set(given) == changed(before, model.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in given.items())
    save_file({"x_embedder.proj.weight": torch.zeros(3, 4, 1, 2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"1 names fit, but no shape \(embed\.video\.proj\.weight\)"):
        take_weights(model, tmp_path / "other.safetensors")


def test_timesteps_of_a_checkpoint_that_names_its_shift(checkpoint: Path) -> None:
    with prepared(JointRecipe(init=str(checkpoint), seconds=0.5)) as stage:
        assert isinstance(stage.source, WorldSource) and stage.source.draws.shift == 9.0
        assert stage.pipe.description["sampling"]["timestep_ratio"] == 9.0
    with prepared(JointRecipe(init=str(checkpoint), seconds=0.5, draws=Draws(shift=2.0))) as stage:
        assert isinstance(stage.source, WorldSource) and stage.source.draws.shift == 2.0


# -- stages ------------------------------------------------------------------------------------------------------------


def test_audio_then_joint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On drawn clips: a stage trains what it should, shows what it does, and leaves a checkpoint that samples."""
    audio, joint = tmp_path / "audio", tmp_path / "joint"
    assert (
        main(["train", "audio", "--init", str(checkpoint), "--out", str(audio), "--audio-from", "checkpoint", *SHORT])
        == 0
    )
    parts = {part_of(name) for name in changed(transformer(checkpoint), transformer(audio / "checkpoint"))}
    assert parts == {"audio", "audio_text"}
    sampling = ["--sample-every", "1", "--sample-steps", "1", "--prompts", "a red ball bounces"]
    assert main(["train", "joint", "--init", str(audio / "checkpoint"), "--out", str(joint), *sampling, *SHORT]) == 0
    parts = {part_of(name) for name in changed(transformer(audio / "checkpoint"), transformer(joint / "checkpoint"))}
    assert parts == {"prior", "bidirectional"}
    assert f"checkpoint: {joint / 'checkpoint'}" in capsys.readouterr().out
    assert [path.name for path in sorted((joint / "samples").iterdir())] == ["step_0000001_0.png", "step_0000002_0.png"]
    assert any(path.name.startswith("events.") for path in (joint / "tensorboard").iterdir())
    configs = [json.loads(path.read_text()) for path in sorted(joint.rglob("checkpoints/*/config.json"))]
    assert configs and all(c["recipe"]["stage"] == "joint" and c["recipe"]["batch"] == 2 for c in configs)
    facts = json.loads((joint / "checkpoint" / "config.json").read_text())["training"]
    assert facts["stage"] == "joint" and facts["steps"] == 2
    clip = JavisPipeline.from_pretrained(joint / "checkpoint")("a red ball bounces", seconds=0.5, steps=1, seed=0)
    assert clip.video.shape == (1, 8, 32, 32, 3)


def test_in_bfloat16_sharded_and_recomputed(checkpoint: Path, tmp_path: Path) -> None:
    """The same losses as in float32 within bfloat16's rounding, and samples and export from gathered weights."""
    losses = {}
    for name, more in (
        ("fp32", []),
        (
            "bf16",
            ["--precision", "bf16", "--activation-checkpointing", "full", "--sample-every", "2", "--sample-steps", "1"],
        ),
    ):
        out = tmp_path / name
        assert (
            main(["train", "joint", "--init", str(checkpoint), "--out", str(out), "--train", "all", *SHORT, *more]) == 0
        )
        losses[name] = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        after = transformer(out / "checkpoint")
        parts = {part_of(name) for name in changed(transformer(checkpoint), after)}
        assert parts - {"null"} == {"shared", "video", "audio", "video_text", "audio_text", "prior", "bidirectional"}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert (tmp_path / "bf16" / "samples" / "step_0000002_0.png").is_file()
    clip = JavisPipeline.from_pretrained(tmp_path / "bf16" / "checkpoint")("a red ball bounces", seconds=0.5, steps=1)
    assert clip.video.shape == (1, 8, 32, 32, 3)


def test_a_student_is_left_out(tmp_path: Path) -> None:
    """The built-in checkpoint holds one; it was made from other weights than those that are exported."""
    from javis.train.recipes.task import FlowModule
    from javis.train.recipes.watch import Export

    pipe = load_components("demo", torch.device("cpu"))
    model = training_model(pipe, JointRecipe())
    Export(pipe, tmp_path / "checkpoint", 5, {"stage": "joint"}).on_sample(5, FlowModule(model, "joint"))
    assert JavisPipeline.from_pretrained(tmp_path / "checkpoint").student is None
    assert "student" in pipe.description or pipe.student is None


def test_data_that_is_not_there(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "joint", "--init", str(checkpoint), "--out", str(tmp_path / "x"), *SHORT]
    assert main([*words, "--data", str(tmp_path / "none.csv")]) == 2
    assert main([*words, "--data", "clips"]) == 2
    assert main([*words, "--init", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert any("none.csv" in line for line in said) and any("expected a manifest" in line for line in said)


# -- from files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of six clips of the world on disk, VP9 and wav."""
    folder = tmp_path_factory.mktemp("clips")
    assert main(["world", "make", str(folder), "--count", "6", "--size", "32"]) == 0
    assert main(["data", "make", str(folder)]) == 0
    return folder / "clips.csv"


@pytest.mark.slow
def test_from_encoded_clips(clips: Path, checkpoint: Path, tmp_path: Path) -> None:
    """`javis data encode`, then both flow stages from what it stored: as from the files, but for half precision."""
    stored = str(tmp_path / "latents")
    assert main(["data", "encode", str(clips), stored, "--checkpoint", str(checkpoint), "--processes", "1"]) == 0
    for stage in ("audio", "joint"):
        out = tmp_path / stage
        assert main(["train", stage, "--init", str(checkpoint), "--out", str(out), "--data", stored, *QUICK]) == 0
        assert changed(transformer(checkpoint), transformer(out / "checkpoint"))


@pytest.mark.slow
def test_stage_2_from_shards_and_in_buckets(clips: Path, checkpoint: Path, tmp_path: Path) -> None:
    """From a manifest, from shards, and from tar files that have no index: the same clips, so the same losses."""
    shards, foreign = tmp_path / "shards", tmp_path / "foreign"
    assert main(["data", "shard", str(clips), str(shards)]) == 0
    foreign.mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, foreign)
    losses = []
    for data in (clips, shards, foreign):
        out = tmp_path / f"from_{data.stem}"
        words = ["train", "prior", "--init", str(checkpoint), "--out", str(out), "--data", str(data), *QUICK]
        words += ["--steps", "4", "--feeder", "pyav", "--buckets", "32x32:16:0.5:3,16x16:8:1:2"]
        assert main(words) == 0
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] == losses[2] and len(set(losses[0])) == 4


@pytest.mark.slow
@pytest.mark.parametrize("feeder", ["dali", "pyav"])
def test_three_stages_on_files_to_a_clip(
    feeder: str, clips: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files on disk -> audio -> prior -> joint -> a clip with sound."""
    if feeder == "dali":
        pytest.importorskip("nvidia.dali")
    data = ["--data", str(clips), "--feeder", feeder]
    at = checkpoint
    # Stage 2 trains the estimator; the transformer's prior embedder starts anew where its tokens have other sizes.
    trained = {"audio": {"audio", "audio_text"}, "prior": {"prior", "null"}, "joint": {"prior", "bidirectional"}}
    for stage, parts in trained.items():
        out = tmp_path / stage
        own = ["--audio-from", "checkpoint"] if stage == "audio" else []
        assert main(["train", stage, "--init", str(at), "--out", str(out), *data, *own, *QUICK]) == 0
        after = out / "checkpoint"
        assert {part_of(name) for name in changed(transformer(at), transformer(after))} == parts, stage
        old, new = weights(at, "prior."), weights(after, "prior.")
        assert any(not torch.equal(old[name], new[name]) for name in old.keys() & new.keys()) is (stage == "prior")
        at = after
    made = tmp_path / "clip.mp4"
    words = ["sample", "a red ball bounces", "--checkpoint", str(at), "--seconds", "0.5", "--steps", "1"]
    assert main([*words, "--out", str(made)]) == 0
    assert made.stat().st_size > 0
    capsys.readouterr()
