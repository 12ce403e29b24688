"""Sources of batches: what they encode, that they resume, and files that give nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from javis import JavisPipeline
from javis.data.feed import MediaBatch, SkippedClip
from javis.durations import clip_length
from javis.errors import FailedError, UsageError
from javis.frame_size import FrameSize
from javis.train.recipes.config import Draws
from javis.train.recipes.sources import ClipEncoder, FeederSource, StoredSource, WorldSource, render
from javis.train.recipes.start import feed_plan
from javis.world import WorldConfig

WORLD = WorldConfig(size=32, seconds=0.5)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n] for n in a)


def world_source(pipe: JavisPipeline, stage: Any = "joint", **changes: Any) -> WorldSource:
    length = clip_length(0.5, 16, 16000)
    given: dict[str, Any] = {"size": FrameSize(32, 32), "length": length, "batch": 2} | changes
    return WorldSource(ClipEncoder(pipe, stage), Draws(), **given)


def test_encoder_is_codecs_and_encoders(pipe: JavisPipeline) -> None:
    media = render([5, 6], WORLD)
    found = ClipEncoder(pipe, "joint")(media, [1, 2])
    pixels = media.video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    assert torch.equal(found["video"], pipe.video_codec.encode(pixels))
    assert torch.equal(found["audio"], pipe.audio_codec.encode(media.waveform))
    assert found["video_sizes"] == tuple(found["video"].shape[2:])
    text, mask = pipe.encode_text(media.captions)
    assert torch.equal(found["text"], text) and torch.equal(found["text_mask"], mask)
    alone = ClipEncoder(pipe, "joint")(render([6], WORLD), [2])
    for name in ("spatial_prior", "temporal_prior"):
        torch.testing.assert_close(found[name][1:], alone[name])  # a sample's prior depends on its own seed
    assert not torch.equal(found["spatial_prior"][0], ClipEncoder(pipe, "joint")(media, [3, 2])["spatial_prior"][0])
    assert (
        found["height"].tolist() == [32, 32]
        and found["frames"].tolist() == [8, 8]
        and found["fps"].tolist() == [16, 16]
    )
    heard = ClipEncoder(pipe, "audio")(media, [1, 2])
    assert "video" not in heard and "spatial_prior" not in heard and torch.equal(heard["audio"], found["audio"])


def test_unknown_words_are_named(pipe: JavisPipeline) -> None:
    media = render([5], WORLD)
    media.captions[0] = "a zebra sings"
    with pytest.raises(UsageError, match="zebra"):
        ClipEncoder(pipe, "joint")(media, [1])


@pytest.mark.parametrize("stage", ["audio", "joint"])
def test_world_source_goes_on_where_it_was(pipe: JavisPipeline, stage: str) -> None:
    source = world_source(pipe, stage)
    first = source.next()
    state = json.loads(json.dumps(source.state_dict()))
    second = source.next()
    again = world_source(pipe, stage)
    again.load_state_dict(state)
    assert same(again.next(), second)
    assert same(world_source(pipe, stage).next(), first) and not same(first, second)
    assert not torch.equal(world_source(pipe, stage, rank=1).next()["audio"], first["audio"])
    assert ("video_mask" in first) is (stage == "joint")


def test_the_world_is_square(pipe: JavisPipeline) -> None:
    with pytest.raises(UsageError, match="the world draws square pictures, not 48x32"):
        world_source(pipe, size=FrameSize(32, 48))


# -- files -------------------------------------------------------------------------------------------------------------


class Clips:
    """A feeder of three batches an epoch, of scenes 0..5 in an order that depends on the epoch."""

    def __init__(self, batches: int = 3) -> None:
        self.batches, self.epoch, self.number = batches, 0, 0
        self.skipped: list[SkippedClip] = []

    def __iter__(self) -> Iterator[MediaBatch]:
        if self.number >= self.batches:
            self.epoch, self.number = self.epoch + 1, 0
        return self

    def __next__(self) -> MediaBatch:
        if self.number >= self.batches:
            raise StopIteration
        self.number += 1
        if self.number == 2 and not self.skipped:
            self.skipped.append(SkippedClip("broken.mp4", "truncated", 7))
        return render([100 * self.epoch + 2 * self.number, 100 * self.epoch + 2 * self.number + 1], WORLD)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.number = state["epoch"], state["number"]

    def close(self) -> None:
        pass


def test_feeder_source_epoch_after_epoch(pipe: JavisPipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Seven batches are two epochs and a bit; taken up after any of them the rest is the same."""

    def source() -> FeederSource:
        return FeederSource(ClipEncoder(pipe, "joint"), Clips(), Draws(), seed=3)

    whole = source()
    states, batches = [], []
    with caplog.at_level(logging.WARNING, "javis.train"):
        for _ in range(7):
            states.append(json.loads(json.dumps(whole.state_dict())))
            batches.append(whole.next())
    assert caplog.text.count("left out broken.mp4: truncated") == 1
    expected = [
        render([100 * e + 2 * n], WORLD).waveform for e, n in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 1))
    ]
    for wave, batch in zip(expected, batches, strict=True):
        assert torch.equal(pipe.audio_codec.encode(wave)[0], batch["audio"][0])
    for at in (1, 3, 5):
        resumed = source()
        resumed.load_state_dict(states[at])
        assert same(resumed.next(), batches[at]) and same(resumed.next(), batches[at + 1])


def test_files_that_give_nothing(pipe: JavisPipeline) -> None:
    empty = Clips(0)
    empty.skipped.append(SkippedClip("a.mp4", "no sound", 0))
    with pytest.raises(FailedError, match=r"no clip of the manifest could be used .*a\.mp4"):
        FeederSource(ClipEncoder(pipe, "joint"), empty, Draws()).next()


class Stored:
    """What `javis data encode` stored, in turns."""

    def __init__(self, pipe: JavisPipeline, channels: int | None = None) -> None:
        self.pipe, self.number, self.channels = pipe, 0, channels

    def next(self) -> dict[str, Any]:
        self.number += 1
        encoded = ClipEncoder(self.pipe, "joint")(render([self.number, 50], WORLD), [0, 0])
        found = {k: encoded[k] for k in ("video", "audio", "text", "text_mask", "fps", "height", "width", "frames")}
        if self.channels is not None:
            found["video"] = found["video"][:, : self.channels]
        return found | {"prior_text": found["text"], "prior_text_mask": found["text_mask"], "captions": [], "ids": []}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def test_stored_latents_are_used_as_they_are(pipe: JavisPipeline) -> None:
    encoder = ClipEncoder(pipe, "joint")
    source = StoredSource(encoder, Stored(pipe), Draws(), seed=2)
    state = json.loads(json.dumps(source.state_dict()))
    first = source.next()
    expected = encoder(render([1, 50], WORLD), [0, 0])
    assert torch.equal(first["video"], expected["video"]) and torch.equal(first["text"], expected["text"])
    assert first["spatial_prior"].shape == expected["spatial_prior"].shape and "video_mask" in first
    second = source.next()
    resumed = StoredSource(encoder, Stored(pipe), Draws(), seed=2)
    resumed.load_state_dict(state)
    assert same(resumed.next(), first) and same(resumed.next(), second)
    heard = StoredSource(ClipEncoder(pipe, "audio"), Stored(pipe), Draws()).next()
    assert "video" not in heard and heard["video_sizes"] == tuple(expected["video"].shape[2:])
    with pytest.raises(UsageError, match="stored video latents have 2 channels, the model takes 6"):
        StoredSource(encoder, Stored(pipe, 2), Draws()).next()


@pytest.mark.slow
def test_full_size_codecs_draw_for_each_clip_alone() -> None:
    """A clip's latents depend on its own seed, not on its batch; the feeder's mel gives what the waveform gives."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    toy = JavisPipeline.with_random_weights("toy", device="cpu")
    world = WorldConfig(size=64, fps=24, seconds=17 / 24)
    encoder = ClipEncoder(toy, "joint")
    both, one = encoder(render([1, 2], world), [11, 12]), encoder(render([2], world), [12])
    for name in ("video", "audio", "spatial_prior"):
        torch.testing.assert_close(both[name][1:], one[name])
    other = encoder(render([2], world), [13])
    assert not torch.allclose(other["video"], one["video"]) and not torch.allclose(other["audio"], one["audio"])
    media = render([2], world)
    codec: Any = toy.audio_codec
    given = MediaBatch(**{**vars(media), "mel": codec.log_mel(media.waveform)})
    torch.testing.assert_close(encoder(given, [12])["audio"], one["audio"])


def test_the_plan_of_a_stage_names_its_rank() -> None:
    """Every process decodes its own share, in the checkpoint's format; both stages that read files use this."""
    recipe = SimpleNamespace(batch=3, seed=5)
    length = clip_length(2.0, 16, 16000, window=2, limits=(0.5, 4.0))
    plan = feed_plan(recipe, FrameSize(32, 48), length, 1, 4, device="cpu")
    assert (plan.rank, plan.world, plan.batch, plan.seed) == (1, 4, 3, 5)
    assert (plan.num_frames, plan.height, plan.width, plan.fps, plan.sample_rate) == (32, 32, 48, 16.0, 16000)
