"""The HiST-Sypo estimator: against torch's own transformer, closed forms of its losses, and what may depend on what."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.prior import KL_WEIGHT, PriorConfig, PriorEstimator, Priors
from javis.model.prior_losses import (
    PairDiscriminator,
    axis_loss,
    kl_to_standard_normal,
    negative_hinge,
    onset_loss,
    token_hinge,
)
from javis.model.prior_transformer import PriorTransformer

SMALL = PriorConfig(
    text_channels=12,
    spatial_token_num=3,
    temporal_token_num=5,
    hidden_size=16,
    out_dim=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    va_num_heads=2,
    audio_patch=(2, 2),
    pred_onset=True,
)


def small(**changes: object) -> PriorEstimator:
    torch.manual_seed(1)
    return PriorEstimator(PriorConfig(**(SMALL.to_dict() | changes)))


def batch(size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=g)

    return {
        "text": draw(6, 12),
        "noise": draw(8, 8),
        "video": draw(4, 5, 6, 9),
        "audio": draw(8, 12, 8),
        "neg_video": draw(2, 4, 5, 6, 9),
        "neg_audio": draw(1, 8, 12, 8),
        "height": torch.full((size,), 48.0),
        "width": torch.full((size,), 72.0),
        "onset": (draw(23) > 1).float(),
    }


def loss_of(estimator: PriorEstimator, b: dict[str, Tensor], priors: Priors | None = None, **changes: object):
    priors = priors or estimator.encode(b["text"], noise=b["noise"])
    arguments = {
        "neg_videos": {"spatial": b["neg_video"], "temporal": b["neg_video"]},
        "neg_audios": {"spatial": b["neg_audio"], "temporal": b["neg_audio"]},
        "frame_height": b["height"],
        "frame_width": b["width"],
    } | changes
    return estimator.loss(priors, b["video"], b["audio"], **arguments)  # type: ignore[arg-type]


def torch_transformer(heads: int) -> tuple[nn.Transformer, PriorTransformer]:
    """torch's transformer as the official code builds it, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = nn.Transformer(
        12, heads, 2, 2, 24, 0.0, nn.GELU(approximate="tanh"), batch_first=True, norm_first=True
    ).double()
    for layer in theirs.decoder.layers:  # what copying makes of the activation; written out in case torch mends it
        layer.__dict__["activation"] = F.relu
    ours = PriorTransformer(12, heads, 2, 2, 24, 0.0).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_transformer_is_torchs_in_training(heads: int) -> None:
    theirs, ours = torch_transformer(heads)
    text, queries = torch.randn(2, 7, 12).double(), torch.randn(2, 4, 12).double()
    torch.testing.assert_close(ours(text, queries, "tanh"), theirs(text, queries), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_is_torchs_at_inference() -> None:
    theirs, ours = torch_transformer(2)
    theirs.eval()
    text, queries = torch.randn(2, 7, 12).double() * 3, torch.randn(2, 4, 12).double()
    with torch.no_grad():
        expected = theirs(text, queries)  # the fused path: erf GELU in the encoder
        torch.testing.assert_close(ours(text, queries, "erf"), expected, atol=1e-12, rtol=0)
        assert (ours(text, queries, "tanh") - expected).abs().max() > 1e-6


def test_the_default_encoder_activation_follows_the_mode() -> None:
    b = batch()
    for heads, erf_at_inference in ((2, True), (1, False)):
        estimator = small(num_heads=heads, apply_sampling=False)
        for training, chosen in ((True, "tanh"), (False, "erf" if erf_at_inference else "tanh")):
            estimator.train(training)
            default = estimator.encode(b["text"]).spatial
            assert torch.equal(default, estimator.encode(b["text"], encoder_gelu=chosen).spatial)
            other = {"tanh": "erf", "erf": "tanh"}[chosen]
            assert not torch.equal(default, estimator.encode(b["text"], encoder_gelu=other).spatial)


def test_sampling_is_mean_plus_standard_deviation_times_noise() -> None:
    estimator, b = small().eval(), batch()
    out = estimator.encode(b["text"], noise=b["noise"])
    assert out.mean is not None
    assert out.logvar is not None
    expected = out.mean.double() + out.logvar.double().exp().sqrt() * b["noise"].double()
    torch.testing.assert_close(torch.cat((out.spatial, out.temporal), 1).double(), expected, atol=1e-6, rtol=0)
    assert out.spatial.shape == (2, 3, 8)
    assert out.temporal.shape == (2, 5, 8)
    draws = [estimator.encode(b["text"], generator=torch.Generator().manual_seed(s)).spatial for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


def test_extreme_logvar_stays_finite() -> None:
    estimator, b = small().eval(), batch()
    with torch.no_grad():
        estimator.out_proj.bias[8:] = 1e4
    out = estimator.encode(b["text"], noise=b["noise"])
    assert out.logvar is not None
    assert out.logvar.max() == 20
    assert torch.isfinite(out.spatial).all()


def test_without_sampling_nothing_is_random() -> None:
    estimator, b = small(apply_sampling=False).eval(), batch()
    first, second = estimator.encode(b["text"]), estimator.encode(b["text"])
    assert first.mean is None
    assert first.logvar is None
    assert torch.equal(first.spatial, second.spatial)
    assert loss_of(estimator, b, first).kl is None


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    estimator, b = small().eval(), batch(3)
    together = estimator.encode(b["text"], noise=b["noise"])
    video = estimator.embed_video(b["video"], b["height"], b["width"])
    audio = estimator.embed_audio(b["audio"])
    pairs = [estimator.embed_pairs(axis, video[i], audio[i]) for i, axis in enumerate(("spatial", "temporal"))]
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in b.items()}
        alone = estimator.encode(one["text"], noise=one["noise"])
        torch.testing.assert_close(alone.spatial, together.spatial[i : i + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.temporal, together.temporal[i : i + 1], atol=1e-5, rtol=0)
        v, a = estimator.embed_video(one["video"], one["height"], one["width"]), estimator.embed_audio(one["audio"])
        for j, axis in enumerate(("spatial", "temporal")):
            torch.testing.assert_close(estimator.embed_pairs(axis, v[j], a[j]), pairs[j][i : i + 1], atol=1e-5, rtol=0)


def test_audio_beyond_the_last_whole_patch_is_unused_and_video_is_padded() -> None:
    estimator, b = small().eval(), batch()
    longer = torch.cat((b["audio"], torch.randn(2, 8, 1, 8)), dim=2)
    for got, expected in zip(estimator.embed_audio(longer), estimator.embed_audio(b["audio"]), strict=True):
        assert torch.equal(got, expected)
    padded = F.pad(b["video"], (0, 1))
    both = [estimator.embed_video(v, b["height"], b["width"]) for v in (b["video"], padded)]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])
    assert both[0][1].shape == (2, 5, 3 * 5, 8)


def test_hinges_in_closed_form() -> None:
    prior = F.normalize(torch.randn(2, 3, 8).double(), dim=-1)
    other = torch.randn(2, 3, 8).double()
    orthogonal = other - (other * prior).sum(-1, keepdim=True) * prior
    plus, minus = prior * 5, prior * -0.2

    def value(positive: Tensor, *negatives: Tensor) -> float:
        return token_hinge(prior, torch.stack((positive, *negatives), dim=1)).item()

    assert value(plus, minus, minus) == pytest.approx(0, abs=1e-6)
    assert value(minus, plus) == pytest.approx(2)
    assert value(orthogonal, orthogonal) == pytest.approx(1)
    assert value(orthogonal) == pytest.approx(0.5)  # without negatives only the positive half is left
    assert value(plus, plus, minus) == pytest.approx(0.5)
    assert negative_hinge(torch.stack((plus, minus), 1)).item() == pytest.approx(0, abs=1e-6)
    assert negative_hinge(torch.stack((plus, prior, orthogonal), 1)).item() == pytest.approx(1.5)
    assert negative_hinge(plus[:, None]).item() == 0


def test_kl_against_torch_distributions() -> None:
    mean, logvar = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)
    assert kl_to_standard_normal(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).item() == 0
    assert kl_to_standard_normal(torch.full((2, 3, 4), 2.0), torch.zeros(2, 3, 4)).item() == pytest.approx(0.5 * 4 * 12)


def test_axis_loss_of_an_undecided_discriminator() -> None:
    torch.manual_seed(0)
    discriminator = PairDiscriminator(8, 2, qk_norm=True)
    nn.init.zeros_(discriminator.classifier.weight)
    nn.init.constant_(discriminator.classifier.bias, 0.7)
    prior, embeds = torch.randn(2, 3, 8), torch.randn(2, 4, 3, 8)
    loss = axis_loss(prior, embeds, discriminator)
    p = 1 / (1 + math.exp(-0.7))  # one positive pair in four
    assert loss.disc.item() == pytest.approx(-(math.log(p) + 3 * math.log(1 - p)) / 4, rel=1e-5)
    assert loss.mse.item() == pytest.approx((prior - embeds[:, 0]).square().mean().item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(sum(x.item() for x in (loss.token, loss.disc, loss.mse, loss.va)))


def test_onset_labels_are_pooled_so_that_no_onset_is_lost() -> None:
    labels = torch.zeros(1, 40)
    labels[0, 13] = 1  # bin 3 of 10
    sure = torch.full((1, 10), -20.0)
    sure[0, 3] = 20.0
    assert onset_loss(sure, labels).item() < 1e-6
    assert onset_loss(-sure, labels).item() == pytest.approx(20, rel=1e-4)
    half = onset_loss(torch.zeros(1, 10), labels).item()
    assert half == pytest.approx(math.log(2))
    # Up to 2 * Nt - 1 labels the resampling is linear: a constant stays what it is.
    assert onset_loss(torch.full((1, 10), 20.0), torch.ones(1, 19)).item() < 1e-6


def test_kl_and_onset_enter_the_total_with_their_weights() -> None:
    estimator, b = small(), batch()
    priors = estimator.encode(b["text"], noise=b["noise"])
    assert priors.mean is not None
    assert priors.logvar is not None
    bare = Priors(spatial=priors.spatial, temporal=priors.temporal)
    full, without = loss_of(estimator, b, priors, onset=b["onset"]), loss_of(estimator, b, bare)
    assert set(full.parts()) - set(without.parts()) == {"kl_loss", "onset_loss"}
    kl = KL_WEIGHT * kl_to_standard_normal(priors.mean, priors.logvar)
    assert full.onset is not None
    expected = without.total.double() + kl.double() + full.onset.double()
    assert full.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert without.total.item() == pytest.approx((without.spatial.total + without.temporal.total).item(), rel=1e-6)


def test_negatives_are_a_set_and_leave_the_mse_alone() -> None:
    estimator, b = small().eval(), batch()
    priors = estimator.encode(b["text"], noise=b["noise"])
    full = loss_of(estimator, b, priors)
    flipped = {axis: b["neg_video"].flip(1) for axis in ("spatial", "temporal")}
    swapped = loss_of(estimator, b, priors, neg_videos=flipped)
    assert swapped.total.item() == pytest.approx(full.total.item(), rel=1e-5)
    none = loss_of(estimator, b, priors, neg_videos=None, neg_audios={})
    assert none.spatial.mse.item() == full.spatial.mse.item()
    assert none.spatial.va.item() == 0
    assert math.isfinite(none.total.item())


@pytest.mark.parametrize(("index", "axis"), [(0, "spatial"), (1, "temporal")])
def test_every_negative_is_paired_with_the_positive_of_the_other_modality(index: int, axis: str) -> None:
    estimator, b = small().eval(), batch()

    def embed(video: Tensor, audio: Tensor) -> Tensor:
        tokens = estimator.embed_video(video, b["height"], b["width"])[index], estimator.embed_audio(audio)[index]
        return estimator.embed_pairs(axis, *tokens)  # type: ignore[arg-type]

    positive = embed(b["video"], b["audio"])
    negatives = [embed(b["video"], b["neg_audio"][:, 0])]
    negatives += [embed(b["neg_video"][:, i], b["audio"]) for i in range(2)]
    cosines = torch.stack([F.cosine_similarity(positive, negative, dim=-1) for negative in negatives])
    expected = F.relu(1 + cosines.double()).mean().item()
    assert getattr(loss_of(estimator, b), axis).va.item() == pytest.approx(expected, rel=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    estimator, b = small(), batch()
    loss_of(estimator, b, onset=b["onset"]).total.backward()
    for name, parameter in estimator.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # Softmax ignores what is added to all scores of a query, so biases of keys have no gradient by construction.
        if not name.endswith(("in_proj_bias", "qkv.bias", "m1_proj.bias", "m2_proj.bias")):
            assert parameter.grad.abs().max() > 0, name


def test_training_pulls_the_prior_to_the_matching_pair() -> None:
    estimator, b = small(apply_sampling=False), batch(4)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(estimator, b)
        loss.total.backward()
        optimizer.step()
        losses.append(loss)
    assert losses[-1].total < 0.6 * losses[0].total
    assert losses[-1].spatial.token < losses[0].spatial.token
    assert losses[-1].temporal.token < losses[0].temporal.token


def test_unusable_arguments_are_named() -> None:
    estimator, b = small(), batch()
    with pytest.raises(ValueError, match=r"\[B, L, 12\]"):
        estimator.encode(torch.zeros(2, 6, 13))
    with pytest.raises(ValueError, match="noise must be"):
        estimator.encode(b["text"], noise=torch.zeros(2, 8, 9))
    with pytest.raises(ValueError, match="encode_va=False"):
        loss_of(small(encode_va=False), b)
    with pytest.raises(ValueError, match="pred_onset=False"):
        loss_of(small(pred_onset=False), b, onset=b["onset"])
    with pytest.raises(ValueError, match="divisible by num_heads 3"):
        small(num_heads=3)
    with pytest.raises(ValueError, match="unknown prior configuration fields"):
        PriorConfig.from_dict({"widht": 3})
    assert PriorConfig.from_dict(SMALL.to_dict()) == SMALL
