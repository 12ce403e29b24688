"""The dry run against closed forms."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from javis.cli import main
from javis.errors import UsageError
from javis.model.config import JavisDiTConfig
from javis.plan import condition_flops, count_parameters, official_grid, official_latents, step_flops
from javis.train.recipes.config import AudioRecipe, JointRecipe
from javis.train.recipes.estimate import estimate, trace_step

CONFIG = JavisDiTConfig(depth=2, hidden_size=96, num_heads=4, caption_channels=48, caption_length=12)
CLIP = (34, 256, 256, 24.0)


def trace(depth: int, recipe: JointRecipe | AudioRecipe):  # type: ignore[no-untyped-def]
    config = dataclasses.replace(CONFIG, depth=depth)
    return trace_step(config, recipe, *official_latents(*CLIP), torch.bfloat16)


def test_forward_flops_are_those_of_the_plan() -> None:
    """Of all products but attention's; the plan counts keys and values of captions and priors apart, unfolded here."""
    grid = official_grid(CONFIG, *CLIP)
    found = trace(2, JointRecipe(batch=2, train="all")).forward
    linear = step_flops(CONFIG, grid, batch=2, folded=False)["linear"]
    assert found == pytest.approx(linear + condition_flops(CONFIG, grid, batch=2), rel=0.02)


def test_backward_is_twice_the_forward_where_all_is_trained() -> None:
    found = trace(2, JointRecipe(batch=2, train="all"))
    assert found.backward == pytest.approx(2 * found.forward, rel=0.03)
    frozen, less = trace(2, JointRecipe(batch=2)), trace(1, JointRecipe(batch=2))
    assert frozen.forward == found.forward
    # Gradients pass through the frozen blocks of a further layer, but only its own third of the weights gets some.
    assert 1.2 < (frozen.backward - less.backward) / (frozen.forward - less.forward) < 1.5


def test_what_a_layer_keeps_is_the_sum_of_its_parts() -> None:
    """By hand, in units of tokens x width (MLP ratio 4). Block: norm 1, qkv 1, attention 3 + 1, gate 1, caption query
    1, its attention 1 + 1, norm 1, fc1 1, GELU 4, fc2 4, gate 1 = 21. Prior block: norm 1; twice query 1, attention 2,
    gate 1, norm 1; fc1 1, GELU 4, fc2 4, gate 1 = 21. Streams meet: norm 1, products 1, halves 3 / 2, scale 1 = 4.5.
    Two blocks and a prior block of 21 each, and 4.5, are 67.5.
    """
    recipe = JointRecipe(batch=1, train="all")
    grid = official_grid(CONFIG, *CLIP)
    layer = trace(2, recipe).kept - trace(1, recipe).kept
    unit = (grid.video + grid.audio) * CONFIG.hidden_size * torch.bfloat16.itemsize
    # Beside them some numbers for each token: means and deviations of the norms, sums of the attentions.
    assert 67.5 <= layer / unit < 69
    frozen = trace(2, JointRecipe(batch=1)).kept - trace(1, JointRecipe(batch=1)).kept
    assert frozen < 0.85 * layer  # products with frozen weights keep no input


def test_official_size(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    words = [
        "train",
        "joint",
        "--init",
        "official",
        "--resolution",
        "240p",
        "--precision",
        "bf16",
        "--dry-run",
        "--json",
    ]
    assert main([*words, "--batch", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prediction"] is True
    # The plan counts the tied null captions once.
    null = 300 * 4096
    assert facts["parameters"]["all"] == count_parameters(JavisDiTConfig()) + null
    assert facts["clip"]["frames"] == 51 and facts["tokens_per_clip"]["video"] == 15 * 405
    gb, p = facts["memory_gb"], facts["parameters"]
    assert gb["weights"] == pytest.approx(4e-9 * p["all"]) and gb["moments"] == pytest.approx(8e-9 * p["trained"])
    assert gb["encoders"] > 9  # T5-XXL in bfloat16
    assert facts["activations_gb"]["full"] < 0.2 * facts["activations_gb"]["none"]
    assert gb["peak"] == pytest.approx(sum(v for name, v in gb.items() if name != "peak"))
    flop = facts["tflop_per_step"]
    assert flop["recompute"] == 0 and 1 < flop["backward"] / flop["forward"] < 2.5
    assert 15 < flop["forward"] < 30  # half of the 41 of a guided pair


def test_checkpointing_costs_a_forward_pass_and_saves_memory() -> None:
    plain = estimate(JointRecipe())
    again = estimate(JointRecipe(activation_checkpointing="full"))
    assert again["tflop_per_step"]["recompute"] == plain["tflop_per_step"]["forward"]
    assert again["memory_gb"]["activations"] < plain["memory_gb"]["activations"]
    assert again["seconds_per_step"] > plain["seconds_per_step"]
    audio = estimate(AudioRecipe())
    assert audio["memory_gb"]["activations"] < plain["memory_gb"]["activations"]
    assert audio["parameters"]["trained"] < plain["parameters"]["all"] == audio["parameters"]["all"]


def test_a_dry_run_for_people_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert main(["train", "audio", "--dry-run", "--out", str(tmp_path / "x"), "--gpu-memory", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "predicted" in said and "does not fit into 0.01 GB" in said and "audio from demo" in said
    assert not (tmp_path / "x").exists()


def test_a_size_that_the_checkpoint_cannot_have() -> None:
    with pytest.raises(UsageError, match="64x64 only"):
        estimate(JointRecipe(resolution="128x128"))


def test_processes_that_share_clips_share_their_tokens() -> None:
    """Half of the activations and of the products each, for the same clips; weights are divided as over any two."""
    alone, shared = (estimate(JointRecipe(init="toy", batch=2, sequence_parallel=seq)) for seq in (1, 2))
    assert (shared["processes"], shared["sequence_parallel"]) == (2, 2)
    assert shared["clips_per_step"] == alone["clips_per_step"] == 2
    for name in ("activations", "weights", "moments"):
        assert shared["memory_gb"][name] == pytest.approx(alone["memory_gb"][name] / 2)
    for name in ("forward", "backward"):
        assert shared["tflop_per_step"][name] == pytest.approx(alone["tflop_per_step"][name] / 2)
