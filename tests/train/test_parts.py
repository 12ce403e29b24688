"""Parts of the training: latents on disk, batches, negatives, schedule, state on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from javis.errors import UsageError
from javis.flow import flow_losses
from javis.model import ops
from javis.model.dit import JavisDiT
from javis.model.prior import PriorEstimator
from javis.train import latents
from javis.train.checkpoint import Ema, flatten_optimizer, load_state, restore_optimizer, save_state
from javis.train.config import DemoTrainConfig, StageConfig
from javis.train.latents import LatentSet, build_latents, load_codecs, render_batch
from javis.train.ops import cpu_training_ops
from javis.train.prior_stage import make_negatives
from javis.train.stages import Batches, FlowModule, launch_flow_stage, learning_rate, validation_loss
from javis.world import caption, render_audio, render_video, sample_scene

from ..tiny import randomize, tiny_config

# -- latents -----------------------------------------------------------------------------------------------------------


def test_rendered_batches_are_the_world(config: DemoTrainConfig) -> None:
    video, audio, captions = render_batch([3, 900], config.world)
    assert video.shape == (2, 3, 32, 32, 32) and audio.shape == (2, 32000)
    for i, seed in enumerate((3, 900)):
        scene = sample_scene(seed, config.world, split="train")
        frames = ((video[i].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)
        assert np.array_equal(frames.numpy(), render_video(scene))
        assert np.array_equal(audio[i].numpy(), render_audio(scene))
        assert captions[i][0] == caption(scene)
        assert all(set(fewer.split()) <= set(captions[i][0].split()) for fewer in captions[i])
        assert len(captions[i]) == latents.CAPTION_VARIANTS


def test_stored_latents_are_encoded_clips(config: DemoTrainConfig) -> None:
    data = LatentSet.open(config.out / "train")
    video_codec, audio_codec = load_codecs(config.out / "codecs.safetensors")
    video, audio, captions = render_batch(list(range(6)), config.world)
    stored_video, stored_audio = data.batch(np.array([4, 1]))
    torch.testing.assert_close(stored_video, video_codec.encode(video)[[4, 1]], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored_audio, audio_codec.encode(audio)[[4, 1]], rtol=2e-3, atol=2e-3)
    assert data.captions == captions and len(data) == 6
    validation = LatentSet.open(config.out / "validation")
    assert len(validation) == 2 and validation.captions[0] != captions[0]


def build(config: DemoTrainConfig, clips: int = 6) -> LatentSet:
    codecs = load_codecs(config.out / "codecs.safetensors")
    return build_latents(config.out / "train", *codecs, config.world, clips=clips, seed=0, processes=1)


def unfinish(folder: Path) -> None:
    (folder / "captions.json").unlink()


def test_latents_resume_after_a_kill(config: DemoTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks 0:4 and 4:6 exist; the second one is lost. The first is not made again, the second as it was."""
    monkeypatch.setattr(latents, "CHUNK", 4)
    folder = config.out / "train"
    before = LatentSet.open(folder)
    expected = {"video": np.array(before.video), "audio": np.array(before.audio)}
    captions = before.captions
    del before
    unfinish(folder)
    (folder / "chunk_0000004.json").unlink()
    for name in expected:
        store = np.load(folder / f"{name}.npy", mmap_mode="r+")
        store[4:] = 0
        store[1] = 7  # a mark that would vanish if the finished chunk were made again
        expected[name][1] = 7
    after = build(config)
    assert np.array_equal(after.video, expected["video"]) and np.array_equal(after.audio, expected["audio"])
    assert after.captions == captions


def test_latents_of_another_size_are_made_anew_or_refused(
    config: DemoTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "CHUNK", 4)
    expected = np.array(LatentSet.open(config.out / "train").video)
    with pytest.raises(UsageError, match="choose another folder"):
        build(config, clips=5)
    unfinish(config.out / "train")  # killed during a run with 6 clips, begun again with 5
    assert np.array_equal(build(config, clips=5).video, expected[:5])


def test_a_finished_set_is_only_opened(config: DemoTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "render_batch", lambda *_: pytest.fail("rendered again"))
    assert len(build(config)) == 6


# -- batches -----------------------------------------------------------------------------------------------------------


def numbered(config: DemoTrainConfig, clips: int = 40) -> LatentSet:
    """Latents whose every value is the number of the clip, and as caption variants one word repeated 1 to 4 times."""
    number = np.arange(clips, dtype=np.float16)[:, None, None, None]
    words = config.text.vocabulary
    captions = [[" ".join([words[8 + i % 20]] * n) for n in (4, 3, 2, 1)] for i in range(clips)]
    video = np.broadcast_to(number[..., None], (clips, config.video_codec.coefficients, 2, 2, 2))
    return LatentSet(video, np.broadcast_to(number, (clips, config.audio_codec.coefficients, 4, 2)), captions)


def clip_numbers(batch: dict[str, Tensor]) -> list[int]:
    assert torch.equal(batch["video"][:, 0, 0, 0, 0], batch["audio"][:, 0, 0, 0])
    return [int(n) for n in batch["video"][:, 0, 0, 0, 0]]


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    config = tiny_config(tmp_path, batch=12, condition_dropout=0.3)
    prior = randomize(PriorEstimator(config.prior_model()), 0).eval()
    assert isinstance(prior, PriorEstimator)
    return Batches(numbered(config), config, prior)


def check_equal_batches(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_are_a_function_of_step_and_rank(batches: Batches) -> None:
    again = Batches(batches.data, batches.config, batches.prior)
    torch.manual_seed(99)
    first = [again.training_batch(step, 1, 2) for step in (9, 3)]
    torch.manual_seed(1)
    for step, expected in ((3, first[1]), (9, first[0])):
        check_equal_batches(batches.training_batch(step, 1, 2), expected)
    assert clip_numbers(first[0]) != clip_numbers(first[1])
    assert not torch.equal(first[0]["video_noise"], first[1]["video_noise"])


def test_shards_of_the_ranks_make_up_the_batch(batches: Batches) -> None:
    for step in range(3):
        whole = clip_numbers(batches.training_batch(step, 0, 1))
        for world in (2, 3):
            shards = [batches.training_batch(step, rank, world) for rank in range(world)]
            assert sorted(n for shard in shards for n in clip_numbers(shard)) == sorted(whole)
            assert [len(shard["t"]) for shard in shards] == [12 // world] * world
            assert not torch.equal(shards[0]["video_noise"], shards[1]["video_noise"])
            assert not torch.equal(shards[0]["t"], shards[1]["t"])


def test_batches_hold_the_captions_and_priors_of_their_clips(batches: Batches) -> None:
    lengths, dropped, clips = [], [], []
    for step in range(60):
        batch = batches.training_batch(step, 0, 1)
        clips += clip_numbers(batch)
        for i, number in enumerate(clip_numbers(batch)):
            word = batches.data.captions[number][0].split()[0]
            count = int(batch["text_mask"][i].sum())
            text, _ = batches.encoder([" ".join([word] * count)])
            assert torch.equal(batch["text"][i], text[0])
            lengths.append(count)
        dropped += batch["drop"].tolist()
    assert set(clips) == set(range(40))
    full = np.mean(np.array(lengths) == 4)
    assert abs(full - batches.config.caption_full) < 0.06 and {1, 2, 3} < set(lengths)
    assert abs(np.mean(dropped) - 0.3) < 0.06


def test_validation_batches_are_not_augmented(batches: Batches) -> None:
    batch = batches.make(np.arange(20), [5, 0], training=False)
    assert not batch["drop"].any() and (batch["text_mask"].sum(1) == 4).all() and "video_mask" not in batch
    check_equal_batches(batch, batches.make(np.arange(20), [5, 0], training=False))


# -- loss --------------------------------------------------------------------------------------------------------------


def test_dropped_samples_see_neither_caption_nor_priors(batches: Batches) -> None:
    model = randomize(JavisDiT(batches.config.model()), 1)
    assert isinstance(model, JavisDiT)
    batch = batches.training_batch(0, 0, 1)
    for joint in (True, False):
        module = FlowModule(model, batches.config, joint)

        def loss(module: FlowModule = module, **changes: Tensor) -> float:
            with torch.no_grad():
                return float(module(batch | changes)[0])

        everyone, nobody = torch.ones(12).bool(), torch.zeros(12).bool()
        for name in ("text", "spatial_prior", "temporal_prior"):
            other = {name: torch.randn_like(batch[name])}
            assert loss(drop=everyone) == loss(drop=everyone, **other)
            if joint or name == "text":
                assert loss(drop=nobody) != loss(drop=nobody, **other)
            else:  # the branches have no priors
                assert loss(drop=nobody) == loss(drop=nobody, **other)


def test_loss_is_the_mean_over_the_batch(batches: Batches) -> None:
    model = randomize(JavisDiT(batches.config.model()), 1)
    assert isinstance(model, JavisDiT)
    batch = batches.training_batch(0, 0, 1) | {"drop": torch.zeros(12).bool()}
    del batch["video_mask"], batch["audio_mask"]
    sizes = torch.full((12,), 32.0)
    with torch.no_grad():
        total, video, audio = FlowModule(model, batches.config, True)(batch)
        told = model.condition(
            batch["text"], text_mask=batch["text_mask"], fps=torch.full((12,), 16.0), height=sizes, width=sizes,
            video_sizes=(2, 2, 2), audio_sizes=(4, 2),
            spatial_prior=batch["spatial_prior"], temporal_prior=batch["temporal_prior"],
        )  # fmt: skip
        losses = flow_losses(
            lambda v, a, t, **_: model.denoise(v, a, t, told),
            batch["video"], batch["audio"], batch["t"],
            video_noise=batch["video_noise"], audio_noise=batch["audio_noise"],
        )  # fmt: skip
    for actual, expected in ((total, losses.total), (video, losses.video), (audio, losses.audio)):
        torch.testing.assert_close(actual, expected.mean())


def test_validation_uses_the_given_weights_and_puts_the_others_back(batches: Batches) -> None:
    model, other = (randomize(JavisDiT(batches.config.model()), seed) for seed in (1, 2))
    assert isinstance(model, JavisDiT) and isinstance(other, JavisDiT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = validation_loss(FlowModule(model, batches.config, True), batches, other.state_dict())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert value == validation_loss(FlowModule(other, batches.config, True), batches, other.state_dict())
    assert value[0] == pytest.approx(value[1] + value[2], rel=1e-5)
    assert value != validation_loss(FlowModule(model, batches.config, True), batches, before)


def test_attention_stays_in_float32_under_autocast() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g) for shape in ((2, 5, 8), (2, 2, 4, 4), (2, 2, 4, 4)))
    rounded = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = cpu_training_ops().prior_injection(*rounded)
    assert out.dtype == torch.float32
    assert torch.equal(out, ops.cross_attention(*(x.float() for x in rounded)))


# -- negatives ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), places=st.integers(4, 9), frames=st.integers(4, 20), bands=st.integers(4, 33))
def test_negatives_differ_and_hold_the_same_frames(seed: int, places: int, frames: int, bands: int) -> None:
    g = torch.Generator().manual_seed(0)
    video, audio = torch.randn(3, 2, frames, 5, places, generator=g), torch.randn(3, 2, bands, 4, generator=g)
    videos, audios = make_negatives(video, audio, np.random.default_rng(seed))
    assert videos.keys() == audios.keys() == {"spatial", "temporal"}

    def shift(negative: Tensor, positive: Tensor, axis: int) -> int:
        """The one circular shift along an axis that turns the positive into the negative."""
        found = [n for n in range(positive.shape[axis]) if torch.equal(positive.roll(n, axis), negative)]
        assert len(found) == 1
        return found[0]

    assert videos["spatial"].shape == videos["temporal"].shape == (3, 1, *video.shape[1:])
    sideways = shift(videos["spatial"][:, 0], video, 4)
    assert min(sideways, places - sideways) >= places // 4
    assert shift(videos["temporal"][:, 0], video, 2) != 0
    assert shift(audios["temporal"][:, 0], audio, 2) != 0
    assert shift(audios["spatial"][:, 0], audio, 0) != 0  # each clip has the sound of another


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_learning_rate_by_hand() -> None:
    stage = StageConfig(steps=100, learning_rate=2.0, warmup=10, decay=0.25)
    rates = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 74: 2.0, 75: 2.0, 80: 1.6, 99: 0.08, 100: 0.0, 120: 0.0}
    for step, rate in rates.items():
        assert learning_rate(step, stage) == pytest.approx(rate)
    assert learning_rate(99, StageConfig(steps=100, learning_rate=2.0, warmup=0, decay=0.0)) == 2


def test_learning_rate_begins_again_at_a_restart() -> None:
    twice = StageConfig(steps=250, learning_rate=2.0, warmup=10, decay=0.25, restarts=(100,))
    first = StageConfig(steps=100, learning_rate=2.0, warmup=10, decay=0.25)
    second = StageConfig(steps=150, learning_rate=2.0, warmup=10, decay=0.25)
    rates = [learning_rate(step, twice) for step in range(250)]
    assert rates == [learning_rate(s, first) for s in range(100)] + [learning_rate(s, second) for s in range(150)]


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 80), warmup=st.integers(0, 100), decay=st.floats(0, 1))
def test_learning_rate_stays_in_bounds(steps: int, warmup: int, decay: float) -> None:
    stage = StageConfig(steps=steps, learning_rate=1.0, warmup=warmup, decay=decay)
    rates = np.array([learning_rate(step, stage) for step in range(steps)])
    assert (rates > 0).all() and (rates <= 1).all()
    assert (np.diff(rates[: max(1, int(steps * (1 - decay)))]) >= -1e-12).all()  # rises, then stays ...
    cooling = np.arange(steps) >= max(warmup, steps * (1 - decay))
    assert (np.diff(rates[cooling]) <= 1e-12).all()  # ... and falls


# -- state on disk -----------------------------------------------------------------------------------------------------


def small_problem(seed: int) -> tuple[nn.Module, torch.optim.AdamW, list[str]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    return model, torch.optim.AdamW(groups, lr=0.05), ["0.weight", "1.weight", "0.bias", "1.bias"]


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_optimizer_goes_on_from_disk(tmp_path: Path) -> None:
    model, optimizer, names = small_problem(0)
    for seed in range(3):
        step_once(model, optimizer, seed)
    flat = flatten_optimizer(optimizer, names)
    assert set(flat) == {f"{n}/{key}" for n in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert flat["0.weight/exp_avg"].shape == (3, 4) and flat["1.bias/exp_avg"].shape == (2,)
    save_state(tmp_path, 3, {"model": model.state_dict(), "optimizer": flat}, {})
    other, restored, _ = small_problem(5)
    found = load_state(tmp_path)
    assert found is not None
    other.load_state_dict(found[1]["model"])
    restore_optimizer(restored, names, found[1]["optimizer"])
    for seed in range(3, 6):
        step_once(model, optimizer, seed)
        step_once(other, restored, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_survives_a_kill_while_writing(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"a": {"x|y": torch.full((2,), float(step))}, "b": {"z": torch.ones(1)}}, {"s": 0.5})
    assert sorted(p.name for p in tmp_path.glob("step*")) == [f"step_000000{n}.safetensors" for n in (2, 3)]
    (tmp_path / "step_0000004.safetensors.tmp").write_bytes(b"half")  # killed here, or ...
    (tmp_path / "step_0000004.safetensors").write_bytes(b"whole, but not yet pointed to")  # ... a moment later
    (tmp_path / "state.json.tmp").write_text('{"step": 4')
    found = load_state(tmp_path)
    assert found is not None
    assert found[0]["step"] == 3 and found[0]["s"] == 0.5
    assert found[1].keys() == {"a", "b"} and found[1]["a"]["x|y"].tolist() == [3, 3]
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3


def test_average_fades_the_start_fast_and_then_holds() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 8.0)
    ema = Ema(module, 0.3)
    value = 8.0
    for n, weight in enumerate((1.0, -2.0, 5.0, 5.0), start=1):
        nn.init.constant_(module.weight, weight)
        ema.update(module)
        decay = min(0.3, (1 + n) / (10 + n))
        value = decay * value + (1 - decay) * weight
        assert float(ema.shadow["weight"]) == pytest.approx(value, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = DemoTrainConfig(out=tmp_path, device="cuda")
    assert (config.flow_processes, DemoTrainConfig().flow_processes) == (1, 2)
    with pytest.raises(UsageError, match="torch sees no GPU"):
        launch_flow_stage("branches", config, None, None)
