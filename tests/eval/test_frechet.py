"""Frechet distances: closed forms of Gaussians, and what known damage does to features of real clips."""

from __future__ import annotations

import numpy as np
import pytest

from javis.errors import UsageError
from javis.eval.frechet import Gaussian, frechet_distance
from javis.eval.frechet_features import (
    PARTS,
    SETS,
    alignment_features,
    comparable,
    picture_features,
    raw_features,
    reference,
    sound_features,
)
from javis.eval.onsets import Sound
from javis.eval.stats import jackknife
from javis.eval.steps_prompts import prompts
from javis.eval.world_report import Clip, real_clips
from tests.eval.clips import damaged_video, disc, struck

# -- closed forms -----------------------------------------------------------------------------------------------------


def gaussian(mean: list[float], covariance: np.ndarray) -> Gaussian:
    return Gaussian(np.array(mean, float), np.asarray(covariance, float), 1000)


def test_one_dimension() -> None:
    """(m_a - m_b)^2 + (s_a - s_b)^2."""
    a, b = gaussian([1.0], [[4.0]]), gaussian([-0.5], [[9.0]])
    assert frechet_distance(a, b) == pytest.approx(1.5**2 + (2 - 3) ** 2, abs=1e-12)


def test_covariances_that_commute() -> None:
    """Of one eigenbasis: the means' distance and that of the roots of the eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    first, second = np.array([1.0, 2, 3, 4, 5]), np.array([0.5, 4, 1, 0, 2])
    a = gaussian([0.0] * 5, (basis * first) @ basis.T)
    b = gaussian([0.1] * 5, (basis * second) @ basis.T)
    expected = 5 * 0.01 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)


def test_covariances_that_do_not_commute() -> None:
    """In two dimensions the trace of a root is known: tr M^1/2 = sqrt(tr M + 2 sqrt(det M)), with M = C_a C_b."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    assert not np.allclose(a @ b, b @ a)
    product = a @ b
    shared = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * shared
    distance = frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b))
    assert distance == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(gaussian([0, 0], b), gaussian([0, 0], a)) == pytest.approx(distance, abs=1e-12)


def test_the_same_and_the_singular() -> None:
    flat = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(gaussian([1, 2, 3], flat), gaussian([1, 2, 3], flat)) == pytest.approx(0, abs=1e-12)
    # A point mass: its distance to a Gaussian is that of the means and the Gaussian's trace.
    assert frechet_distance(gaussian([0, 0, 2], np.zeros((3, 3))), gaussian([0, 0, 0], flat)) == pytest.approx(5.0)


def test_mean_and_covariance_are_numpys() -> None:
    x = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    found = Gaussian.of(x)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64).T), atol=1e-12)
    assert found.mean.dtype == np.float64 and found.count == 40


def test_sets_that_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="24 clips .* more than 24"):
        Gaussian.of(np.zeros((24, 24)))
    with pytest.raises(ValueError, match="shape"):
        Gaussian.of(np.zeros(5))
    with pytest.raises(ValueError, match="NaN"):
        Gaussian.of(np.array([[0.0], [np.nan], [1.0]]))
    with pytest.raises(ValueError, match="dimensions"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


def test_the_jackknife_takes_away_the_bias_of_few_clips() -> None:
    rng, real = np.random.default_rng(3), gaussian([0.0] * 6, np.eye(6))
    found = []
    for _ in range(30):
        x = rng.normal(size=(60, 6))
        found.append(jackknife(60, lambda chosen, x=x: frechet_distance(real, Gaussian.of(x[chosen]))))
    raw, corrected = (np.array([getattr(f, name) for f in found]) for name in ("value", "corrected"))
    assert raw.mean() > 0.15  # of sets that differ by chance alone
    assert abs(corrected.mean()) < 0.15 * raw.mean()


# -- features of real clips -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(real_clips([prompt.scene for prompt in prompts(24, 5_000_000)]))


@pytest.fixture(scope="module")
def raws(clips: list[Clip]) -> list[dict[str, np.ndarray]]:
    return [raw_features(c.video, c.audio, c.fps, c.sample_rate) for c in clips]


def distances(raws: list[dict[str, np.ndarray]]) -> dict[str, float]:
    vectors = [reference().project(raw) for raw in raws]
    real = reference().gaussians
    return {name: frechet_distance(real[name], Gaussian.of(np.stack([v[name] for v in vectors]))) for name in SETS}


def changed(raws: list[dict[str, np.ndarray]], **new: list[np.ndarray]) -> dict[str, float]:
    return distances([{**raw, **{name: found[i] for name, found in new.items()}} for i, raw in enumerate(raws)])


def test_the_file_describes_this_code(raws: list[dict[str, np.ndarray]]) -> None:
    """Means of other real clips are within sampling error of those in the file, for every raw feature."""
    for name, (mean, spread) in reference().scales.items():
        values = np.stack([raw[name] for raw in raws])
        z = (values.mean(axis=0) - mean) / (spread / np.sqrt(len(values)))
        assert np.abs(z).max() < 5, name
        assert 0.5 < np.median(values.std(axis=0) / spread) < 1.5, name
    assert {name: sum(rows for _, rows in parts) for name, parts in PARTS.items()} == {
        name: len(gaussian.mean) for name, gaussian in reference().gaussians.items()
    }


def test_real_clips_are_near_real_clips(raws: list[dict[str, np.ndarray]]) -> None:
    """57 clips: what is left is the bias of few clips, which the jackknife takes away."""
    vectors = np.stack([reference().project(raw)["picture"] for raw in raws])
    real = reference().gaussians["picture"]
    found = jackknife(len(vectors), lambda chosen: frechet_distance(real, Gaussian.of(vectors[chosen])))
    assert 0 < found.value < 3
    assert found.corrected < 0.5 * found.value


def test_damage_to_the_picture_grows(clips: list[Clip], raws: list[dict[str, np.ndarray]]) -> None:
    def after(damage) -> dict[str, float]:  # type: ignore[no-untyped-def]
        return changed(raws, picture=[picture_features(damage(c.video)) for c in clips])

    floor = distances(raws)
    noisy = [after(lambda v, n=n: damaged_video(v, blur=0.1, noise=n)) for n in (5, 15)]
    blurred = [after(lambda v, b=b: damaged_video(v, blur=b, noise=0)) for b in (0.7, 1.4)]
    for first, second in (noisy, blurred):
        assert 1.2 * floor["picture"] < 1.2 * first["picture"] < second["picture"]
        assert floor["both"] < first["both"] < second["both"]
        assert first["sound"] == floor["sound"]
    assert noisy[1]["picture"] > 10 * floor["picture"]
    colours = after(lambda v: np.roll(v, 1, axis=-1))
    assert colours["picture"] > 1.5 * floor["picture"]


def test_damage_to_the_sound_grows(clips: list[Clip], raws: list[dict[str, np.ndarray]]) -> None:
    floor, found = distances(raws), []
    for level in (0.001, 0.003, 0.01):
        hiss = np.random.default_rng(0).normal(0, level, clips[0].audio.shape)
        found.append(changed(raws, sound=[sound_features(Sound(c.audio + hiss, c.sample_rate)) for c in clips]))
    heard = [floor["sound"], *(f["sound"] for f in found)]
    assert heard == sorted(heard) and heard[-1] > 10 * heard[0]
    assert all(f["picture"] == floor["picture"] for f in found)


def test_a_late_sound_moves_the_joint_distance_alone(clips: list[Clip], raws: list[dict[str, np.ndarray]]) -> None:
    floor, found = distances(raws), []
    for seconds in (0.03, 0.06, 0.12):
        late = [np.concatenate([np.zeros(round(seconds * c.sample_rate)), c.audio])[: len(c.audio)] for c in clips]
        sounds = [Sound(wave, c.sample_rate) for wave, c in zip(late, clips, strict=True)]
        found.append(
            changed(
                raws,
                sound=[sound_features(s) for s in sounds],
                alignment=[alignment_features(c.video, s, c.fps) for c, s in zip(clips, sounds, strict=True)],
            )
        )
    both = [floor["both"], *(f["both"] for f in found)]
    assert both == sorted(both) and both[1] > 3 * both[0] and both[3] > 10 * both[0]
    for f in found:
        assert f["picture"] == floor["picture"]
        assert f["sound"] - floor["sound"] < 0.15 * (f["both"] - floor["both"])


def test_correlation_peaks_at_the_lag_of_the_sound() -> None:
    """A disc that turns back at known frames, and a sound as late as each of the lags."""
    height = np.abs((np.arange(32) % 8) - 4) / 4.0  # turns back every 4 frames, at 16 fps every 0.25 s
    video = disc(np.full(32, 0.5), 0.3 + 0.4 * height)
    times = np.arange(4, 28, 4) / 16
    for lag in (-0.0625, 0.0, 0.0625):
        sound = Sound(struck(list(times + lag)), 16000)
        turns = alignment_features(video, sound, 16.0)[18:]
        assert np.arange(-4, 5)[turns.argmax()] * 0.03125 == pytest.approx(lag)


def test_one_failed_clip_does_not_decide(clips: list[Clip], raws: list[dict[str, np.ndarray]]) -> None:
    """One clip of 57 that is all noise moves the distance less than a little hiss in every clip does."""
    noise = np.random.default_rng(0).normal(0, 0.3, clips[0].audio.shape)
    failed = [sound_features(Sound(noise, 16000)), *(raw["sound"] for raw in raws[1:])]
    hiss = np.random.default_rng(0).normal(0, 0.002, clips[0].audio.shape)
    noisy = [sound_features(Sound(c.audio + hiss, c.sample_rate)) for c in clips]
    floor = distances(raws)["sound"]
    assert floor < changed(raws, sound=failed)["sound"] < changed(raws, sound=noisy)["sound"]


def test_form_of_clips() -> None:
    video = np.zeros((32, 64, 64, 3), np.uint8)
    assert comparable(video, 16, 16000)
    assert not comparable(video[:, ::2, ::2], 16, 16000) and not comparable(video[:16], 16, 16000)
    assert not comparable(video, 16, 24000) and not comparable(video, 24, 16000)
    with pytest.raises(ValueError, match="2 frames"):
        raw_features(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2000), 16, 16000)
