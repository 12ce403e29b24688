"""What the joint stage adds to plain training: clean streams, Muon, a plan of timesteps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from javis.model.dit import JavisDiT
from javis.train.config import DemoTrainConfig
from javis.train.stages import Batches, FlowModule, build_optimizers

from ..tiny import randomize, tiny_config
from .test_parts import batches, numbered

__all__ = ["batches"]  # a fixture


# -- one stream given clean --------------------------------------------------------------------------------------------


def test_the_share_of_clean_streams(batches: Batches) -> None:
    seen = [batches.training_batch(step, 0, 1) for step in range(60)]
    video = torch.cat([batch["video_mask"] for batch in seen])
    audio = torch.cat([batch["audio_mask"] for batch in seen])
    assert video.shape == (720, 2) and audio.shape == (720, 4)
    for mask in (video, audio):  # a stream is given whole or not at all, each in half of the cases
        assert torch.equal(mask.all(1), mask.any(1))
        assert abs(float((~mask.any(1)).float().mean()) - batches.config.given / 2) < 0.05
    assert (video.any(1) | audio.any(1)).all()


def test_branches_and_a_share_of_zero_give_nothing_clean(batches: Batches) -> None:
    alone = Batches(batches.data, batches.config, None).training_batch(0, 0, 1)
    without = dataclasses.replace(batches.config, given=0.0)
    for batch in (alone, Batches(batches.data, without, batches.prior).training_batch(0, 0, 1)):
        assert "video_mask" not in batch and "audio_mask" not in batch


def test_loss_counts_what_is_generated(batches: Batches) -> None:
    """Against the samples one by one: a clean stream adds nothing, and its own noise and timestep do not matter."""
    model = randomize(JavisDiT(batches.config.model()), 1)
    assert isinstance(model, JavisDiT)
    module = FlowModule(model, batches.config, True)
    batch = batches.training_batch(3, 0, 1)
    made = {"video": batch["video_mask"].any(1), "audio": batch["audio_mask"].any(1)}
    assert not all(m.all() for m in made.values())
    with torch.no_grad():
        total, *means = module(batch)
        alone = [module({name: x[i : i + 1] for name, x in batch.items()}) for i in range(12)]
        for k, (mean, some) in enumerate(zip(means, made.values(), strict=True), start=1):
            each = torch.stack([losses[k] for losses in alone])
            assert (each[~some] == 0).all() and (each[some] > 0).all()
            torch.testing.assert_close(mean, each[some].mean())
        torch.testing.assert_close(total, torch.stack([losses[0] for losses in alone]).mean())
        noise = torch.where(made["audio"][:, None, None, None], batch["audio_noise"], torch.tensor(9.0))
        assert torch.equal(module(batch | {"audio_noise": noise})[0], total)


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer(config: DemoTrainConfig, name: str) -> None:
    config = dataclasses.replace(config, optimizer=name)
    named = list(JavisDiT(config.model()).named_parameters())
    optimizers = build_optimizers(named, config, 1e-3)
    held = {key: id(p) for o, keys in optimizers for key, p in zip(keys, _parameters(o), strict=True)}
    assert held == {key: id(p) for key, p in named}
    by_muon = {key for o, keys in optimizers if isinstance(o, torch.optim.Muon) for key in keys}
    if name == "adamw":
        assert not by_muon
        return
    assert by_muon == {key for key, p in named if "layers." in key and p.ndim == 2 and key.endswith(".weight")}
    assert not any("modulation" in key or "embed" in key or "final" in key for key in by_muon)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_muon_moves_every_direction_alike() -> None:
    """Singular values of a step: about 0.2 sqrt(larger side) times the rate, whatever those of the gradient."""
    config = tiny_config(Path("unused"), width=64, weight_decay=0.0)
    named = list(JavisDiT(config.model()).named_parameters())
    (_, _), (muon, keys) = build_optimizers(named, config, 1e-3)
    weight = dict(named)[keys[0]]
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    weight.grad = torch.randn(weight.shape, generator=generator) * torch.logspace(-2, 2, weight.shape[1])
    for group in muon.param_groups:
        group["lr"] = 1e-3 * group["rate"]
    muon.step()
    singular = torch.linalg.svdvals(weight.detach() - before) / (2e-3 * 0.2 * max(weight.shape) ** 0.5)
    assert 0.3 < float(singular.median()) < 1.3 and float(singular.max()) < 1.5


# -- timesteps ---------------------------------------------------------------------------------------------------------


def test_the_plan_of_timesteps(tmp_path: Path) -> None:
    """Medians of the drawn timesteps follow the plan: ratio r puts the median at r / (1 + r)."""
    config = tiny_config(tmp_path, batch=400, timestep_plan=((0, 7.0, 1.0), (10, 2.0, 0.5)))
    data = numbered(config)
    prior = _NoPriors()
    batches = Batches(data, config, prior)  # type: ignore[arg-type]
    for step, ratio, std in ((0, 7.0, 1.0), (9, 7.0, 1.0), (10, 2.0, 0.5), (99, 2.0, 0.5)):
        t = np.sort(batches.training_batch(step, 0, 1)["t"].numpy()) / 1000
        logit = np.log(t / (1 - t))
        assert abs(np.median(logit) - np.log(ratio)) < 4 * std * 1.25 / 20
        quarter = NormalDist().inv_cdf(0.75) * std
        assert abs(np.quantile(logit, 0.75) - np.log(ratio) - quarter) < 5 * std * 1.4 / 20


class _NoPriors:
    """Stands in for the estimator: its presence marks the joint stage."""

    def encode(self, text: torch.Tensor, *, generator: torch.Generator) -> _NoPriors:
        self.spatial = self.temporal = torch.zeros(len(text), 1, 1)
        return self
