"""The ledger against closed forms, PyTorch's FLOP counter and the allocations of real runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.ledger import Ledger, counted_ops
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator
from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig, VideoVAE
from javis.plan import condition_flops, step_flops, token_grid
from javis.sample.euler import sample
from tests.allocations import peak_allocated

SMALL = {
    "hidden_size": 48,
    "num_heads": 4,
    "depth": 2,
    "caption_channels": 20,
    "caption_length": 7,
    "spatial_prior_len": 3,
    "temporal_prior_len": 5,
    "prior_channels": 12,
}
CHANGES: list[dict[str, object]] = [
    {},
    {"mlp_ratio": 3.0, "video_patch": (1, 1, 2), "audio_patch": (2, 2), "qk_norm": False},
    {"prior_mode": "modulate"},
    {"use_prior": False},
    {"use_bidirectional": False},
]
VIDEO, AUDIO = (3, 4, 8), (8, 6)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_flops_and_bytes_of_single_calls() -> None:
    with Ledger() as ledger:
        F.linear(meta(5, 7), meta(3, 7), meta(3))
        F.linear(meta(5, 7), meta(3, 7), meta(3))
        F.conv2d(meta(2, 4, 10, 10), meta(6, 4, 3, 3), padding=1)
        F.scaled_dot_product_attention(meta(2, 4, 9, 8), meta(2, 4, 11, 8), meta(2, 4, 11, 8))
        F.silu(meta(13))
    found = {call.name: (call.kind, call.count, call.flops, call.bytes) for call in ledger.calls}
    assert found == {
        "addmm": ("matmul", 2, 2 * 5 * 7 * 3, 4 * (35 + 21 + 3 + 15)),
        "convolution_2d": ("conv", 1, 2 * 2 * 100 * 6 * 4 * 9, 4 * (800 + 216 + 1200)),
        # Two products; queries, keys, values and the result, but no scores.
        "scaled_dot_product_attention": ("attention", 1, 2 * 2 * 4 * 9 * 11 * 16, 4 * 8 * 8 * (2 * 9 + 2 * 11)),
        "silu": ("other", 1, 0, 4 * 26),
    }
    assert ledger.flops == sum(count * flops for _, count, flops, _ in found.values())


def test_reads_of_what_was_just_used_find_it_in_the_cache() -> None:
    size = 1000  # values
    with Ledger(cpu=True) as ledger:
        ledger.reads.size = 4 * 3 * size
        x, y = meta(size), meta(size)
        z = x + y  # neither was used before
        z * 2  # written just now
        z + x  # both were used within the three tensors that fit: x, z, and the product
        torch.sin(y)  # five tensors have passed since
        torch.cos(meta(4 * size))  # of new memory
        w = torch.exp(meta(4 * size))
        torch.tan(w)  # written just now, and too large for the cache
    found = {call.name: call.cached for call in ledger.calls}
    assert found == {"add": 0.5, "mul": 1.0, "sin": 0.0, "cos": 0.0, "exp": 0.0, "tan": 0.0}


def test_memory_that_was_freed_is_in_no_cache() -> None:
    with Ledger(cpu=True) as ledger:
        for _ in range(20):  # addresses come again
            torch.sin(meta(8))
    assert [call.cached for call in ledger.calls] == [0.0]


def test_the_models_operations_read_from_the_cache_too() -> None:
    with Ledger(cpu=True) as ledger:
        x, weight = meta(2, 4, 16), meta(16, 16)
        ops = counted_ops()
        ops.linear(x, weight, None)  # first use of both
        ops.linear(x, weight, None)
    assert [(call.name, call.count, call.cached) for call in ledger.calls] == [("linear", 2, 0.5)]


def test_an_expanded_input_is_read_once() -> None:
    with Ledger() as ledger:
        meta(6, 1).expand(6, 50) + meta(6, 50)
    assert [call.bytes for call in ledger.calls] == [4 * (6 + 300 + 300)]


def test_memory_is_what_is_alive() -> None:
    x = meta(100)
    with Ledger() as ledger:
        y = x + 1
        assert (ledger.live_bytes, ledger.peak_bytes) == (400, 400)
        z = y.view(10, 10).t()[2:]  # the same memory
        z += 1
        assert (ledger.live_bytes, ledger.peak_bytes) == (400, 400)
        y = y * 2 + 1  # old y (behind z), its double, the sum
        assert (ledger.live_bytes, ledger.peak_bytes) == (800, 1200)
        del z
        assert ledger.live_bytes == 400
        x.view(-1)  # what comes from outside counts nothing
        assert ledger.live_bytes == 400
    del y
    assert (ledger.live_bytes, ledger.peak_bytes) == (0, 1200)


def given(config: JavisDiTConfig, device: str) -> dict[str, object]:
    def told(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    return {
        "text": told(2, 7, 20), "fps": told(2) * 16, "height": told(2) * 64, "width": told(2) * 64,
        "video_sizes": VIDEO, "audio_sizes": AUDIO, "spatial_prior": told(2, 3, 12), "temporal_prior": told(2, 5, 12),
        "with_prior": config.use_prior,
    }  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_model_on_the_ledgers_operations_costs_what_the_closed_form_says(change: dict[str, object]) -> None:
    config = JavisDiTConfig(**{**SMALL, **change})  # type: ignore[arg-type]
    grid = token_grid(config, VIDEO, AUDIO)
    once, step = Ledger(), Ledger()
    with torch.device("meta"):
        model = JavisDiT(config, counted_ops())
    with once:
        condition = model.condition(**given(config, "meta"))  # type: ignore[arg-type]
    video, audio = meta(1, config.video_channels, *VIDEO), meta(1, config.audio_channels, *AUDIO)
    with step:
        sample(model, video, audio, condition, torch.full((1,), 500.0), guidance=3.0)
    assert once.flops == condition_flops(config, grid, batch=2)
    assert step.flops == sum(step_flops(config, grid, batch=2).values())


def temporal_vae(device: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    with torch.device(device):
        vae = VideoVAE(TemporalVAE(TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4)))
        latents = torch.ones(1, 4, 10, 6, 5)
    return vae.to(device), lambda module: module.decode(latents, 34)  # type: ignore[operator]


def prior(device: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    with torch.device(device):
        estimator = PriorEstimator(PriorConfig(text_channels=20, hidden_size=64, out_dim=16))
        text, noise = torch.ones(2, 30, 20), torch.ones(2, 64, 16)
    return estimator.eval(), lambda module: module.encode(text, noise=noise)  # type: ignore[operator]


def attention(device: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    with torch.device(device):
        layer = nn.Linear(32, 96)
        x = torch.ones(2, 200, 32)

    def run(module: nn.Module) -> Tensor:
        q, k, v = module(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.gelu(F.scaled_dot_product_attention(q, k, v)).sum()

    return layer, run


CODE = {"temporal VAE": temporal_vae, "prior": prior, "attention": attention}


@pytest.mark.parametrize("name", CODE)
def test_the_peak_is_that_of_the_allocations_of_a_real_run(name: str) -> None:
    module, run = CODE[name]("meta")
    with Ledger(cpu=True) as ledger:
        run(module)
    module, run = CODE[name]("cpu")
    with torch.no_grad():
        run(module)
        measured = peak_allocated(lambda: run(module))
    assert ledger.peak_bytes == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("fused", [False, True])
def test_the_peak_of_a_step_is_that_of_a_real_one(fused: bool) -> None:
    config = JavisDiTConfig(**(SMALL | {"hidden_size": 64}))  # type: ignore[arg-type]
    video, audio = (3, 24, 32), (16, 6)
    peaks = {}
    for device in ("meta", "cpu"):
        ops = (counted_ops() if device == "meta" else ModelOps.fused()) if fused else ModelOps()
        ledger = Ledger()
        with torch.device(device):
            model = JavisDiT(config, ops).eval()
            latents = torch.ones(1, config.video_channels, *video), torch.ones(1, config.audio_channels, *audio)
        told = given(config, device) | {"video_sizes": video, "audio_sizes": audio}
        with Ledger() if device == "meta" else torch.no_grad():
            condition = model.condition(**told)  # type: ignore[arg-type]

        def run() -> object:
            return sample(model, *latents, condition, torch.full((1,), 500.0), guidance=3.0)  # noqa: B023

        if device == "meta":
            with ledger:
                run()
            peaks[device] = ledger.peak_bytes
        else:
            run()
            peaks[device] = peak_allocated(run)
    assert peaks["meta"] == pytest.approx(peaks["cpu"], rel=0.15)


def test_calls_can_be_run_on_inputs_of_their_own() -> None:
    config = JavisDiTConfig(**SMALL)  # type: ignore[arg-type]
    ledger, before = Ledger(), Ledger()
    with torch.device("meta"):
        model = JavisDiT(config, counted_ops())
    with before:
        condition = model.condition(**given(config, "meta"))  # type: ignore[arg-type]
    with ledger:
        sample(
            model, meta(1, config.video_channels, *VIDEO), meta(1, config.audio_channels, *AUDIO), condition,
            torch.full((1,), 500.0), guidance=3.0,
        )  # fmt: skip
    vae, run = temporal_vae("meta")
    with ledger:
        run(vae)
    with torch.no_grad():
        for call in [*before.calls, *ledger.calls]:
            call.ready("cpu")()
    assert {call.kind for call in ledger.calls} == {"matmul", "conv", "attention", "other"}
