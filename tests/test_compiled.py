"""torch.compile of the blocks: compiled once for all layers, same results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from javis.compiled import compile_blocks
from javis.precision import apply_precision
from tests.model.small import check_equal, make_inputs, run, small_config, small_model


def test_layers_share_what_was_compiled_for_one() -> None:
    graphs = {}
    for depth in (1, 4):
        counter = CompileCounter()
        model = compile_blocks(small_model(depth=depth), backend=counter)
        noisy, told = make_inputs(model.config)
        with torch.no_grad():
            condition = model.condition(**told)
            for share in (1.0, 0.3):
                at = noisy | {"timestep": noisy["timestep"] * share}
                compiled = model.denoise(**at, condition=condition)
                plain = small_model(depth=depth).denoise(**at, condition=condition)
                assert all(torch.equal(a, e) for a, e in zip(compiled, plain, strict=True))
        graphs[depth] = counter.frame_count
    assert graphs[1] == graphs[4] >= 7


def test_the_parameters_keep_their_names_and_classes_stay_blocks() -> None:
    model = small_model()
    expected = list(model.state_dict())
    kinds = [type(block) for layer in model._layers for block in layer.blocks().values()]
    compile_blocks(model, backend="eager")
    assert list(model.state_dict()) == expected
    for block, kind in zip((b for layer in model._layers for b in layer.blocks().values()), kinds, strict=True):
        assert isinstance(block, kind)
    with pytest.raises(ValueError, match="compiled already"):
        compile_blocks(model, backend="eager")


def test_fp8_is_compiled_too() -> None:
    """Layers with and without FP8 are variants of the same block."""
    counter = CompileCounter()
    model = apply_precision(small_model(depth=3), "fp8", keep=["layers.0.*"], emulate=True)
    noisy, told = make_inputs(small_config())
    expected = run(copy.deepcopy(model), noisy, told)
    actual = run(compile_blocks(model, backend=counter), noisy, told)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert counter.frame_count <= 2 * 7


@pytest.mark.slow
def test_inductor_agrees() -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    check_equal(run(compile_blocks(small_model()), noisy, told), run(model, noisy, told), 2e-5)
