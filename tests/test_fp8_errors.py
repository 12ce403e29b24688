"""benchmarks/fp8_errors.py: a layer that suffers from FP8 is found and kept, and nothing is left behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

if not (Path(__file__).resolve().parents[1] / "benchmarks/fp8_errors.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks import fp8_errors as e
from javis import bench
from javis.errors import UsageError
from javis.model.dit import JavisDiT
from javis.precision import linear_names, read_keep
from tests.model.small import make_inputs, small_model

ARGS = e.Args(steps=2, points=2, clips=1)


def subject(model: JavisDiT) -> e.Subject:
    noisy, told = make_inputs(model.config, 2)
    return e.Subject("small", model, (noisy["video"][:1], noisy["audio"][:1]), told, guidance=3.0)


def plant(model: JavisDiT, name: str) -> JavisDiT:
    """One hidden unit of an MLP is huge and has no weight: its row's scale leaves nothing for the others in e4m3."""
    owner, _, _ = name.rpartition(".")
    mlp = model.get_submodule(owner)
    with torch.no_grad():
        mlp.fc1.weight[7] = 0
        mlp.fc1.bias[7] = 1e6
        mlp.fc2.weight[:, 7] = 0
    return model


@pytest.mark.parametrize("name", ["layers.1.video_temporal.mlp.fc2", "layers.0.audio_prior.mlp.fc2"])
def test_a_planted_layer_is_found_and_kept(name: str) -> None:
    healthy, ill = (e.measure(subject(m), ARGS) for m in (small_model(), plant(small_model(), name)))
    errors = ill["layers"]
    assert list(errors) == linear_names(small_model())
    assert max(errors, key=errors.__getitem__) == name
    assert errors[name] > 5 * healthy["layers"][name]
    others = [value for other, value in errors.items() if other != name]
    assert errors[name] > 2 * max(others)
    # Within the bound with that layer kept, but not without.
    bound = (ill["fp8_from_bf16"] + healthy["fp8_from_bf16"]) / 2
    row = e.measure(subject(plant(small_model(), name)), e.Args(steps=2, points=2, clips=1, bound=bound))
    assert row["kept"][0] == name and row["kept_from_bf16"] <= bound < row["fp8_from_bf16"]
    assert 0 < row["kept_share_of_work"] < 1


def test_the_model_is_as_before() -> None:
    model = small_model()
    before = copy.deepcopy(model)
    s = subject(model)
    places = e.path(s, 3, 3)
    assert [float(place[2][0]) for place in places] == pytest.approx([1000.0, 2000 / 3, 1000 / 3])
    first, again = e.layer_errors(s, places), e.layer_errors(s, places)
    assert first == again and all(0 < value < 1 for value in first.values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    told = s.condition(model)
    with torch.no_grad():
        assert torch.equal(model.denoise(*places[0], told).video, before.denoise(*places[0], told).video)
        with pytest.raises(KeyboardInterrupt), e.in_fp8(model, linear_names(model)):
            raise KeyboardInterrupt
        assert torch.equal(model.denoise(*places[0], told).video, before.denoise(*places[0], told).video)


def test_the_fewest_layers_that_reach_the_bound_are_kept() -> None:
    errors = {f"layer{i}": float(i) for i in range(20)}
    for needed in (0, 1, 2, 3, 7, 11, 20):
        asked: list[int] = []

        def measure(kept: Sequence[str], needed: int = needed, asked: list[int] = asked) -> float:
            assert list(kept) == [f"layer{19 - i}" for i in range(len(kept))]
            asked.append(len(kept))
            return 1.0 - 0.5 * (len(kept) >= needed)

        kept, tried = e.keep_the_worst(errors, measure, 0.5)
        assert len(kept) == needed and len(asked) == len(set(asked)) == len(tried) <= 10
        assert needed in asked or needed == 20  # the answer was measured; all layers kept is bfloat16 itself


def test_errors_are_the_worse_of_picture_and_sound() -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    assert e.rms([(one, one), (one, two)], [(one, one), (one, one)]) == pytest.approx(0.5**0.5)
    assert e.rms([(two, one)], [(one, one)]) == pytest.approx(1.0)
    assert e.rms([(one, one * float("nan"))], [(one, one)]) == float("inf")


def test_the_work_of_a_layer() -> None:
    model = small_model()
    work = e.flops(model, subject(model).condition(model))
    video, audio = 3 * 2 * 3, 3 * 3  # tokens of latents (3, 4, 6) and (10, 3) in patches of (1, 2, 2) and (4, 1)
    assert work["layers.0.video_prior.mlp.fc1"] == video * 32 * 64
    assert work["layers.1.audio_temporal.attn.qkv"] == audio * 32 * 96
    assert work["layers.1.bidirectional.audio_out"] == audio * 16 * 32
    assert work["layers.1.bidirectional.video_q"] == video * 32 * 16


def test_the_command_writes_rows_and_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    monkeypatch.setattr(e, "checkpoint", lambda source, clips: subject(small_model()))
    (tmp_path / "results").mkdir()
    args = e.Args(
        models=(str(folder),), steps=2, points=1, clips=1, bound=1e-4, write=True, results=tmp_path / "results"
    )
    e.main(args)
    (written,) = (tmp_path / "results").glob("*.jsonl")
    (row,) = [json.loads(line) for line in written.read_text().splitlines()]
    assert row["bench"] == "fp8_errors" and len(row["kept"]) > 0.9 * len(row["layers"])
    assert sorted(read_keep(folder)) == sorted(row["kept"])
    assert {"device", "commit", "date", "bf16_from_float32", "fp8_from_bf16"} <= row.keys()


def test_unusable_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        e.main(e.Args(steps=0))
    with pytest.raises(UsageError, match="--write needs folders, not the built-in 'demo'"):
        e.main(e.Args(models=("demo",), write=True))


@pytest.mark.slow
def test_the_subjects_of_the_command() -> None:
    """Built-in model and toy: their bfloat16 clips are near the float32 ones, and their paths go down to data."""
    for made in (e.checkpoint("demo", 1), e.toy(1)):
        assert made.condition_arguments["text"].shape[0] == 2
        exact = e.clip(made, made.model, 2)
        rounded = e.clip(made, e.apply_precision(copy.deepcopy(made.model), "bf16"), 2)
        assert 0 < e.rms([rounded], [exact]) < 0.2
