"""Caches in the pipeline, on the command line and in the benchmark, on a tiny checkpoint with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from javis import JavisPipeline
from javis.cache_options import CacheConfig
from javis.cli import main
from javis.errors import UsageError
from javis.plan import step_flops, token_grid
from javis.sample.cache import CachedDenoiser
from javis.sample.graph import GraphedDenoiser

from .model.small import make_inputs, small_config, small_model
from .sample.test_graph import Recorder
from .tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red ball bounces on the left"
QUICK: dict[str, Any] = {"steps": 4, "seconds": 0.5, "seed": 3, "order": "together"}
HALF = "tea=inf,most=1"  # the layers are computed in every second evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> JavisPipeline:
    return JavisPipeline.from_pretrained(checkpoint)


def test_off_by_default_and_reported_when_on(pipeline: JavisPipeline) -> None:
    exact = pipeline(PROMPT, **QUICK)
    off = pipeline(PROMPT, **QUICK, cache="none")
    assert exact.caches is None and off.caches is None
    assert (off.video == exact.video).all() and (off.audio == exact.audio).all()
    for cache in (HALF, CacheConfig(kind="tea", video=float("inf"), audio=float("inf"), most=1)):
        clip = pipeline(PROMPT, **QUICK, cache=cache)
        assert clip.caches is not None
        assert clip.caches[0]["kind"] == "tea" and clip.caches[0]["most"] == 1
        assert clip.caches[0]["computed"] == {"video": 0.5, "audio": 0.5}
        assert (clip.video != exact.video).any() and (clip.audio != exact.audio).any()


def test_a_clip_with_a_cache_does_not_depend_on_its_batch(pipeline: JavisPipeline) -> None:
    prompts, options = [PROMPT, "a large blue box swings"], QUICK | {"cache": "tea=0.3", "steps": 8}
    together = pipeline(prompts, **options)
    alone = [pipeline(prompt, **options | {"seed": 3 + i}) for i, prompt in enumerate(prompts)]
    assert together.caches == [clip.caches[0] for clip in alone if clip.caches is not None]
    for i, clip in enumerate(alone):
        assert np.abs(together.video[i].astype(int) - clip.video[0].astype(int)).max() <= 1


def test_the_best_of_several_has_its_own_report(pipeline: JavisPipeline) -> None:
    prompts, options = [PROMPT, "a large blue box swings"], QUICK | {"cache": "tea=0.4", "steps": 8}
    best = pipeline(prompts, **options, best_of=2, batch_size=3)
    alone = [pipeline(prompt, **options | {"seed": best.seeds[i]}) for i, prompt in enumerate(prompts)]
    assert best.caches == [clip.caches[0] for clip in alone if clip.caches is not None] and len(best.caches) == 2


def test_the_polynomials_are_those_of_the_checkpoint(pipeline: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"video": [0.0], "audio": [1000.0]}  # the picture never changes, the sound always does
    sampling = pipeline.description["sampling"] | {"cache_polynomials": own}
    monkeypatch.setattr(pipeline, "description", pipeline.description | {"sampling": sampling})
    (report,) = pipeline(PROMPT, **QUICK, cache="tea=0.1").caches or []
    assert report["computed"] == {"video": 0.25, "audio": 1.0} and report["video_polynomial"] == [0.0]


def test_refused_before_anything_is_generated(pipeline: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was generated")

    monkeypatch.setattr(pipeline, "encode_text", never)
    with pytest.raises(UsageError, match="unknown cache 'deep'"):
        pipeline(PROMPT, **QUICK, cache="deep=1")
    with pytest.raises(UsageError, match="a cache must be a text such as first-block=0.1"):
        pipeline(PROMPT, **QUICK, cache=0.1)  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline, "denoiser", GraphedDenoiser(pipeline.model, backend=Recorder()))
    with pytest.raises(UsageError, match="cache tea: a cache decides in every step .* CUDA graph"):
        pipeline(PROMPT, **QUICK, cache=HALF)
    monkeypatch.setattr(pipeline, "denoiser", None)
    monkeypatch.setattr(pipeline, "model", torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="a Linear holds a share of them in each process"):
        pipeline(PROMPT, **QUICK, cache=HALF)


def test_on_the_command_line_and_in_the_json(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    options = ["--steps", "4", "--seconds", "0.5", "--order", "together", "--resolution", "32x32", "--cache", HALF]
    assert main(["sample", PROMPT, "--checkpoint", str(checkpoint), "--out", str(out), *options]) == 0
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["cache"] == {
        "kind": "tea", "video": "inf", "audio": "inf", "most": 1, "video_polynomial": [1.0, 0.0],
        "audio_polynomial": [1.0, 0.0], "computed": {"video": 0.5, "audio": 0.5},
    }  # fmt: skip
    assert facts["request"]["cache"] == HALF


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "deep=1"], "unknown cache 'deep'; expected none, first-block=0.1 or"),
        (["--cache", "tea=nan"], "video threshold of a cache must be from 0 (off) to 100, or inf; got nan"),
        (["--cache", "tea=0.1", "--cuda-graphs"], "expected --cache without --cuda-graphs, --cfg-parallel"),
        (["--cache", "tea=0.1", "--cfg-parallel", "2"], "expected --cache without"),
    ],
)
def test_unusable_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", PROMPT, *arguments]) == 2
    assert message in capsys.readouterr().err


# -- the benchmark -----------------------------------------------------------------------------------------------------

if (ROOT / "benchmarks/caches.py").is_file():
    from benchmarks import caches

    def test_share_of_work_by_depth() -> None:
        """Half of two layers is one layer."""
        one, two = small_config(depth=1), small_config(depth=2)
        grid = token_grid(two, (3, 4, 6), (10, 3))
        flops = [sum(w.flops for w in caches.step_work(c, grid) if w.kind != "elementwise") for c in (one, two)]
        report = {"kind": "tea", "computed": {"video": 0.5, "audio": 0.5}}
        assert caches.share_of_work(two, grid, report) == pytest.approx(flops[0] / flops[1], rel=1e-12)
        assert caches.share_of_work(two, grid, report | {"computed": {"video": 1.0, "audio": 1.0}}) == 1.0

    @pytest.mark.parametrize("kind", ["temporal", "prior", "text"])
    def test_share_of_work_of_attentions(kind: str) -> None:
        """What an evaluation saves, against PyTorch's own counter, which does not know its fused attention on a CPU."""
        model = small_model(caption_length=6)
        noisy, told = make_inputs(model.config, batch=1)
        told.pop("text_mask")
        with torch.no_grad():
            condition = model.condition(**told)
        every = {name: 2 if name == kind else 1 for name in ("temporal", "prior", "text")}
        cached = CachedDenoiser(model, CacheConfig(kind="attention", **every))
        counted = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                cached.denoise(**noisy, condition=condition)
            counted.append(counter.get_total_flops())
        computed = {name: {k: 0.0 if k == kind else 1.0 for k in every} for name in ("video", "audio")}
        grid = token_grid(model.config, (3, 4, 6), (10, 3))
        flops = step_flops(model.config, grid)
        share = caches.share_of_work(model.config, grid, {"kind": "attention", "computed": computed})
        saved = counted[0] - counted[1] + (0 if kind == "prior" else flops[f"{kind}_attention"])
        assert saved == pytest.approx((1 - share) * sum(flops.values()), rel=1e-9) and counted[1] < counted[0]

    def test_polynomials_and_controls() -> None:
        x = np.linspace(0, 1, 9)
        powers, explained = caches.fit([(v, 3 * v**2 - v + 0.5) for v in x] + [(float("nan"), 1.0)], 2)
        assert powers == pytest.approx([3, -1, 0.5], abs=1e-6) and explained == pytest.approx(1)
        with pytest.raises(UsageError, match="2 changes for a polynomial of degree 2"):
            caches.fit([(0.0, 0.0), (1.0, 1.0)], 2)
        controls = [
            {"work": w, "f1": w, "captions_right": 0.5, "video_error": 1 - w, "audio_error": None}
            for w in (1.0, 0.25, 0.5)
        ]
        assert caches.with_control({"work": 0.75}, controls) == {
            "work": 0.75, "control_f1": 0.75, "control_captions_right": 0.5, "control_video_error": 0.25,
        }  # fmt: skip
        assert caches.with_control({"work": 0.1}, controls) == {"work": 0.1}

    @pytest.mark.slow
    def test_the_command_on_a_tiny_checkpoint(checkpoint: Path) -> None:
        common = {"checkpoint": str(checkpoint), "clips": 2, "steps": 4}
        rows = caches.main(caches.Args(**common, caches=(HALF, "attention=2"), controls=(2,)))  # type: ignore[arg-type]
        assert [(r["steps"], r["cache"]) for r in rows] == [(4, None), (2, None), (4, HALF), (4, "attention=2")]
        assert rows[0]["video_error"] == 0 and rows[0]["work"] == 1 and rows[1]["work"] == 0.5
        assert rows[2]["computed"] == {"video": 0.5, "audio": 0.5} and 0.5 < rows[2]["work"] < 0.6
        assert rows[2]["video_error"] > 0 and 0.5 < rows[3]["work"] < 1
        (row,) = caches.main(caches.Args(**common, fit=True, degree=1))  # type: ignore[arg-type]
        assert {len(powers) for powers in row["polynomials"].values()} == {2}
