"""Stage 2: latents of clips with negatives, batches, the recipe, clips of files."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from javis.data.feed import MediaBatch
from javis.data.negatives import KINDS
from javis.errors import UsageError
from javis.model.codecs import PatchAudioCodec, PatchTransformConfig, PatchVideoCodec
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator
from javis.model.text import WordEncoder, WordEncoderConfig
from javis.model.vocoder import LogMelConfig
from javis.pipeline import JavisPipeline
from javis.train import prior_latents
from javis.train.prior_feed import FeederBatches, check_data
from javis.train.prior_latents import LAYOUT, SLOTS, NegativeSet, build_negatives, draw_kinds, raw_clip, video_tensor
from javis.train.prior_recipe import PriorRecipe
from javis.train.prior_run import run, with_estimator
from javis.train.prior_task import NegativeBatches, PriorModule, PriorTask
from javis.train.recipes.sources import ClipEncoder, render
from javis.world import VOCABULARY, WorldConfig, render_audio, render_video

WORLD = WorldConfig(size=32)
WORDS = WordEncoder(WordEncoderConfig(vocabulary=VOCABULARY))


def words(captions):
    return WORDS(captions)[0]


def codecs():
    video = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=6))
    audio = PatchAudioCodec(PatchTransformConfig(channels=1, patch=(8, 16), coefficients=5), LogMelConfig())
    return video, audio


def small_estimator():
    torch.manual_seed(0)
    return PriorEstimator(
        PriorConfig(
            text_channels=WORDS.config.channels,
            spatial_token_num=4,
            temporal_token_num=8,
            hidden_size=32,
            out_dim=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
            video_channels=6,
            video_patch=(2, 2, 2),
            audio_channels=5,
            audio_patch=(4, 4),
            input_sq_size=32,
        )
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return build_negatives(folder, *codecs(), WORLD, clips=12, seed=400, split="train")


def test_kinds_are_drawn_by_axis_and_modality():
    rng = np.random.default_rng(0)
    drawn = [draw_kinds(rng, tuple(KINDS)) for _ in range(300)]
    for kinds in drawn:
        assert [(KINDS[k].axis, KINDS[k].modality) for k in kinds] == list(SLOTS)
        assert len(set(kinds)) == len(kinds)
    assert set(itertools.chain(*drawn)) == set(KINDS)
    masklets = Counter(kinds[0] for kinds in drawn)["video_masklet"]
    assert masklets == pytest.approx(300 * 3 / 4, abs=4 * math.sqrt(300 * 3 / 16))  # weight 3 against 1
    # A clip without events has no temporal kind: another clip stands in.
    assert [k is None for k in draw_kinds(rng, ("video_masklet", "audio_add"))] == [
        axis == "temporal" or (axis, n) in ((("spatial"), 3), ("spatial", 4)) for n, (axis, _) in enumerate(SLOTS)
    ]


def test_a_raw_clip_is_a_function_of_its_seed():
    one, two = (raw_clip(7, config=WORLD, split="train") for _ in range(2))
    np.testing.assert_array_equal(one.videos, two.videos)
    np.testing.assert_array_equal(one.sounds, two.sounds)
    assert one.kinds == two.kinds and one.captions == two.captions
    scene = prior_latents.draw_scene(7, WORLD, split="train")
    np.testing.assert_array_equal(one.videos[0], render_video(scene))
    np.testing.assert_array_equal(one.sounds[0], render_audio(scene))
    assert one.videos.shape[0] == 1 + sum(n for (_, m), n in LAYOUT.items() if m == "video")
    assert one.sounds.shape[0] == 1 + sum(n for (_, m), n in LAYOUT.items() if m == "audio")
    for changed, original in ((one.videos[1:], one.videos[0]), (one.sounds[1:], one.sounds[0])):
        assert all(not np.array_equal(x, original) for x in changed)


def test_latents_are_those_of_the_clips(data):
    video, audio = codecs()
    raw = raw_clip(405, config=WORLD, split="train")
    with torch.no_grad():
        np.testing.assert_allclose(data.video[5], video.encode(video_tensor(raw.videos)).numpy(), atol=2e-3)
        np.testing.assert_allclose(data.audio[5], audio.encode(torch.from_numpy(raw.sounds)).numpy(), atol=2e-2)
    assert data.kinds[5] == raw.kinds and data.captions[5] == raw.captions


def test_a_build_that_was_killed_goes_on(tmp_path, data, monkeypatch):
    monkeypatch.setattr(prior_latents, "CHUNK", 5)

    class Killed(Exception):
        pass

    def stop(count):
        raise Killed

    with pytest.raises(Killed):
        build_negatives(tmp_path / "a", *codecs(), WORLD, clips=12, seed=400, progress=stop)
    made = []
    original = prior_latents.raw_clip
    monkeypatch.setattr(prior_latents, "raw_clip", lambda seed, **rest: made.append(seed) or original(seed, **rest))
    again = build_negatives(tmp_path / "a", *codecs(), WORLD, clips=12, seed=400)
    assert made == list(range(405, 412))  # the first chunk was there
    np.testing.assert_array_equal(again.video, data.video)
    np.testing.assert_array_equal(again.audio, data.audio)
    assert again.kinds == data.kinds and again.captions == data.captions
    with pytest.raises(UsageError, match="other clips"):
        build_negatives(tmp_path / "a", *codecs(), WORLD, clips=12, seed=401)


def batches(data, **rest):
    return NegativeBatches(data, words, (12, 32), batch=4, frame=(32, 32), **rest)


def test_batches_are_a_function_of_the_position(data):
    source = batches(data)
    first = [source.next() for _ in range(3)]
    again = batches(data)
    again.load_state_dict({"step": 1})
    for one, two in zip(first[1:], [again.next(), again.next()], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert source.state_dict() == again.state_dict() == {"step": 3}
    assert not torch.equal(first[0]["noise"], first[1]["noise"])
    ranks = [batches(data, rank=rank, world=2).next() for rank in (0, 1)]
    assert not torch.equal(ranks[0]["noise"], ranks[1]["noise"])


def test_a_batch_holds_clips_and_their_negatives(data):
    index = np.array([3, 8])
    batch = batches(data).make(index, np.random.default_rng(0))
    for name, store in (("video", data.video), ("audio", data.audio)):
        np.testing.assert_array_equal(batch[name].numpy(), store[index, 0].astype(np.float32))
    np.testing.assert_array_equal(batch["spatial_video"][:, 0].numpy(), data.video[index, 1].astype(np.float32))
    np.testing.assert_array_equal(batch["temporal_video"][:, 0].numpy(), data.video[index, 2].astype(np.float32))
    np.testing.assert_array_equal(batch["spatial_audio"].numpy(), data.audio[index, 1:4].astype(np.float32))
    np.testing.assert_array_equal(batch["temporal_audio"].numpy(), data.audio[index, 4:6].astype(np.float32))


def test_another_clip_stands_in_for_a_negative_that_a_clip_has_not(data):
    kinds = [list(row) for row in data.kinds]
    kinds[3][1] = None  # the temporal picture
    changed = NegativeSet(data.video, data.audio, kinds, data.captions)
    batch = batches(changed).make(np.array([3, 8]), np.random.default_rng(0))
    np.testing.assert_array_equal(batch["temporal_video"][0, 0].numpy(), data.video[8, 0].astype(np.float32))
    np.testing.assert_array_equal(batch["temporal_video"][1, 0].numpy(), data.video[8, 2].astype(np.float32))


def test_the_task_computes_the_loss_of_the_goldens(data):
    estimator = small_estimator()
    batch = batches(data).next()
    got = PriorModule(estimator)(batch)
    expected = estimator.loss(
        estimator.encode(batch["text"], noise=batch["noise"]),
        batch["video"],
        batch["audio"],
        neg_videos={"spatial": batch["spatial_video"], "temporal": batch["temporal_video"]},
        neg_audios={"spatial": batch["spatial_audio"], "temporal": batch["temporal_audio"]},
        frame_height=torch.full((4,), 32.0),
        frame_width=torch.full((4,), 32.0),
    )
    torch.testing.assert_close(got["loss"], expected.total)
    torch.testing.assert_close(got["temporal_disc"], expected.temporal.disc)
    assert all(value.ndim == 0 for value in got.values())
    assert len(PriorTask(estimator).blocks()) == 2


def test_clips_and_their_negatives_can_be_learnt_by_heart(data):
    """Binary cross-entropy over one true pair and its negatives falls well below that of guessing by frequency."""
    estimator, source = small_estimator(), batches(data)
    module = PriorModule(estimator).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    found = []
    for _ in range(150):
        losses = module(source.make(np.arange(12), np.random.default_rng(len(found))))
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        found.append(float(losses["temporal_disc"].detach()))
    guess = -(1 / 4) * math.log(1 / 4) - (3 / 4) * math.log(3 / 4)  # one of four pairs is true
    assert np.mean(found[-10:]) < 0.85 * guess


class Files:
    """A feeder of world clips, two batches an epoch."""

    def __init__(self):
        self.skipped, self.at = [], 0

    def __iter__(self):
        while self.at < 2:
            self.at += 1
            yield render([10 * self.at + k for k in range(4)], WorldConfig())
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_clips_of_files_get_negatives_as_they_come():
    pipe = JavisPipeline.from_pretrained("demo", ops=ModelOps())
    encoder = ClipEncoder(pipe, "joint")
    source = FeederBatches(encoder, Files(), words, (24, 64), seed=1)
    first, state, second = source.next(), source.state_dict(), source.next()
    assert first["spatial_audio"].shape == (4, 3, 48, 32, 4) and first["temporal_video"].shape == (4, 1, 40, 16, 8, 8)
    media: MediaBatch = render([10 + k for k in range(4)], WorldConfig())
    with torch.no_grad():
        torch.testing.assert_close(first["audio"], pipe.audio_codec.encode(media.waveform))
    for name, clip in (("spatial_video", "video"), ("spatial_audio", "audio"), ("temporal_audio", "audio")):
        differs = (first[name] - first[clip][:, None]).abs().flatten(2).amax(dim=2)
        assert (differs > 1e-3).all()
    again = FeederBatches(encoder, Files(), words, (24, 64), seed=1)
    again.load_state_dict(state)
    resumed = again.next()
    assert all(torch.equal(second[name], resumed[name]) for name in second)


def test_the_recipe_writes_a_checkpoint_with_the_estimator(tmp_path):
    folder = run(PriorRecipe(out=tmp_path / "run", clips=8, batch=4, steps=2, log_every=1, device="cpu"))
    pipe = JavisPipeline.from_pretrained(str(folder), ops=ModelOps())
    config = pipe.prior.config
    assert config.encode_va and (config.spatial_token_num, config.temporal_token_num, config.out_dim) == (16, 8, 64)
    assert sum(p.numel() for p in pipe.prior.parameters()) < 500_000
    # The checkpoint is whole: what depends on the priors' sizes fits, the rest is that of --init.
    demo = JavisPipeline.from_pretrained("demo", ops=ModelOps())
    own, old = pipe.model.state_dict(), demo.model.state_dict()
    changed = [name for name in old if own[name].shape != old[name].shape]
    assert changed and all("prior" in name for name in changed)
    assert all(torch.equal(own[name], old[name]) for name in old if name not in changed)
    assert len(pipe("a red ball bounces", steps=1).video) == 1
    # A finished run is not repeated, and says the same.
    assert run(PriorRecipe(out=tmp_path / "run", clips=8, batch=4, steps=2, log_every=1, device="cpu")) == folder


def test_an_estimator_of_the_same_sizes_leaves_the_transformer_alone():
    pipe = JavisPipeline.from_pretrained("demo", ops=ModelOps())
    model, student = pipe.model, pipe.student
    with_estimator(pipe, PriorEstimator(pipe.prior.config))
    assert pipe.model is model and pipe.student is student


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"channels": 0}, "channels"),
        ({"clips": -1}, "clips"),
        ({"sequence_parallel": 2}, "few tokens"),
        ({"data": "clips"}, "expected 'world', a manifest"),
        ({"data": "latents"}, "makes its negatives of pictures and sound, which encoded clips have no more"),
        ({"data": "a.csv", "batch": 1}, "at least 2 in each"),
        ({"data": "a.csv", "buckets": "64x64:16:1:4,32x32:16:1:1"}, "at least 2 in each"),
        ({"data": "a.csv", "buckets": "64x64:1:1:4"}, "pictures have no negatives"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "index.json").write_text('{"format": "javis latents"}')
    with pytest.raises(UsageError, match=message):
        check_data(PriorRecipe(**change))
