"""Precomputed latents: what is stored, what a kill or a damaged disk leaves, and the batches that are read."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from javis import cli
from javis.data.encode import encode_manifest, plan_jobs
from javis.data.encoders import Encoders, load_encoders
from javis.data.latent_source import LatentSource
from javis.data.manifest import Manifest
from javis.data.shards import write_shards
from javis.errors import FailedError, UsageError
from javis.world import WorldConfig, render_audio, render_video, sample_scene
from javis.world.make import make as make_world
from tests.data.encoding import GOOD, PLAN, content, epoch, same
from tests.data.media_files import pictures
from tests.data.rows import clip_row

# -- what is stored ---------------------------------------------------------------------------------------------------


def test_stored_is_what_the_encoders_give(manifest: Manifest, latents: Path, demo: Encoders) -> None:
    source = LatentSource(latents, batch=1)
    rows = {row.id: (index, row) for index, row in enumerate(manifest)}
    seen = set()
    for batch in epoch(source, GOOD):
        (identity,) = batch["ids"]
        seen.add(identity)
        number = int(identity.removeprefix("clip"))
        # The written frames are smooth in luma, so the file holds them to within a few grey levels.
        video = torch.from_numpy(pictures(8, number))[None].permute(0, 4, 1, 2, 3) / 127.5 - 1
        with torch.no_grad():
            wave = torch.from_numpy(soundfile.read(rows[identity][1].audio_path, dtype="float32")[0])
            exact = demo.video_codec.encode(video), demo.audio_codec.encode(wave[None])
        assert torch.allclose(batch["audio"], exact[1], atol=2e-3, rtol=2**-11)  # float16 has 11 bits
        correlation = torch.corrcoef(torch.stack((batch["video"].flatten(), exact[0].flatten())))[0, 1]
        assert batch["video"].shape == exact[0].shape and correlation > 0.9
        text, mask = demo.text_encoder([rows[identity][1].text.lower()])
        assert torch.equal(batch["text_mask"], mask) and torch.allclose(batch["text"], text, atol=5e-4)
        assert batch["prior_text"] is batch["text"]
        assert batch["captions"] == [rows[identity][1].text.lower()]
        assert [float(batch[n]) for n in ("fps", "frames", "height", "width")] == [16, 8, 32, 32]
    assert seen == {f"clip{i}" for i in range(GOOD)}


@pytest.mark.slow
def test_world_clips_keep_picture_and_sound(tmp_path: Path, demo: Encoders) -> None:
    """From `javis world make` to latents that decode to what the scene is, through every command."""
    folder, seed = tmp_path / "world", 3
    make_world(folder, 3, seed, WorldConfig())
    assert cli.main(["data", "make", str(folder)]) == 0
    clips, out = str(folder / "clips.csv"), str(tmp_path / "latents")
    assert cli.main(["data", "encode", clips, out, "--shard-clips", "2", "--processes", "1"]) == 0
    source = LatentSource(out, batch=1)
    for batch in epoch(source, 3):
        scene = sample_scene(seed * 1_000_000 + int(batch["ids"][0][-1]), WorldConfig())
        with torch.no_grad():
            frames = demo.video_codec.decode(batch["video"], 32)[0].permute(1, 2, 3, 0).numpy()
        truth = render_video(scene).astype(np.float32) / 127.5 - 1
        psnr = 10 * np.log10(4 / np.square(frames - truth).mean())
        assert psnr > 24, psnr
        with torch.no_grad():
            heard = demo.audio_codec.encode(torch.from_numpy(render_audio(scene))[None])
        assert float((batch["audio"] - heard).abs().mean()) < 0.1 * float(heard.abs().mean())


def test_the_same_call_makes_the_same_bytes(manifest: Manifest, latents: Path, demo: Encoders, tmp_path: Path) -> None:
    encode_manifest(manifest, tmp_path / "again", demo, PLAN, processes=2)
    assert content(tmp_path / "again") == content(latents)


def test_shards_as_input_give_the_same_latents(
    manifest: Manifest, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Manifest(tuple(row for row in manifest if row.id != "broken"))
    write_shards(good, tmp_path / "shards")
    arguments = ["data", "encode", str(tmp_path / "shards"), str(tmp_path / "out"), "--num-frames", "8", "--json"]
    # The size of the built-in checkpoint is its own; a bucket gives another.
    assert cli.main([*arguments, "--buckets", "32x32:8:1:4", "--batch", "2", "--processes", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"] == GOOD and [clip["id"] for clip in told["skipped"]] == ["unknown"]
    by_id = {}
    for where in (latents, tmp_path / "out"):
        for batch in epoch(LatentSource(where, batch=1), GOOD):
            by_id.setdefault(batch["ids"][0], []).append(batch)
    for one, other in by_id.values():
        # Batches are put together differently, so the last bits of the products may differ.
        assert torch.allclose(one["video"], other["video"], atol=2e-3) and one["captions"] == other["captions"]
        assert torch.allclose(one["audio"], other["audio"], atol=2e-3)


@pytest.mark.slow
def test_a_full_size_checkpoint(manifest: Manifest, tmp_path: Path) -> None:
    """Both text encoders and the autoencoders, at toy size, through the same protocols."""
    from javis import JavisPipeline

    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    pipe.save_pretrained(tmp_path / "checkpoint")
    encoders = load_encoders(str(tmp_path / "checkpoint"), device="cpu")
    few = Manifest(tuple(row for row in manifest if row.id in ("clip0", "clip6")))
    plan = dataclasses.replace(PLAN, batch=2, dtype="float32")
    encode_manifest(few, tmp_path / "out", encoders, plan, processes=1)
    batch = LatentSource(tmp_path / "out", batch=2).next()
    captions = batch["captions"]
    assert not any("aesthetic" in caption for caption in captions)
    text, mask = pipe.encode_text(captions)
    told, told_mask = pipe.encode_text(captions, for_prior=True)
    assert torch.equal(batch["text_mask"], mask) and not bool(mask.all())
    assert torch.allclose(batch["text"][mask], text[mask], atol=1e-5) and not batch["text"][~mask].any()
    assert torch.allclose(batch["prior_text"], told, atol=1e-5) and torch.equal(batch["prior_text_mask"], told_mask)
    paths = {row.id: row.audio_path for row in few}
    waves = torch.stack([torch.from_numpy(soundfile.read(paths[name], dtype="float32")[0]) for name in batch["ids"]])
    assert torch.allclose(batch["audio"], pipe.audio_codec.encode(waves), atol=1e-4)
    assert batch["video"].shape[2:] == pipe.video_codec.latent_sizes(8, 32, 32)
    # What the mask hides does not reach the model: the trimmed hidden states condition it as the whole ones do.
    outs = []
    for hidden in (batch["text"], text):
        size = torch.full((2,), 32.0)
        with torch.no_grad():
            outs.append(pipe.model(
                batch["video"], batch["audio"], torch.full((2,), 500.0), text=hidden, text_mask=mask,
                fps=batch["fps"], height=size, width=size,
                spatial_prior=torch.zeros(2, 4, 16), temporal_prior=torch.zeros(2, 4, 16),
            ))  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*outs, strict=True))


# -- nothing lost -----------------------------------------------------------------------------------------------------

_CHILD = """
import sys, time
import torch; torch.set_num_threads(1)
from javis.data import encode as e
from javis.data.encoders import load_encoders
from javis.data.manifest import Manifest
slow = e._ShardBuilder._encode
def _encode(self):
    time.sleep(0.05)
    slow(self)
e._ShardBuilder._encode = _encode
if __name__ == '__main__':
    manifest, demo = Manifest.read(sys.argv[1]), load_encoders("demo")
    plan = e.EncodePlan(num_frames=8, height=32, width=32, fps=16, batch=2, shard_clips=3)
    print("go", flush=True)
    e.encode_manifest(manifest, sys.argv[2], demo, plan, processes=1)
"""


@pytest.mark.slow
def test_killed_at_any_moment(manifest: Manifest, latents: Path, demo: Encoders, tmp_path: Path) -> None:
    manifest.write(tmp_path / "m.csv")
    script, out = tmp_path / "child.py", tmp_path / "killed"
    script.write_text(_CHILD)
    whole, partial = content(latents), 0
    for delay in (0.2, 0.5, 0.7):
        child = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "m.csv"), str(out)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        there = {name: digest for name, digest in content(out).items() if name.startswith(("latents", "index"))}
        assert all(whole[name] == digest for name, digest in there.items())
        partial += 0 < len(there) < 9
    with_index = (out / "index.json").exists()
    done = encode_manifest(manifest, out, demo, PLAN, processes=1)
    assert not done.damaged and content(out) == whole, "the same files, and none left over"
    assert with_index or done.written > 0


def test_a_damaged_shard_is_named_and_encoded_again(
    manifest: Manifest, latents: Path, demo: Encoders, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    encode_manifest(manifest, out, demo, PLAN, processes=1)
    path = out / "latents-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # one bit of a latent, which nothing but the digest shows
    path.write_bytes(data)
    with pytest.raises(FailedError, match=r"latents-000001\.safetensors is damaged"):
        epoch(LatentSource(out, batch=1), GOOD)
    path = out / "latents-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    (out / "latents-000003.safetensors").unlink()
    source = LatentSource(out, batch=1)
    with pytest.raises(
        FailedError, match=r"latents-00000[123]\.safetensors is damaged or missing; 'javis data encode'"
    ):
        epoch(source, GOOD)
    before = source.state_dict()
    with pytest.raises(FailedError):
        source.next()
    assert source.state_dict() == before, "a failed batch is not taken"
    done = encode_manifest(manifest, out, demo, PLAN, processes=1)
    assert done.damaged == tuple(f"latents-{number:06d}" for number in (1, 2, 3)) and done.written == 3
    assert content(out) == content(latents)
    source.next()
    path = out / "latents-000000.json"  # a caption is as good as a latent
    path.write_text(path.read_text().replace("red", "blue"))
    with pytest.raises(UsageError, match=r"latents-000000\.json is damaged"):
        LatentSource(out, batch=1)


def test_other_clips_sizes_and_encoders_do_not_mix(
    manifest: Manifest, latents: Path, demo: Encoders, tmp_path: Path
) -> None:
    other = dataclasses.replace(demo, identity="other")
    for rows, encoders, plan, named in (
        (manifest[1:], demo, PLAN, "clips"),
        (manifest, other, PLAN, "encoders"),
        (manifest, demo, dataclasses.replace(PLAN, num_frames=4), "settings"),
    ):
        with pytest.raises(UsageError, match=f"latents of other {named}"):
            encode_manifest(rows, latents, encoders, plan, processes=1)
    # The same clips at another place are the same clips.
    moved = Manifest(tuple(dataclasses.replace(row, path="/elsewhere/" + row.relpath) for row in manifest))
    assert encode_manifest(moved, latents, demo, PLAN, processes=1).written == 0


def test_values_that_do_not_fit_are_refused(manifest: Manifest, demo: Encoders, tmp_path: Path) -> None:
    class Loud:
        def encode(self, audio: torch.Tensor) -> torch.Tensor:
            return torch.full((len(audio), 1, 2, 2), 1e6)

    loud = dataclasses.replace(demo, audio_codec=Loud())  # type: ignore[arg-type]
    with pytest.raises(FailedError, match="audio latents of clip0 are not finite in float16; use --dtype bfloat16"):
        encode_manifest(manifest[:1], tmp_path / "a", loud, PLAN, processes=1)
    assert encode_manifest(
        manifest[:1], tmp_path / "b", loud, dataclasses.replace(PLAN, dtype="bfloat16"), processes=1
    ).clips == 1  # fmt: skip
    with pytest.raises(FailedError, match="none of 1 clips could be encoded; the first: BadClip"):
        encode_manifest(manifest[1:2], tmp_path / "c", demo, PLAN, processes=1)


def test_shares_of_the_work(manifest: Manifest, latents: Path, demo: Encoders, tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = encode_manifest(manifest, out, demo, PLAN, share=1, shares=2, processes=1)
    assert (first.shards, first.is_finished) == (2, False)
    with pytest.raises(UsageError, match="no finished latents"):
        LatentSource(out, batch=1)
    assert encode_manifest(manifest, out, demo, PLAN, share=0, shares=2, processes=1).is_finished
    assert content(out) == content(latents)


def test_any_fsspec_url(manifest: Manifest, latents: Path, demo: Encoders, tmp_path: Path) -> None:
    import fsspec

    try:
        encode_manifest(manifest, "memory://set", demo, PLAN, processes=1)
        away, here = LatentSource("memory://set", batch=2, cache=tmp_path), LatentSource(latents, batch=2)
        assert all(same(a, b) for a, b in zip(epoch(away, 4), epoch(here, 4), strict=True))
        assert len(list(tmp_path.glob("*.safetensors"))) == 4
    finally:
        fsspec.filesystem("memory").store.clear()


def test_plans_by_bucket() -> None:
    from javis.data.buckets import BucketPlan

    rows = [clip_row(f"c{i}", num_frames=n, height=s, width=s) for i, (n, s) in enumerate(
        [(32, 64), (16, 64), (32, 32), (8, 64), (40, 64), (32, 16)])]  # fmt: skip
    plan = dataclasses.replace(PLAN, buckets=BucketPlan.parse("64x64:32:1:2,64x64:16:1:2,32x32:16:1:4"), shard_clips=1)
    jobs, without = plan_jobs(Manifest(tuple(rows)), plan)
    assert without == 2
    assert [(job.shape, job.indices) for job in jobs] == [
        ((16, 32, 32), (2,)), ((16, 64, 64), (1,)), ((32, 64, 64), (0,)), ((32, 64, 64), (4,)),
    ]  # fmt: skip
