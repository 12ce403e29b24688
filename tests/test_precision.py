"""FP8 linears: the arithmetic against torch's products and float64; what is replaced, kept and refused."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from javis import precision as p
from javis.errors import UsageError
from javis.model.dit import JavisDiT, Velocity
from javis.sample.graph import GraphedDenoiser
from tests.model.small import frame_masks, make_inputs, run, small_config, small_model
from tests.sample.test_graph import Recorder


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms(actual: Velocity, expected: Velocity) -> float:
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    return max(float((a - e).square().mean().sqrt() / e.square().mean().sqrt()) for a, e in pairs)


def velocity(model: JavisDiT, **masks: Tensor) -> Velocity:
    return run(model, *make_inputs(small_config()), **masks)


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def test_every_value_is_the_nearest() -> None:
    x = draw(4, 6, 48) * torch.logspace(-6, 6, 6)[:, None]
    x[0, 0] = 0
    q = p.quantise(x)
    assert q.values.dtype == torch.float8_e4m3fn and q.scale.shape == (4, 6) and q.scale.dtype == torch.float32
    wanted = x.double() / q.scale.double()[..., None]
    ulp = 2.0 ** (wanted.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert ((q.values.double() - wanted).abs() <= ulp / 2 + 1e-4).all()
    assert (q.values.double().abs().amax(-1)[1:] == 448).all()  # the largest takes the whole range
    assert q.values[0, 0].float().abs().max() == 0 and q.scale[0, 0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_products_are_those_of_the_library(dtype: torch.dtype) -> None:
    """torch multiplies e4m3 on a CPU, too, slowly: the same values in, the same product out."""
    x, weight, bias = 3 * draw(2, 7, 96), draw(32, 96, seed=1), draw(32, seed=2).to(dtype)
    q, w = p.quantise(x), p.quantise(weight)
    actual = p.product(q, w, bias, dtype, emulate=True)
    library = torch._scaled_mm(
        q.values.flatten(0, 1), w.values.t(), q.scale.reshape(-1, 1), w.scale.reshape(1, -1), bias=bias, out_dtype=dtype
    )
    exact = (q.values.double() * q.scale.double()[..., None]) @ (w.values.double() * w.scale.double()[:, None]).T
    exact = exact + bias.double()
    assert actual.dtype == dtype and actual.shape == (2, 7, 32)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=1e-4)
    torch.testing.assert_close(actual.flatten(0, 1), library, rtol=tolerance, atol=1e-4)
    torch.testing.assert_close(p.product(x, w, bias, dtype, emulate=True), actual, rtol=0, atol=0)


def test_a_layer_is_near_the_one_it_replaces() -> None:
    linear = nn.Linear(96, 512).requires_grad_(False)
    linear.weight.copy_(draw(512, 96, seed=1) / 96**0.5)
    linear.bias.copy_(draw(512, seed=2) / 96**0.5)
    x = 3 * draw(2, 5, 96)
    x[:, 1] *= 1e5  # every row needs a scale of its own
    expected, actual = linear(x), p.Fp8Linear(linear.bfloat16(), emulate=True)(x.bfloat16()).float()
    error = (actual - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    assert error.max() < 0.06  # half a unit of three bits of mantissa, twice, averaged over 96 products
    with pytest.raises(ValueError, match=r"16 divides, got \(32, 100\)"):
        p.Fp8Linear(nn.Linear(100, 32))


# -- the model ---------------------------------------------------------------------------------------------------------


def by_hand(model: JavisDiT, kept: set[str]) -> JavisDiT:
    """The same rounding without any code of ours in the layers: weights and inputs go through torch's e4m3 and back."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    for name in p.linear_names(model):
        if name not in kept:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with torch.no_grad():
                linear.weight.copy_(rounded(linear.weight))
            if not name.endswith("mlp.fc1"):  # its block calls the product itself
                linear.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    for i, layer in enumerate(model._layers):
        for place, block in layer.blocks().items():
            if hasattr(block, "mlp") and f"layers.{i}.{place}.mlp.fc1" not in kept:
                plain: Any = block.ops.gelu_linear
                rounding = lambda x, w, b, plain=plain: plain(rounded(x), w, b)  # noqa: E731
                block.mlp_ops = replace(block.ops, gelu_linear=rounding)
    return model


@pytest.mark.parametrize(
    "keep", [(), ("layers.0.*.attn.qkv", "*.audio_prior.mlp.fc1", "layers.1.bidirectional.video_q")]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_model_computes_with_rounded_values(keep: tuple[str, ...], masked: bool) -> None:
    """All else in float32, so that little but FP8 is seen."""
    masks = frame_masks(2) if masked else {}
    exact = velocity(small_model(), **masks)
    model = p.apply_precision(small_model(), "fp8", keep=keep, emulate=True, dtype=None)
    actual = velocity(model, **masks)
    expected = velocity(by_hand(small_model(), set(p.kept_names(model, keep))), **masks)
    assert 0.005 < rms(expected, exact) < 0.2
    # A value on the border between two e4m3 values may fall either way in float32.
    assert rms(actual, expected) < 0.1 * rms(expected, exact)


def test_kept_layers_and_what_feeds_them_stay() -> None:
    names = p.linear_names(small_model())
    assert len(names) == len(set(names)) == 2 * (4 * 6 + 2 * 2 + 6)
    assert all(isinstance(small_model().get_submodule(name), nn.Linear) for name in names)
    plain = p.apply_precision(small_model(), "bf16")
    everything = p.apply_precision(small_model(), "fp8", keep=["*"], emulate=True)
    for a, e in zip(velocity(everything), velocity(plain), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, e)
    assert p.precision_of(everything) == p.precision_of(plain) == {"precision": "bf16"}
    assert p.precision_of(small_model()) == {}
    model = p.apply_precision(small_model(), "fp8", keep=["layers.0.video_spatial.attn.*", names[-1]], emulate=True)
    kept = [n for n in names if n.startswith("layers.0.video_spatial.attn.")] + [names[-1]]
    assert p.precision_of(model) == {"precision": "fp8", "keep": kept}
    seen: dict[str, set[type]] = {}
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, set()).add(type(args[0])))
    velocity(model)
    # Where a norm comes before, it writes e4m3 itself; no kept layer is fed with it.
    assert seen["layers.0.video_spatial.attn.qkv"] == {Tensor}
    for name in ("layers.1.video_spatial.attn.qkv", "layers.0.video_spatial.mlp.fc1", "layers.0.audio_prior.mlp.fc1"):
        assert seen[name] == {p.Quantised}, name
    assert seen["layers.0.bidirectional.video_q"] == seen["layers.0.bidirectional.audio_v"] == {p.Quantised}
    assert seen["layers.0.video_spatial.text.q"] == seen["layers.0.video_spatial.mlp.fc2"] == {Tensor}


def test_dtypes_of_weights_and_scales_stay() -> None:
    model = p.apply_precision(small_model(), "fp8", emulate=True)
    before = velocity(model)
    layer = model.layers[0].video_spatial.attn.qkv
    scale = layer.scale.clone()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert (layer.values.dtype, layer.scale.dtype, layer.bias.dtype) == (p.E4M3, torch.float32, dtype)
        assert torch.equal(layer.scale, scale)
    after = velocity(model)
    assert rms(after, before) < 0.02  # float16 has rounded some of the others


def test_weights_are_quantised_once_and_saved(tmp_path: Path) -> None:
    model = p.apply_precision(small_model(), "fp8", keep=["*.mlp.fc2"], emulate=True)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    told = json.loads(json.dumps(p.precision_of(model)))
    with torch.device("meta"):
        again = JavisDiT(small_config()).eval()
    p.apply_precision(again, **told, emulate=True)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True, assign=True)
    for a, e in zip(velocity(again), velocity(model), strict=True):
        assert torch.equal(a, e)
    state = model.state_dict()
    for name in p.linear_names(model):  # a byte for each weight, and no other copy
        plain = small_model().get_submodule(name).weight
        if name not in told["keep"]:
            assert state[f"{name}.values"].nbytes == plain.numel() and f"{name}.weight" not in state
        else:
            assert state[f"{name}.weight"].nbytes == 2 * plain.numel()


def test_a_graph_replays_it() -> None:
    model = p.apply_precision(small_model(), "fp8", emulate=True)
    noisy, told = make_inputs(small_config())
    graphs = GraphedDenoiser(model, backend=Recorder())
    with torch.no_grad():
        condition = model.condition(**told)
        actual, expected = (m.denoise(**noisy, condition=condition) for m in (graphs, model))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there FP8 may run")
def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown precision 'int4'; expected one of bf16, fp8, fp8-te"):
        p.apply_precision(small_model(), "int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown scaling 'static'"):
        p.apply_precision(small_model(), "fp8-te", scaling="static")  # type: ignore[arg-type]
    for precision in ("fp8", "fp8-te"):
        with pytest.raises(UsageError, match=f"precision {precision}: needs a GPU .* is on cpu; use bf16 there"):
            p.apply_precision(small_model(), precision)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be emulated"):
        p.apply_precision(small_model(), "fp8-te", emulate=True)
    with pytest.raises(
        UsageError, match=r"no linear layer is called 'layers\.9\.\*'; expected layers\.0\.video_spatial"
    ):
        p.apply_precision(small_model(), "fp8", keep=["layers.9.*"], emulate=True)
    keep = ["*_spatial*", "*_temporal*", "*_prior*"]
    with pytest.raises(UsageError, match=r"layers\.0\.bidirectional\.video_q is \(20, 40\): FP8 needs sizes that 16"):
        p.apply_precision(small_model(hidden_size=40), "fp8", keep=keep, emulate=True)
    with pytest.raises(UsageError, match="only emulated ones"):
        p.apply_precision(small_model(), "fp8", dtype=None)
    untouched = small_model()
    with pytest.raises(UsageError):
        p.apply_precision(untouched, "fp8")
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), small_model().parameters(), strict=True))
    model = p.apply_precision(small_model(), "fp8", emulate=True)
    for precision in ("bf16", "fp8"):
        with pytest.raises(UsageError, match="in FP8 already"):
            p.apply_precision(model, precision, emulate=True)  # type: ignore[arg-type]
    model.layers[0].audio_spatial.attn.qkv.emulate = False
    with pytest.raises(UsageError, match="FP8 product: needs a GPU"):
        velocity(model)


def test_the_list_of_kept_layers_beside_the_weights(tmp_path: Path) -> None:
    assert p.read_keep(tmp_path) == []
    (tmp_path / "fp8.json").write_text('{"keep": ["layers.0.*"], "bound": 0.05}')
    assert p.read_keep(tmp_path) == ["layers.0.*"]
    for text in (b"{", b'{"kept": []}', b'{"keep": "layers.0.*"}', b'{"keep": [1]}', b"[]", b"\xff"):
        (tmp_path / "fp8.json").write_bytes(text)
        with pytest.raises(UsageError, match=r"fp8\.json is not usable .* remove it to keep no layer"):
            p.read_keep(tmp_path)


# -- Transformer Engine ------------------------------------------------------------------------------------------------


class Engine:
    """A stand-in for transformer_engine with the parts that are used; its layers multiply in bfloat16."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.quantised: set[bool | None] = set()  # whether layers were told to quantise their weights
        engine = self

        class Context:
            def __init__(self, name: str, recipe: Any) -> None:
                self.name, self.recipe = name, recipe

            def __enter__(self) -> None:
                engine.events.append((self.name, self.recipe))

            def __exit__(self, *error: object) -> None:
                engine.events.append(("left", self.name, torch.is_grad_enabled()))

        class Linear(nn.Linear):
            def __init__(
                self, size_in: int, size_out: int, *, bias: bool, params_dtype: torch.dtype, device: Any
            ) -> None:
                super().__init__(size_in, size_out, bias=bias, dtype=params_dtype, device=device)

            def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
                engine.quantised.add(is_first_microbatch)
                return super().forward(x)

        te = types.ModuleType("transformer_engine.pytorch")
        names = ("autocast", "quantized_model_init") if new else ("fp8_autocast", "fp8_model_init")
        word = "recipe" if new else "fp8_recipe"
        setattr(te, names[0], lambda *, enabled, **kw: Context("step", kw[word]))
        setattr(te, names[1], lambda *, enabled, recipe: Context("init", recipe))
        te.Linear = Linear  # type: ignore[attr-defined]
        recipe = types.ModuleType("transformer_engine.common.recipe")
        recipe.Format = types.SimpleNamespace(E4M3="e4m3")  # type: ignore[attr-defined]
        recipe.DelayedScaling = lambda **kw: ("delayed", kw["fp8_format"], kw["reduce_amax"])  # type: ignore[attr-defined]
        recipe.Float8CurrentScaling = lambda **kw: ("current", kw["fp8_format"])  # type: ignore[attr-defined]
        package, common = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.common")
        package.pytorch, package.common, common.recipe = te, common, recipe  # type: ignore[attr-defined]
        for module in (package, te, common, recipe):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(p, "why_not", lambda precision, device: None)


@pytest.mark.parametrize("new", [False, True], ids=["before 2.9", "since 2.9"])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_transformer_engine(monkeypatch: pytest.MonkeyPatch, new: bool, scaling: p.Scaling) -> None:
    engine = Engine(monkeypatch, new)
    expected = velocity(p.apply_precision(small_model(), "bf16"))
    model = p.apply_precision(small_model(), "fp8-te", keep=["layers.0.*"], scaling=scaling)
    recipe = ("delayed", "e4m3", False) if scaling == "delayed" else ("current", "e4m3")
    layers = len(p.linear_names(model)) // 2
    # Weights in FP8 only, unless their scale is to be found first.
    assert engine.events == ([("init", recipe), ("left", "init", True)] * layers if scaling == "current" else [])
    for step, quantises in enumerate((True, True, False, False)):
        engine.events.clear()
        engine.quantised.clear()
        assert rms(velocity(model), expected) < 0.02
        # Delayed scales are renewed when a step is left with gradients on; sampling itself has none.
        assert engine.events == [("step", recipe), ("left", "step", True)]
        assert engine.quantised == {quantises if scaling == "delayed" else None}, step
    assert p.precision_of(model)["precision"] == "fp8-te"
