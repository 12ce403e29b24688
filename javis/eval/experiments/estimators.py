"""Prior estimators that experiments compare: the built-in one, and one before and after contrastive training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.eval.experiments.common import Context, needed
from javis.model.codecs import AudioCodec, VideoCodec
from javis.model.prior import PriorEstimator
from javis.world import WorldConfig

INITIAL_SEED = 0  # of the random weights that "javis train prior" starts from, unless it is told otherwise


@dataclass(frozen=True)
class Trained:
    """A contrastively trained estimator, its initial weights, and what clips are encoded with."""

    before: PriorEstimator
    after: PriorEstimator
    video_codec: VideoCodec
    audio_codec: AudioCodec
    encode_text: Callable[[list[str]], Tensor]
    world: WorldConfig


def trained(context: Context) -> Trained:
    """The estimator of ``context.prior_checkpoint`` with its embedding network, and the weights it began with.

    Raises:
        UsageError: no such checkpoint was given, or it keeps no embedding network.
    """
    from javis.train.prior_run import load_init, text_encoder, world_format

    name = needed(context.prior_checkpoint)
    pipe = load_init(name)
    config = pipe.prior.config
    if not config.encode_va:
        raise UsageError(
            f"checkpoint {name!r} keeps no embedding network and discriminator, which sampling does not need; "
            "'javis train prior --out DIR' makes --prior-checkpoint DIR/checkpoint"
        )
    torch.manual_seed(INITIAL_SEED)
    before = PriorEstimator(config).eval()
    return Trained(
        before, pipe.prior.eval(), pipe.video_codec, pipe.audio_codec, text_encoder(pipe), world_format(pipe)
    )


def posterior(
    estimator: PriorEstimator, encode_text: Callable[[list[str]], Tensor], captions: Sequence[str], batch: int = 32
) -> tuple[Tensor, Tensor]:
    """Mean and log variance of captions' priors, [N, Ns + Nt, C] each; without sampling a log variance of -inf."""
    means, logvars = [], []
    with torch.no_grad():
        for start in range(0, len(captions), batch):
            text = encode_text(list(captions[start : start + batch]))
            priors = estimator.encode(text, generator=torch.Generator().manual_seed(0))
            tokens = torch.cat((priors.spatial, priors.temporal), dim=1)
            means.append(tokens if priors.mean is None else priors.mean)
            logvars.append(torch.full_like(tokens, -torch.inf) if priors.logvar is None else priors.logvar)
    return torch.cat(means), torch.cat(logvars)
