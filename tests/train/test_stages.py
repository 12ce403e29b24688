"""Whole stages at a tiny size: what they train, going on after a kill, the export."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from javis import JavisPipeline
from javis.model.dit import JavisDiT
from javis.model.prior import PriorEstimator
from javis.train import demo, prior_stage, stages
from javis.train.checkpoint import load_state
from javis.train.config import DemoTrainConfig, StageConfig
from javis.train.latents import load_codecs

from ..tiny import randomize, tiny_config, write_stages

LATER = ("video_prior.", "audio_prior.", "bidirectional.", "prior_time_block.", "embed.prior.")
TIED = "embed.audio_text.null"


def with_steps(config: DemoTrainConfig, steps: int, **changes: Any) -> DemoTrainConfig:
    stage = StageConfig(steps=steps, warmup=2, decay=0.5)
    return dataclasses.replace(config, branches=stage, prior=stage, joint=stage, **changes)


def groups(folder: Path) -> dict[str, dict[str, Tensor]]:
    found = load_state(folder)
    assert found is not None
    return found[1]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def frozen_prior(config: DemoTrainConfig) -> PriorEstimator:
    prior = randomize(PriorEstimator(config.prior_model()), 3)
    assert isinstance(prior, PriorEstimator)
    return prior


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_branches_leave_alone_what_comes_later(config: DemoTrainConfig) -> None:
    config = with_steps(config, 3)
    stages.launch_flow_stage("branches", config, None, None)
    torch.manual_seed(config.seed)
    start = JavisDiT(config.model()).state_dict()
    trained = groups(config.out / "branches")
    later = {name for name in start if name.startswith(LATER) or any(f".{part}" in name for part in LATER)}
    assert {name.split(".")[2] for name in later if name.startswith("layers.0")} == {p[:-1] for p in LATER[:3]}
    expected = set(start) - later - {TIED}
    assert changed(start, trained["model"]) == expected
    assert {name.split("/")[0] for name in trained["optimizer"]} == expected
    assert changed(start, trained["ema"]) == expected
    assert changed(trained["model"], trained["ema"]) == expected


@pytest.mark.parametrize("freeze", [False, True])
def test_joint_trains_everything_or_what_joins_the_branches(config: DemoTrainConfig, freeze: bool) -> None:
    config = with_steps(config, 3, freeze_branches=freeze)
    write_stages(dataclasses.replace(config, out=config.out / "earlier"))  # random weights instead of a first stage
    start = groups(config.out / "earlier" / "joint")["ema"]
    prior = frozen_prior(config)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    stages.launch_flow_stage("joint", config, prior, config.out / "earlier" / "joint")
    trained = groups(config.out / "joint")
    later = {name for name in start if name.startswith(LATER) or any(f".{part}" in name for part in LATER)}
    assert changed(start, trained["model"]) == (later if freeze else set(start) - {TIED})
    assert not changed(before, prior.state_dict())


def test_joint_needs_finished_branches(config: DemoTrainConfig) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished state"):
        stages.launch_flow_stage("joint", config, frozen_prior(config), config.out / "branches")


# -- going on after a kill ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, module: Any) -> Callable[[], None]:
    """Kill the next stage of ``module`` when it begins ``step``; returns what undoes it."""
    real = stages.learning_rate

    def learning_rate(at: int, stage: StageConfig) -> float:
        if at == step:
            raise Killed
        return real(at, stage)

    monkeypatch.setattr(module, "learning_rate", learning_rate)
    return lambda: monkeypatch.setattr(module, "learning_rate", real)


def test_a_killed_flow_stage_ends_with_the_same_weights(
    config: DemoTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after steps 2 and 4, killed before step 4: the steps after 2 are repeated, with the same batches."""
    config = with_steps(config, 5, save_every=2)
    run = lambda: stages.launch_flow_stage("branches", config, None, None)  # noqa: E731
    run()
    whole = groups(config.out / "branches")
    (config.out / "branches").rename(config.out / "uninterrupted")
    revive = kill_at(3, monkeypatch, stages)
    with pytest.raises(Killed):
        run()
    revive()
    found = load_state(config.out / "branches")
    assert found is not None and found[0]["step"] == 2
    torch.manual_seed(123)
    run()
    again = groups(config.out / "branches")
    assert again.keys() == {"model", "ema", "optimizer"}
    for name in whole:
        assert not changed(whole[name], again[name]), name
    weights = (config.out / "branches" / "step_0000005.safetensors").read_bytes()
    run()  # a finished stage is not repeated
    assert (config.out / "branches" / "step_0000005.safetensors").read_bytes() == weights
    rows = [json.loads(line) for line in (config.out / "branches" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5 and len(rows[-1]["validation"]) == 3


def test_a_killed_prior_stage_ends_with_the_same_weights(
    config: DemoTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_steps(config, 4, save_every=2)
    whole = prior_stage.run_prior_stage(config, batch=4).state_dict()
    torch.manual_seed(config.seed)
    start = PriorEstimator(config.prior_model()).state_dict()
    assert len(changed(start, whole)) > 0.9 * len(whole)
    (config.out / "prior").rename(config.out / "uninterrupted")
    revive = kill_at(3, monkeypatch, prior_stage)
    with pytest.raises(Killed):
        prior_stage.run_prior_stage(config, batch=4)
    revive()
    found = load_state(config.out / "prior")
    assert found is not None and found[0]["step"] == 2
    estimator = prior_stage.run_prior_stage(config, batch=4)
    assert not estimator.training
    assert not changed(whole, estimator.state_dict())


@pytest.mark.slow
def test_no_worker_outlives_a_killed_command(tmp_path: Path) -> None:
    """They would go on writing into the folder that the next run writes into.

    torch sends workers SIGINT when their parent dies, which a job in the background of a script ignores.
    """
    config = with_steps(tiny_config(tmp_path / "run", processes=2, batch=4), 10**6, log_every=1)
    demo.prepare(config)
    script = tmp_path / "train.py"
    script.write_text(
        "import pickle, sys\n"
        "from javis.train.stages import launch_flow_stage\n"
        "if __name__ == '__main__':\n"
        "    launch_flow_stage('branches', pickle.load(open(sys.argv[1], 'rb')), None, None)\n"
    )
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    log = config.out / "branches" / "log.jsonl"
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    ignoring = f"trap '' INT; exec {sys.executable} {script} {tmp_path / 'config.pickle'}"
    command = subprocess.Popen(["sh", "-c", ignoring], cwd=root, env=environment)
    try:
        wait_until(lambda: log.exists() and log.stat().st_size > 0, "the first step")
        workers = [int(pid) for pid in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()]
        assert len(workers) >= 2
    finally:
        command.kill()
        command.wait()
    try:
        wait_until(lambda: not any(alive(pid) for pid in workers), "the end of the workers")
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_of_the_default_size(tmp_path: Path) -> None:
    """The packaged weights: at most 15 MB, float16, only what sampling needs; the pipeline holds exactly these."""
    config = DemoTrainConfig(out=tmp_path)
    write_stages(config)
    folder = demo.export(config, tmp_path / "checkpoint")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size <= 15_000_000
    stored = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"model", "prior", "video_codec", "audio_codec"}
    for name, value in stored.items():
        assert value.dtype == (torch.float32 if "codec" in name else torch.float16), name
    assert not [name for name in stored if "discriminator" in name or "embedder" in name]
    pipeline = JavisPipeline.from_pretrained(folder)
    averaged = groups(tmp_path / "joint")["ema"]
    for name, value in pipeline.model.state_dict().items():
        source = "embed.video_text.null" if name == TIED else name
        assert torch.equal(value, averaged[source].half().float()), name
    prior = groups(tmp_path / "prior")["model"]
    for name, value in pipeline.prior.state_dict().items():
        assert torch.equal(value, prior[name].half().float()), name
    video, audio = load_codecs(tmp_path / "codecs.safetensors")
    assert not changed(video.state_dict(), pipeline.video_codec.state_dict())
    assert not changed(audio.state_dict(), pipeline.audio_codec.state_dict())
    assert (pipeline.fps, pipeline.sample_rate, pipeline.size) == (16, 16000, 64)


def test_nothing_to_export(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_stages(config)
    (tmp_path / "prior" / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished joint and prior stage"):
        demo.export(config, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


# -- everything --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_nothing_to_a_clip(tmp_path: Path) -> None:
    """All stages with real worker processes, in bf16; a second run finds everything finished."""
    config = tiny_config(tmp_path / "run", processes=2, batch=4, precision="bf16")
    folder = demo.run(config)
    weights = (folder / "model.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text())["training"]["steps"] == 2
    assert {"device", "commit"} <= json.loads((tmp_path / "run/config.json").read_text())["environment"].keys()
    clips = JavisPipeline.from_pretrained(folder)("a red ball bounces", seconds=0.5, steps=2, seed=0)
    assert clips.video.shape == (1, 8, 32, 32, 3) and clips.audio.shape == (1, 8000)
    demo.run(config)
    assert (folder / "model.safetensors").read_bytes() == weights
