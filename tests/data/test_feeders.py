"""Both feeders: the same record from the same files, in the same order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from javis.data.manifest import Manifest
from javis.data.shards import ShardedManifest, write_shards
from javis.errors import UsageError
from javis.model.mel import fixed_length_log_mel
from javis.world import WorldConfig, render_audio, render_video, sample_scene
from javis.world.make import encode_vp9

from .feeding import BACKENDS, CLIPS, MEL_ATOL, SEED, assert_same, feeder, needs_dali, psnr
from .media import frames_by_number, number_of, ramp, regular, row, world_rows, write_video, write_wav


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batch_is_what_was_rendered(world: Path, backend: str) -> None:
    with feeder(world_rows(world, CLIPS), backend, num_frames=32, workers=1) as feed:
        batches = list(feed)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(CLIPS))
    for batch in batches:
        assert (batch.video.shape, batch.video.dtype) == ((2, 32, 64, 64, 3), torch.uint8)
        assert (batch.waveform.shape, batch.waveform.dtype) == ((2, 32000), torch.float32)
        assert (batch.mel.shape, batch.mel.dtype) == ((2, 1, 224, 64), torch.float32)  # 2 s, rounded up to 32 frames
        assert batch.fps.tolist() == [16, 16]
        assert batch.captions == [f"caption {i}" for i in batch.indices]
        for n, index in enumerate(batch.indices):
            scene = sample_scene(SEED * 1_000_000 + index)
            sound = render_audio(scene)
            assert batch.waveform[n].numpy() == pytest.approx(sound, abs=1 / 32768)
            assert psnr(batch.video[n].numpy(), render_video(scene)) > 32  # the loss of VP9's halved chroma
            expected = fixed_length_log_mel(batch.waveform[n], 2.0)
            assert (batch.mel[n] - expected).abs().max() <= MEL_ATOL


@needs_dali
def test_both_feeders_give_the_same_batches(world: Path) -> None:
    manifest = world_rows(world, CLIPS)
    made = {}
    for backend in ("pyav", "dali"):
        with feeder(manifest, backend) as feed:
            made[backend] = [*feed, *feed]  # two epochs, excerpts from other places
    for ours, theirs in zip(made["pyav"], made["dali"], strict=True):
        assert ours.indices == theirs.indices and ours.ids == theirs.ids and ours.captions == theirs.captions
        assert torch.equal(ours.waveform, theirs.waveform)
        assert (ours.mel - theirs.mel).abs().max() <= MEL_ATOL
        assert torch.equal(ours.video, theirs.video)  # the same libvpx, the same conversion, nothing scaled


@needs_dali
@pytest.mark.parametrize("size", [(48, 48), (40, 72), (64, 64), (96, 100)])
def test_both_feeders_scale_and_cut_alike(tmp_path: Path, size: tuple[int, int]) -> None:
    video = np.concatenate([render_video(sample_scene(seed, WorldConfig(size=64))) for seed in (1, 2)], axis=2)[
        :, :, :90
    ]
    (tmp_path / "v.mp4").write_bytes(encode_vp9(video, 16))
    write_wav(tmp_path / "a.wav", ramp(2, 48000) * 5, 48000)
    manifest = Manifest((row(tmp_path / "v.mp4", tmp_path / "a.wav"),))
    got = {}
    for backend in ("pyav", "dali"):
        with feeder(manifest, backend, height=size[0], width=size[1], batch=1, num_frames=12, fps=12) as feed:
            got[backend] = next(feed)
    frames = {name: batch.video[0].numpy() for name, batch in got.items()}
    assert psnr(frames["pyav"], frames["dali"]) > 40
    first = round(float(got["pyav"].waveform[0, 4000]) / 5 * 20 * 16 - 4)  # the sound says where the excerpt begins
    numbers = first + np.floor(np.arange(12) * 16 / 12 + 1e-6).astype(int)
    scale = max(size[0] / 64, size[1] / 90)
    scaled = [max(size[0], round(64 * scale)), max(size[1], round(90 * scale))]
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(video[numbers]).permute(0, 3, 1, 2).float(), scaled, mode="bilinear", antialias=True
    )
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    truth = truth[:, :, top : top + size[0], left : left + size[1]].permute(0, 2, 3, 1).numpy()
    for name, got_frames in frames.items():
        assert psnr(got_frames, truth) > 31, name
    apart = got["pyav"].waveform - got["dali"].waveform
    assert apart[:, 400:-400].abs().max() < 1e-3  # two resamplers; the ends of a file ring


@needs_dali
@pytest.mark.parametrize("size", [64, 40])
def test_both_feeders_know_the_colours_of_bt709(tmp_path: Path, size: int) -> None:
    """DALI reads every video as BT.601, which turns red into another red."""
    frames = render_video(sample_scene(3_000_000))
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True
    )
    sound = write_wav(tmp_path / "a.wav", ramp(2, 16000), 16000)
    found = {}
    for matrix in (1, 2):
        video = write_video(tmp_path / f"{matrix}.mp4", frames, regular(32, 16), matrix=matrix)
        for backend in ("pyav", "dali"):
            manifest = Manifest((row(video, sound),))
            with feeder(manifest, backend, num_frames=32, batch=1, height=size, width=size) as feed:
                found[backend, matrix] = next(feed).video[0].numpy()
    for backend in ("pyav", "dali"):
        errors = [psnr(found[backend, matrix], truth.permute(0, 2, 3, 1).numpy()) for matrix in (1, 2)]
        assert min(errors) > 34 and abs(errors[0] - errors[1]) < 1, backend
    assert psnr(found["pyav", 1], found["dali", 1]) > 42


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_shards_give_the_batches_of_the_files_in_them(world: Path, tmp_path: Path, backend: str, prefix: str) -> None:
    manifest = world_rows(world, CLIPS)
    write_shards(manifest, tmp_path, shard_clips=4)
    shards = ShardedManifest.open(f"{prefix}{tmp_path}")
    with feeder(manifest, backend) as files, feeder(shards, backend) as tars:
        for expected, got in zip(files, tars, strict=True):
            assert_same(got, expected)
        assert not tars.skipped


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_in_the_middle_of_an_epoch(world: Path, backend: str) -> None:
    manifest = world_rows(world, CLIPS)
    with feeder(manifest, backend, batch=1) as feed:
        whole = [next(feed) for _ in range(CLIPS)]
        whole += list(iter(feed))
    for stop in (0, 2, CLIPS - 1, CLIPS):
        with feeder(manifest, backend, batch=1) as feed:
            for expected in whole[:stop]:
                assert_same(next(feed), expected)
            state = json.loads(json.dumps(feed.state_dict()))  # while batches made ahead are in flight
        with feeder(manifest, backend, batch=1) as feed:
            next(feed)  # another position, with batches in flight
            feed.load_state_dict(state)
            rest = list(feed) if stop < CLIPS else []
            rest += list(feed)
        assert len(rest) == 2 * CLIPS - stop
        for got, expected in zip(rest, whole[stop:], strict=True):
            assert_same(got, expected)


def test_a_state_of_other_data_is_refused(world: Path) -> None:
    manifest = world_rows(world, CLIPS)
    with feeder(manifest, "pyav") as feed:
        state = feed.state_dict()
        for other in (feeder(manifest, "pyav", seed=5), feeder(world_rows(world, 4), "pyav")):
            with other, pytest.raises(UsageError, match="of another manifest or plan"):
                other.load_state_dict(state)
        with pytest.raises(UsageError, match="no state of a feeder"):
            feed.load_state_dict({"epoch": 3})
        with feeder(manifest, "pyav", batch=1, world=2, rank=1) as half:
            half.load_state_dict(state)  # the same global batch on two ranks


@pytest.fixture
def mixed(world: Path, tmp_path: Path) -> Manifest:
    """A world clip and one in H.264."""
    h264 = write_video(tmp_path / "h264.mp4", frames_by_number(32, 64, 64), regular(32, 16), "libx264")
    sound = write_wav(tmp_path / "a.wav", ramp(2, 16000), 16000)
    return Manifest((*world_rows(world, 1).rows, row(h264, sound, 1)))


@needs_dali
def test_dali_by_name_refuses_what_it_cannot_decode_and_auto_takes_pyav(mixed: Manifest) -> None:
    with (
        feeder(mixed, "dali") as feed,
        pytest.raises(UsageError, match=r"h264.mp4 is h264, and DALI's CPU mode decodes mjpeg, vp8, vp9; use backend"),
    ):
        next(feed)
    with feeder(mixed, "auto") as auto, feeder(mixed, "pyav") as pyav:
        assert type(auto).__name__ == "DaliFeeder"
        got, expected = next(auto), next(pyav)
        assert got.indices == expected.indices and torch.equal(got.waveform, expected.waveform)
        assert torch.equal(got.video, expected.video)
        assert not auto.skipped
        number = got.indices.index(1)
        assert (np.diff(number_of(got.video[number].numpy())) == 1).all()


@needs_dali
def test_dali_by_name_refuses_other_sound_and_auto_decodes_it(world: Path, tmp_path: Path) -> None:
    import av

    samples = (ramp(2, 16000) * 32767).astype(np.int16)
    with av.open(str(tmp_path / "a.mka"), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clips = world_rows(world, 2)
    manifest = Manifest((dataclasses.replace(clips[0], audio_path=str(tmp_path / "a.mka")), clips[1]))
    with feeder(manifest, "dali") as feed, pytest.raises(UsageError, match="it takes wav, flac and ogg files"):
        next(feed)
    with feeder(manifest, "auto", num_frames=32) as auto, feeder(manifest, "pyav", num_frames=32) as pyav:
        got, expected = next(auto), next(pyav)
    assert torch.equal(got.waveform, expected.waveform) and torch.equal(got.video, expected.video)
    assert (got.waveform[got.indices.index(0)].numpy() == samples / np.float32(32768)).all()
    assert (got.mel - expected.mel).abs().max() <= MEL_ATOL


def test_unknown_and_missing_backends_are_said(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = world_rows(world, 2)
    with pytest.raises(UsageError, match="no feeder 'decord'; expected auto, dali or pyav"):
        feeder(manifest, "decord")
    from javis.data import dali_pipeline, feeders

    def missing() -> None:
        raise UsageError("DALI is not there")

    monkeypatch.setattr(dali_pipeline, "require_dali", missing)
    monkeypatch.setattr("javis.data.dali_feeder.require_dali", missing)
    with pytest.raises(UsageError, match="DALI is not there"):
        feeder(manifest, "dali")
    monkeypatch.setattr(feeders, "has_dali", lambda: False)
    with feeder(manifest, "auto") as auto:
        assert type(auto).__name__ == "PyAVFeeder"


def test_ranks_see_different_clips_and_as_many_batches(world: Path) -> None:
    manifest = world_rows(world, CLIPS)
    ranks = []
    for rank in (0, 1):
        with feeder(manifest, "pyav", world=2, rank=rank, batch=1) as feed:
            ranks.append([i for batch in feed for i in batch.indices])
    assert len(ranks[0]) == len(ranks[1]) == 3
    assert set(ranks[0]) | set(ranks[1]) == set(range(CLIPS))


@needs_dali
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx264"])
def test_dali_on_a_gpu_gives_what_pyav_gives(tmp_path: Path, codec: str) -> None:
    frames = frames_by_number(40, 256, 256)
    frames[:, ::2, :, 0] //= 2  # stripes of another hue, of the same number on average
    frames[:, 1::2, :, 0] += frames[:, ::2, :, 0]
    video = write_video(tmp_path / "v.mp4", frames, regular(40, 16), codec, matrix=1)
    sound = write_wav(tmp_path / "a.wav", ramp(2.5, 16000), 16000)
    manifest = Manifest((row(video, sound, num_frames=40, height=256, width=256),))
    for size in (256, 128):
        with (
            feeder(manifest, "dali", batch=1, device="cuda", height=size, width=size) as gpu,
            feeder(manifest, "pyav", batch=1, height=size, width=size) as cpu,
        ):
            got, expected = next(gpu), next(cpu)
            assert got.video.is_cuda and got.waveform.is_cuda and got.mel.is_cuda
            numbers = number_of(got.video[0].cpu().numpy())
            assert (numbers == number_of(expected.video[0].numpy())).all()
            assert psnr(got.video[0].cpu().numpy(), expected.video[0].numpy()) > 35
            assert torch.equal(got.waveform.cpu(), expected.waveform)
            assert (got.mel.cpu() - expected.mel).abs().max() <= MEL_ATOL
