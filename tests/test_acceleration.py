"""What a pipeline is told about speed reaches its model, in the order that works, or is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from javis import JavisPipeline
from javis.acceleration import accelerate
from javis.clip_batch import ClipBatch
from javis.errors import UsageError
from javis.precision import precision_of
from javis.sample import graph
from javis.sample_options import PipelineArgs, load_pipeline
from javis.sample_options import identity as recorded
from tests.model.small import small_model
from tests.sample.test_graph import Recorder


def pipeline(folder: Path | None = None, policy: str = "all") -> Any:
    return SimpleNamespace(
        model=small_model(), folder=folder, residency=SimpleNamespace(policy=policy), denoiser=None, student=None
    )


def test_nothing_changes_unless_asked() -> None:
    pipe = accelerate(pipeline())
    assert pipe.denoiser is None and precision_of(pipe.model) == {}
    assert pipe.model.time_block.weight.dtype == torch.float32
    assert all(b._compiled_call_impl is None for layer in pipe.model._layers for b in layer.blocks().values())


def test_the_layers_measured_for_these_weights_are_kept(tmp_path: Path) -> None:
    name = "layers.0.video_spatial.attn.qkv"
    full, small = tmp_path / "full", tmp_path / "small"
    for folder, place in ((full, full / "transformer"), (small, small)):  # beside the weights, in either layout
        place.mkdir(parents=True)
        assert precision_of(accelerate(pipeline(folder), precision="fp8", emulate=True).model)["keep"] == []
        (place / "fp8.json").write_text(json.dumps({"keep": [name]}))
        pipe = accelerate(pipeline(folder), precision="fp8", emulate=True)
        assert precision_of(pipe.model) == {"precision": "fp8", "keep": [name]}
    pipe = accelerate(pipeline(small), precision="fp8", emulate=True, keep=["layers.1.*.mlp.fc1"])
    assert len(precision_of(pipe.model)["keep"]) == 6
    assert precision_of(accelerate(pipeline(), precision="fp8", emulate=True).model)["keep"] == []
    assert precision_of(accelerate(pipeline(small), precision="bf16").model) == {"precision": "bf16"}


def test_precision_then_compile_then_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "CudaGraphs", Recorder)
    pipe = accelerate(pipeline(), precision="fp8", emulate=True, compile_blocks=True, cuda_graphs=True)
    assert isinstance(pipe.denoiser, graph.GraphedDenoiser) and pipe.denoiser.model is pipe.model
    assert all(b._compiled_call_impl is not None for layer in pipe.model._layers for b in layer.blocks().values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it may run")
def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a GPU with FP8 matrix products"):
        accelerate(pipeline(), precision="fp8")
    with pytest.raises(UsageError, match="CUDA graphs: needs a CUDA device"):
        accelerate(pipeline(), cuda_graphs=True)
    with pytest.raises(UsageError, match="residency 'offload' moves it; use 'all'"):
        accelerate(pipeline(policy="offload"), cuda_graphs=True)
    with pytest.raises(UsageError, match="residency 'staged' reads it for each clip"):
        accelerate(pipeline(policy="staged"), precision="bf16")


# -- a whole pipeline --------------------------------------------------------------------------------------------------

PROMPT = "a dog barks at the sea"


@pytest.fixture(scope="module")
def toy() -> JavisPipeline:
    return JavisPipeline.with_random_weights("toy", device="cpu")


def make(pipe: JavisPipeline) -> ClipBatch:
    return pipe(PROMPT, seconds=0.3, steps=2, seed=3)


def test_graphs_change_no_bit_of_a_clip(toy: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(toy)
    monkeypatch.setattr(graph, "CudaGraphs", Recorder)
    accelerate(toy, cuda_graphs=True)
    assert isinstance(toy.denoiser, graph.GraphedDenoiser)
    try:
        actual = make(toy)
        recorder = toy.denoiser.backend
        assert isinstance(recorder, Recorder) and (recorder.captures, recorder.replays) == (1, 2)
    finally:
        toy.denoiser = None
    assert np.array_equal(actual.video, expected.video) and np.array_equal(actual.audio, expected.audio)


def test_fp8_makes_a_clip_that_is_near(toy: JavisPipeline) -> None:
    expected = make(toy)
    plain = toy.model
    try:
        toy.model = copy.deepcopy(plain)
        accelerate(toy, precision="fp8", emulate=True, keep=["*.bidirectional.*"])  # 24 wide, which 16 does not divide
        actual = make(toy)
    finally:
        toy.model = plain
    difference = np.abs(actual.video.astype(float) - expected.video).mean()
    assert 0 < difference < 0.5 * np.abs(expected.video - expected.video.mean()).mean()


def test_a_cached_caption_is_not_encoded_again(
    toy: JavisPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.save_pretrained(tmp_path / "checkpoint")
    expected = make(toy)
    for first in (True, False):
        options = PipelineArgs(
            checkpoint=str(tmp_path / "checkpoint"), device="cpu", condition_cache=tmp_path / "cache"
        )
        pipe = load_pipeline(options)
        if not first:
            monkeypatch.setattr(type(pipe.text_encoder), "__call__", None)
            monkeypatch.setattr(type(pipe.prior_text_encoder), "__call__", None)
        clip = make(pipe)
        assert np.array_equal(clip.video, expected.video) and np.array_equal(clip.audio, expected.audio)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # of both encoders


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it may run")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "--precision fp8 needs a GPU"),
        ({"precision": "fp8-te", "random_weights": True}, "--precision fp8-te needs a GPU"),
        ({"cuda_graphs": True}, "--cuda-graphs needs a CUDA device"),
    ],
)
def test_what_the_device_has_not_is_refused_before_loading(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("from_pretrained", "with_random_weights"):
        monkeypatch.setattr(JavisPipeline, name, None)
    with pytest.raises(UsageError, match=message):
        load_pipeline(PipelineArgs(**options))


def test_precision_is_part_of_what_makes_a_clip() -> None:
    plain, reduced = (PipelineArgs(precision=precision) for precision in (None, "bf16"))
    assert reduced != plain and recorded(reduced, False) == recorded(plain, False) | {"precision": "bf16"}
