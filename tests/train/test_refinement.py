"""The refinement of decoded frames, trained on few clips of a small world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from javis.errors import UsageError
from javis.model.codecs import PatchTransformConfig, PatchVideoCodec
from javis.pipeline import JavisPipeline
from javis.train.latents import render_batch
from javis.train.refinement import Args, RefinementTraining, main, refined
from javis.world import WorldConfig

from ..tiny import write_tiny_checkpoint

WORLD = WorldConfig(size=32)
SHORT = RefinementTraining(
    channels=8, clips=8, steps=150, batch=1, latents=6, learning_rate=4e-3, clip_gradient=0.02, warmup=5
)


@pytest.fixture(scope="module")
def plain() -> PatchVideoCodec:
    codec = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=16))
    codec.transform.fit(render_batch(list(range(12)), WORLD)[0])
    return codec


def test_it_brings_other_clips_nearer_to_the_truth(plain: PatchVideoCodec) -> None:
    codec = refined(plain, WORLD, SHORT)
    clips = render_batch(list(range(50, 56)), WORLD)[0]
    z = plain.encode(clips)
    assert torch.equal(codec.encode(clips), z)
    error, before = ((c.decode(z, clips.shape[2]) - clips).square().mean() for c in (codec, plain))
    assert error < 0.97 * before
    assert not any(p.requires_grad for p in codec.parameters())


def test_the_same_seed_gives_the_same(plain: PatchVideoCodec) -> None:
    brief = replace(SHORT, steps=3)
    first, again, other = (refined(plain, WORLD, brief, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["refinement.first.weight"], other["refinement.first.weight"])


def test_unusable_settings(plain: PatchVideoCodec) -> None:
    with pytest.raises(UsageError, match="steps must be at least 1, got 0"):
        refined(plain, WORLD, replace(SHORT, steps=0))


def test_into_a_finished_checkpoint(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path)
    main(Args(checkpoint=str(source), out=tmp_path / "refined", training=replace(SHORT, steps=5, learning_rate=1e-2)))
    before, after = JavisPipeline.from_pretrained(str(source)), JavisPipeline.from_pretrained(tmp_path / "refined")
    prompt = "a red ball bounces on the left"
    old, new = (pipe(prompt, steps=2, generator=torch.Generator().manual_seed(1)) for pipe in (before, after))
    assert (old.audio == new.audio).all()
    assert (old.video != new.video).any()
    assert after.description["codecs"]["refinement"] == {"channels": 8}
