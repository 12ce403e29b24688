"""Batches of stored latents: every clip once, the same after a resume, the same on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from javis import cli
from javis.data.encode import encode_manifest
from javis.data.encoders import Encoders
from javis.data.latent_source import LatentSource
from javis.data.manifest import Manifest
from javis.data.shards import write_shards
from javis.errors import UsageError
from tests.data.encoding import GOOD, PLAN, epoch, same
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def mixed(manifest: Manifest, demo: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of 8 frames and three of 4."""
    from javis.data.buckets import BucketPlan

    out = tmp_path_factory.mktemp("mixed") / "set"
    good = [row for row in manifest if row.id.startswith("clip")]
    rows = [dataclasses.replace(row, num_frames=8 if i < 5 else 7) for i, row in enumerate(good)]
    plan = dataclasses.replace(PLAN, buckets=BucketPlan.parse("32x32:8:1:2,32x32:4:1:2"), shard_clips=2)
    encode_manifest(Manifest(tuple(rows)), out, demo, plan, processes=1)
    return out


@pytest.mark.parametrize("shapes", [1, 2])
def test_every_clip_comes_once_in_an_epoch(latents: Path, mixed: Path, shapes: int) -> None:
    where = (latents, mixed)[shapes - 1]
    source = LatentSource(where, batch=1, seed=5)
    epochs = [[batch["ids"][0] for batch in epoch(source, GOOD)] for _ in range(3)]
    assert all(sorted(ids) == [f"clip{i}" for i in range(GOOD)] for ids in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert [b["ids"][0] for b in epoch(LatentSource(where, batch=1, seed=6), GOOD)] != epochs[0]


def test_a_batch_has_one_shape_and_the_last_is_filled(mixed: Path) -> None:
    source = LatentSource(mixed, batch=2, seed=5)
    batches = epoch(source, 5)  # 5 clips: 3 batches; 3 clips: 2
    assert source.state_dict()["epoch"] == 0 and source.next() and source.state_dict()["epoch"] == 1
    counts: dict[str, int] = {}
    for batch in batches:
        (frames,) = set(batch["frames"].tolist())
        assert batch["video"].shape[0] == 2 and frames in (4, 8)
        for name in batch["ids"]:
            counts[name] = counts.get(name, 0) + 1
            assert (int(name[-1]) < 5) == (frames == 8)
    assert sorted(counts) == [f"clip{i}" for i in range(GOOD)] and sum(counts.values()) == 10


@pytest.mark.parametrize("taken", [0, 1, 3, 7, 12])
def test_goes_on_exactly_where_it_was(mixed: Path, taken: int) -> None:
    source = LatentSource(mixed, batch=2, seed=1)
    epoch(source, taken)
    state = json.loads(json.dumps(source.state_dict()))
    wanted = epoch(source, 6)
    again = LatentSource(mixed, batch=2, seed=1)
    again.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(epoch(again, 6), wanted, strict=True))


def test_ranks_share_the_batch_of_one(mixed: Path) -> None:
    alone = LatentSource(mixed, batch=4, seed=2)
    ranks = [LatentSource(mixed, batch=2, seed=2, rank=rank, world=2) for rank in range(2)]
    for _ in range(7):
        one, parts = alone.next(), [source.next() for source in ranks]
        assert sorted(one["ids"]) == sorted(parts[0]["ids"] + parts[1]["ids"])
        assert one["ids"][::2] == parts[0]["ids"] and torch.equal(one["video"][1::2], parts[1]["video"])
    assert ranks[0].state_dict() == ranks[1].state_dict() == alone.state_dict()


def test_a_resume_on_other_ranks_goes_on_with_the_clips_that_follow(mixed: Path) -> None:
    alone = LatentSource(mixed, batch=1, seed=2)
    seen = [batch["ids"][0] for batch in epoch(alone, 3)]
    two = [LatentSource(mixed, batch=1, seed=2, rank=rank, world=2) for rank in range(2)]
    for source in two:
        source.load_state_dict(alone.state_dict())
    while two[0].state_dict()["epoch"] == 0:
        for source in two:
            batch = source.next()
            if source.epoch == 0:
                seen += batch["ids"]
    assert set(seen) == {f"clip{i}" for i in range(GOOD)} and len(seen) <= GOOD + 2


def test_states_of_something_else_are_refused(mixed: Path, latents: Path) -> None:
    state = LatentSource(mixed, batch=2, seed=1).state_dict()
    with pytest.raises(UsageError, match="state is of other data"):
        LatentSource(latents, batch=2, seed=1).load_state_dict(state)
    with pytest.raises(UsageError, match="state is of other seed"):
        LatentSource(mixed, batch=2, seed=2).load_state_dict(state)
    with pytest.raises(UsageError, match="rank 2 of 2"):
        LatentSource(mixed, batch=2, rank=2, world=2)


@pytest.mark.slow
def test_a_stage_trains_from_stored_latents(manifest: Manifest, tmp_path: Path) -> None:
    """`javis data encode`, then `javis train joint --data` on what it wrote: interrupted and not, the same weights."""
    checkpoint = write_tiny_checkpoint(tmp_path)  # 32x32 pixels at 16 fps
    manifest.write(tmp_path / "m.csv")
    encode = ["data", "encode", str(tmp_path / "m.csv"), str(tmp_path / "latents"), "--checkpoint", str(checkpoint)]
    assert cli.main([*encode, "--num-frames", "8", "--shard-clips", "3", "--processes", "1"]) == 0
    weights = []
    for out, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            assert cli.main(train(checkpoint, tmp_path / "latents", tmp_path / out, steps)) == 0
        weights.append((tmp_path / out / "checkpoint" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_stage_trains_from_shards(manifest: Manifest, tmp_path: Path) -> None:
    """From the tar files the same weights as from the files themselves."""
    checkpoint = write_tiny_checkpoint(tmp_path)
    good = Manifest(tuple(row for row in manifest if row.id.startswith("clip")))
    good.write(tmp_path / "m.csv")
    write_shards(good, tmp_path / "shards", shard_clips=3)
    weights = []
    for data in ("m.csv", "shards"):
        out = tmp_path / f"from_{data}"
        assert cli.main([*train(checkpoint, tmp_path / data, out, 2), "--feeder", "pyav"]) == 0
        weights.append((out / "checkpoint" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def train(checkpoint: Path, data: Path, out: Path, steps: int) -> list[str]:
    where = ["train", "joint", "--init", str(checkpoint), "--data", str(data), "--out", str(out), "--device", "cpu"]
    how = ["--seconds", "0.5", "--batch", "2", "--steps", str(steps), "--log-every", "1", "--save-every", "2"]
    return [*where, *how, "--schedule", "constant"]
