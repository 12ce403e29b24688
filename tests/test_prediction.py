"""What ``javis plan`` predicts for the stages against real runs of the same components, and what it refuses."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from javis import JavisPipeline
from javis.calls import Call
from javis.clip_stages import STAGES
from javis.errors import UsageError
from javis.model.audio_vae import AUDIOLDM2_VAE, AudioLDM2Codec, AudioLDM2CodecConfig, VocoderConfig
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.encoders.imagebind import ImageBindTextConfig, ImageBindTextEncoder
from javis.model.encoders.t5 import T5Encoder, T5EncoderConfig
from javis.model.prior import PriorConfig, PriorEstimator
from javis.model.vae_temporal import TemporalVAEConfig
from javis.model.video_vae import AutoencoderConfig, OpenSoraVideoCodec, OpenSoraVideoCodecConfig
from javis.plan import PlanArgs, _checkpoint, main, plan
from javis.plan_stages import _predictor
from javis.precision import apply_precision
from javis.prediction import RESERVED, Choice, Predictor, refuse_what_cannot_fit
from javis.rates import Rates, from_rows, given, measure
from javis.stages import ClipSize, Parts, checkpoint_parts, parts_of, peak_bytes, prepare, trace
from javis.work import step_work
from tests.allocations import peak_allocated

CLIP = ClipSize(frames=17, height=96, width=128, fps=24, samples=11333, steps=3)
TRACED = tuple(stage for stage in STAGES if stage != "mux")


def full_size_architecture(*, wide: bool = False) -> dict[str, Any]:
    """Components of the full-size pipeline with few channels; wide enough that calls take longer than calling."""
    width = 8 if wide else 1
    image = AutoencoderConfig(
        block_out_channels=(16, 32, 32) if wide else (8, 16, 16), layers_per_block=1, norm_num_groups=8
    )
    temporal = TemporalVAEConfig(filters=16, num_res_blocks=1, num_groups=8)
    model = JavisDiTConfig(
        hidden_size=320 if wide else 96, num_heads=4, depth=2, caption_channels=64 * width, caption_length=160,
        spatial_prior_len=8, temporal_prior_len=8, prior_channels=32,
    )  # fmt: skip
    prior = PriorConfig(
        text_channels=64 * width, spatial_token_num=8, temporal_token_num=8, hidden_size=64 * width, out_dim=32,
        num_heads=4, num_encoder_layers=2, num_decoder_layers=2,
    )  # fmt: skip
    text = T5EncoderConfig(
        vocab_size=128, d_model=64 * width, d_kv=16 * width, d_ff=160 * width, num_layers=3, num_heads=4, max_length=160
    )
    heard = ImageBindTextConfig(vocab_size=128, width=64 * width, layers=3, heads=4, context_length=77)
    vocoder = VocoderConfig(
        upsample_initial_channel=128, resblock_kernel_sizes=(3, 7), resblock_dilation_sizes=((1, 3), (1, 3))
    )
    sound = replace(AUDIOLDM2_VAE, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8)

    class Model(torch.nn.Linear):  # of the model the configuration counts
        config = model

    return {
        "text_encoder": T5Encoder(text), "prior_text_encoder": ImageBindTextEncoder(heard),
        "prior": PriorEstimator(prior), "model": Model(1, 1),
        "video_codec": OpenSoraVideoCodec(OpenSoraVideoCodecConfig(image=image, temporal=temporal)),
        "audio_codec": AudioLDM2Codec(AudioLDM2CodecConfig(vae=sound, vocoder=vocoder)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def small() -> tuple[Parts, Parts]:
    """The same components without values and with."""
    components = full_size_architecture()
    return parts_of(components), parts_of(components, "cpu")


@pytest.fixture(scope="module")
def demo() -> tuple[Parts, Parts]:
    parts = checkpoint_parts("demo")
    made = {"prior": parts.prior, "video_codec": parts.video_codec, "audio_codec": parts.audio_codec}

    class Model(torch.nn.Linear):
        config = parts.config

    return parts, parts_of({**made, "model": Model(1, 1)}, "cpu")


DEMO_CLIP = ClipSize(frames=32, height=64, width=64, fps=16, samples=32 * 1024, steps=2)


@pytest.mark.parametrize("stage", TRACED)
def test_memory_of_every_stage_is_that_of_a_real_run(small: tuple[Parts, Parts], stage: str) -> None:
    check_memory(*small, CLIP, stage)


@pytest.mark.parametrize("stage", ["prior", "condition", "denoise", "video_decode", "audio_decode"])
def test_memory_of_the_small_model_is_that_of_a_real_run(demo: tuple[Parts, Parts], stage: str) -> None:
    check_memory(*demo, DEMO_CLIP, stage)


def check_memory(planned: Parts, real: Parts, clip: ClipSize, stage: str) -> None:
    predicted = trace(planned, clip, [stage], cpu=True)[stage]
    assert predicted.held == prepare(real, clip, stage).held
    for name, part in (("text_encoder", real.text_encoder), ("prior", real.prior), ("model", real.model)):
        if part is not None:
            assert planned.weights()[name] == sum(t.nbytes for t in {*part.parameters(), *part.buffers()})
    ready = prepare(real, clip, stage)
    with torch.no_grad():
        ready.run()
        measured = peak_allocated(ready.run)
    assert predicted.activations == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_seconds_of_every_stage_are_those_of_a_real_run() -> None:
    """Rates and runs are measured in turns, by the time that the process itself computes."""
    components = full_size_architecture(wide=True)
    planned, real = parts_of(components), parts_of(components, "cpu")
    clip = ClipSize(frames=17, height=48, width=64, fps=24, samples=11333, steps=1)
    traced = trace(planned, clip, cpu=True)
    ready = {stage: prepare(real, clip, stage) for stage in traced}
    predicted: dict[str, list[float]] = {stage: [] for stage in traced}
    measured: dict[str, list[float]] = {stage: [] for stage in traced}
    with torch.no_grad():
        for stage in traced:
            ready[stage].run()
        for _ in range(3):
            for stage in traced:
                started = time.process_time()
                ready[stage].run()
                measured[stage].append(time.process_time() - started)
            rates = measure({stage: t.calls for stage, t in traced.items()}, clock=time.process_time, seconds=0.5)
            for stage, t in traced.items():
                predicted[stage].append(rates[stage].seconds(t.calls))
    ratios = {stage: round(median(predicted[stage]) / median(measured[stage]), 3) for stage in traced}
    for stage, ratio in ratios.items():
        assert 0.7 <= ratio <= 1.3, (stage, ratios, measured)


@pytest.mark.parametrize(("cached", "seconds"), [(0.0, 5.0), (0.25, 4.0), (1.0, 1.0)])
def test_a_call_is_as_fast_as_its_inputs_are_cached(cached: float, seconds: float) -> None:
    """A call that takes 5 s with empty caches and 1 s at once again, by a clock that it moves itself."""
    now, runs = 0.0, 0

    def run() -> None:
        nonlocal now, runs
        warm = runs == 0 or (cached and runs % 2 == 0)  # first of all it is warmed up
        now += 1.0 if warm else 5.0
        runs += 1

    def again(device: str) -> Any:
        nonlocal runs
        runs = 0
        return run

    measured = Call("matmul", "measured", 100, 100, 3, again, cached)
    rates = measure({"stage": [measured]}, clock=lambda: now, seconds=0.0)["stage"]
    assert rates.exact[again] == pytest.approx(seconds)
    assert rates.seconds([measured]) == pytest.approx(3 * (seconds + rates.call))
    other = replace(measured, flops=200, ready=lambda device: run)
    assert rates.once(other) == pytest.approx(2 * seconds + rates.call)  # by its name


def call(kind: str, flops: int, moved: int, count: int = 1) -> Call:
    return Call(kind, kind, flops, moved, count, lambda device: lambda: None)  # type: ignore[arg-type]


def test_a_call_takes_the_longer_of_arithmetic_and_traffic() -> None:
    rates = given(2.0, 100.0)  # 2e12 FLOP/s, 1e11 byte/s
    assert rates.once(call("matmul", 4 * 10**12, 10**9)) == pytest.approx(2.0)
    assert rates.once(call("conv", 10**9, 5 * 10**11)) == pytest.approx(5.0)
    assert rates.once(call("other", 10**15, 10**11)) == pytest.approx(1.0)  # no product
    assert rates.seconds([call("matmul", 2 * 10**12, 1, 3), call("other", 0, 10**11, 2)]) == pytest.approx(5.0)
    near = Rates(rates.flops, rates.bytes, share={"denoise": 0.5}, call=1e-3)
    assert near.seconds([call("matmul", 2 * 10**12, 1)], "denoise") == pytest.approx(2.002)


def test_rates_from_rows() -> None:
    common = {"device": "NVIDIA H100 80GB", "op": "linear", "mode": "forward", "dtype": "bfloat16"}
    rows: list[dict[str, Any]] = [
        {**common, "backend": "matmul", "tflop_per_s": speed, "gb_per_s": 1.0, "p50_ms": 1.0}
        for speed in (600, 700, 650)
    ]
    rows += [{**common, "backend": "copy", "gb_per_s": 9000.0, "p50_ms": 0.0001}]  # out of a cache
    rows += [{**common, "backend": "copy", "gb_per_s": 2500.0, "p50_ms": 1.0}]
    rates = from_rows(rows, "h100", "bfloat16")
    assert rates is not None
    assert (rates.flops["matmul"], rates.bytes, rates.source) == (650e12, 2500e9, "rows of NVIDIA H100 80GB")
    assert from_rows(rows, "h100", "float32") is None and from_rows(rows, "a100", "bfloat16") is None
    assert from_rows(rows, "", "bfloat16") is None
    stages = {"denoise": {"roofline_s": 2.0, "s_p50": 3.0}, "mux": {"roofline_s": None, "s_p50": 1.0}}
    rows.append({"device": "NVIDIA H100 80GB", "bench": "end_to_end", "dtype": "bfloat16", "stages": stages})
    rates = from_rows(rows, "h100", "bfloat16")
    assert rates is not None and rates.share == {"denoise": pytest.approx(2 / 3)}


def test_policies_differ_by_the_weights_that_are_there(small: tuple[Parts, Parts]) -> None:
    predictor = Predictor(small[0])
    weights = predictor.weights
    everything = predictor.peaks(CLIP, Choice())
    for policy in ("offload", "staged"):
        less = predictor.peaks(CLIP, Choice(residency=policy))  # type: ignore[arg-type]
        for stage in TRACED:
            absent = sum(size for name, size in weights.items() if name not in STAGES[stage])
            assert everything[stage] - less[stage] == absent
    traced = predictor.traced(CLIP, "denoise")
    assert peak_bytes("denoise", traced, weights, "staged") == weights["model"] + traced.held + traced.activations


@pytest.mark.parametrize("keep", [[], ["layers.1.*", "*.mlp.fc2"]], ids=["all", "some kept"])
def test_fp8_weights_are_those_of_the_model_in_fp8(keep: list[str]) -> None:
    """Against the tensors that `apply_precision` makes: values, scales, biases, and layers that stay."""
    config = JavisDiTConfig(hidden_size=96, num_heads=6, depth=2, caption_channels=32, caption_length=16)
    components = full_size_architecture() | {"model": torch.nn.Linear(1, 1, dtype=torch.bfloat16)}
    components["model"].config = config
    predictor = Predictor(parts_of(components), keep=keep)
    with torch.device("meta"):
        model = apply_precision(JavisDiT(config), "fp8", keep=keep)
    expected = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert predictor.component_bytes("fp8")["model"] == expected < predictor.component_bytes("bf16")["model"]


def test_the_plan_reads_which_layers_stay_in_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    pipe.model = JavisDiT(replace(pipe.model.config, hidden_size=96, num_heads=6))
    pipe.save_pretrained(folder)

    def weights(precision: Any) -> float:
        _predictor.cache_clear()
        asked = PlanArgs(model=str(folder), resolution="64x64", seconds=0.5, precision=precision, steps=2)
        return float(plan(asked)["stages"]["denoise"]["weights_gb"])

    whole, all_fp8 = weights("bf16"), weights("fp8")
    (folder / "transformer" / "fp8.json").write_text('{"keep": ["*"]}')
    assert weights("fp8") == whole > all_fp8
    (folder / "transformer" / "fp8.json").write_text('{"keep": ["*.no.such.layer"]}')
    with pytest.raises(UsageError, match=r"no linear layer is called '\*.no.such.layer'"):
        weights("fp8")


def test_what_cannot_fit_is_refused_with_what_fits(demo: tuple[Parts, Parts]) -> None:
    predictor, asked = Predictor(demo[0]), Choice(precision="fp32", resolution="64x64")
    offload = replace(asked, residency="offload")
    most = max(predictor.peaks(DEMO_CLIP, asked).values())
    less = max(predictor.peaks(DEMO_CLIP, offload).values())
    smaller = {"32x32": replace(DEMO_CLIP, height=32, width=32)}
    least = max(predictor.peaks(smaller["32x32"], offload).values())
    assert least < less < most

    def refused(room: float) -> str:
        with pytest.raises(UsageError) as error:
            refuse_what_cannot_fit(predictor, DEMO_CLIP, asked, (room + RESERVED) / 1e9, smaller)
        return str(error.value)

    refuse_what_cannot_fit(predictor, DEMO_CLIP, asked, (most + 1 + RESERVED) / 1e9, smaller)
    assert "what fits: --residency offload" in refused((most + less) / 2)
    between = refused((less + least) / 2)
    assert "--resolution 32x32 --residency offload" in between and "fits: --residency offload" not in between
    assert re.search(r"64x64 needs .* GB in stage \w+ \(.* of weights, .* of activations\)", between)
    assert "nothing that was tried fits" in refused(least / 2)


def test_the_decode_is_planned_in_the_batches_that_the_room_allows(small: tuple[Parts, Parts]) -> None:
    predictor = Predictor(small[0])
    plenty = predictor.peaks(CLIP, Choice())
    room = sum(predictor.weights.values()) + (plenty["video_decode"] - sum(predictor.weights.values())) / 2
    less = predictor.peaks(CLIP, Choice(), room)
    assert less["video_decode"] < room < plenty["video_decode"]
    assert {name: size for name, size in less.items() if name != "video_decode"} == {
        name: size for name, size in plenty.items() if name != "video_decode"
    }


def test_the_plan_of_the_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan(PlanArgs(model="demo", steps=4))
    assert list(facts["stages"]) == list(STAGES)
    assert facts["total_seconds"] == pytest.approx(sum(stage["seconds"] for stage in facts["stages"].values()))
    assert facts["peak_gb"] == max(stage["peak_gb"] for stage in facts["stages"].values())
    assert facts["stages"]["denoise"]["tflop"] == pytest.approx(4 * facts["tflop_per_step"]["total"])
    assert facts["stages"]["condition"]["tflop"] == pytest.approx(facts["condition_tflop"])
    assert facts["rates"].startswith("assumed")
    assert plan(PlanArgs(model="demo", sustained_tflops=1.0))["rates"].startswith("given: 1 TFLOP/s")
    with pytest.raises(UsageError, match="nothing that was tried fits"):
        plan(PlanArgs(model="demo", gpu_memory=1.001))
    main(PlanArgs(model="demo", steps=4))
    printed = capsys.readouterr().out
    assert f"{facts['peak_gb']:.3g} GB at the worst moment ({facts['peak_stage']})" in printed


def test_fp8_speeds_up_the_layers_that_are_in_fp8_alone() -> None:
    """At 1 TFLOP/s with a free memory, and FP8 products that take no time: the rest of the arithmetic is left."""
    options: dict[str, Any] = {"model": "demo", "steps": 4, "sustained_tflops": 1.0, "copy_gbps": 1e9}
    plain, fast = plan(PlanArgs(**options)), plan(PlanArgs(**options, precision="fp8", fp8_tflops=1e9))
    spent, left = (facts["stages"]["denoise"]["seconds"] for facts in (plain, fast))
    config, grid, _ = _checkpoint(PlanArgs(**options))
    work = step_work(config, grid, batch=2)
    in_fp8 = 4e-12 * sum(w.flops for w in work if w.op in ("linear", "gelu_linear"))
    assert spent == pytest.approx(plain["stages"]["denoise"]["tflop"], rel=1e-3)
    assert left == pytest.approx(spent - in_fp8, rel=1e-3) and 0 < left < 0.5 * spent


def test_the_plan_of_a_full_size_folder(tmp_path: Path) -> None:
    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    folder = str(pipe.save_pretrained(tmp_path / "toy"))
    facts = plan(PlanArgs(model=folder, resolution="64x64", seconds=0.5, precision="fp32", steps=2))
    weights = {
        name: sum(t.nbytes for t in (*part.parameters(), *part.buffers())) for name, part in pipe.components.items()
    }
    assert facts["stages"]["denoise"]["weights_gb"] == pytest.approx(sum(weights.values()) / 1e9, rel=1e-3)
    assert facts["clip"]["frames"] == 17 and facts["stages"]["denoise"]["tflop"] > 0
    (tmp_path / "toy" / "transformer" / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"transformer/config.json is not usable"):
        plan(PlanArgs(model=folder))


@pytest.mark.slow
def test_the_plan_of_the_full_size() -> None:
    facts = plan(PlanArgs(resolution="512x512", steps=30))
    weights = {stage: facts["stages"][stage]["weights_gb"] for stage in ("text", "denoise")}
    # 4.76 B + 0.35 B + 3.7 B parameters in bfloat16, the decoders besides
    assert weights["text"] == weights["denoise"] and 17 < weights["text"] < 20
    assert facts["stages"]["denoise"]["tflop"] == pytest.approx(30 * facts["tflop_per_step"]["total"])
    less = plan(PlanArgs(resolution="512x512", steps=30, residency="offload"))
    assert less["stages"]["text"]["weights_gb"] == pytest.approx(2 * 4.7623, rel=1e-3)  # T5-XXL's encoder
    with pytest.raises(UsageError, match=r"what fits: --residency offload"):
        plan(PlanArgs(resolution="512x512", gpu_memory=16))
