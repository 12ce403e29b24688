"""Which clip comes when: complete, disjoint, the same on every rank, and independent of how the ranks are split."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from javis.data.buckets import BucketPlan
from javis.data.feed import FeedPlan
from javis.data.feed_order import EpochOrder
from javis.data.manifest import Manifest
from javis.errors import UsageError

from .media import row

PLAN = FeedPlan(num_frames=16, height=64, width=64, fps=16, batch=2)


def clips(count: int, **changes: object) -> Manifest:
    return Manifest(tuple(row(f"/x/{i}.mp4", f"/x/{i}.wav", i, **changes) for i in range(count)))


def epoch_of(manifest: Manifest, plan: FeedPlan, epoch: int) -> list[list[tuple[int, ...]]]:
    """Indices of every batch, by rank."""
    plans = [dataclasses.replace(plan, rank=rank) for rank in range(plan.world)]
    return [[spec.indices for spec in EpochOrder(manifest, p).batches(epoch)] for p in plans]


@given(count=st.integers(1, 60), world=st.integers(1, 4), batch=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_share_an_epoch(count: int, world: int, batch: int, epoch: int) -> None:
    plan = dataclasses.replace(PLAN, world=world, batch=batch)
    ranks = epoch_of(clips(count), plan, epoch)
    together = world * batch
    assert {len(batches) for batches in ranks} == {-(-count // together)}  # nobody waits for a batch that never comes
    assert all(len(indices) == batch for batches in ranks for indices in batches)
    seen = Counter(i for batches in ranks for indices in batches for i in indices)
    assert set(seen) == set(range(count))  # together complete
    extra = sum(seen.values()) - count  # the last batch is filled with clips seen before, as few as possible
    assert extra == -count % together
    if extra == 0:
        assert max(seen.values()) == 1  # disjoint


@given(count=st.integers(1, 40), world=st.integers(1, 3), batch=st.integers(1, 4))
def test_dropping_the_last_batch_shows_no_clip_twice(count: int, world: int, batch: int) -> None:
    plan = dataclasses.replace(PLAN, world=world, batch=batch, last="drop")
    if count < world * batch:
        with pytest.raises(UsageError, match="less than one batch of .* give a smaller batch, or last='fill'"):
            EpochOrder(clips(count), plan)
        return
    seen = [i for batches in epoch_of(clips(count), plan, 0) for indices in batches for i in indices]
    assert len(seen) == len(set(seen)) == count - count % (world * batch)


def test_a_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    manifest = clips(24)
    one = epoch_of(manifest, dataclasses.replace(PLAN, batch=4, world=1), 1)[0]
    two = epoch_of(manifest, dataclasses.replace(PLAN, batch=2, world=2), 1)
    assert [set(indices) for indices in one] == [set(a) | set(b) for a, b in zip(*two, strict=True)]
    orders = [EpochOrder(manifest, dataclasses.replace(PLAN, batch=4 // n, world=n)) for n in (1, 2, 4)]
    assert len({order.fingerprint() for order in orders}) == 1
    assert EpochOrder(manifest, PLAN).fingerprint() != orders[0].fingerprint()


def test_every_epoch_has_its_own_order_and_the_seed_decides_it() -> None:
    manifest = clips(40)
    first, second = epoch_of(manifest, PLAN, 0)[0], epoch_of(manifest, PLAN, 1)[0]
    assert first != second
    assert epoch_of(manifest, PLAN, 0)[0] == first
    assert epoch_of(manifest, dataclasses.replace(PLAN, seed=1), 0)[0] != first
    plain = dataclasses.replace(PLAN, shuffle=False)
    assert epoch_of(manifest, plain, 3)[0] == [(i, i + 1) for i in range(0, 40, 2)]


def test_the_excerpt_of_a_clip_begins_elsewhere_in_every_epoch() -> None:
    order = EpochOrder(clips(40), PLAN)
    starts = [[order.request(order.batches(e)[0], i).start for i in range(40)] for e in (0, 1)]
    assert starts[0] != starts[1]
    assert len(set(starts[0])) == 40 and all(0 <= s < 1 for s in starts[0])
    still = EpochOrder(clips(40), dataclasses.replace(PLAN, random_start=False))
    assert still.request(still.batches(0)[0], 3).start == 0


def test_a_batch_holds_one_bucket_in_its_size() -> None:
    large = {"height": 288, "width": 512, "resolution": 288 * 512}
    rows = [row(f"/{i}", f"/{i}.wav", i, **(large if i % 3 == 0 else {})) for i in range(31)]
    manifest = Manifest(tuple(rows))
    plan = dataclasses.replace(PLAN, buckets=BucketPlan.parse("144p:16:0.5:2,64x64:32:0.5:3,64x64:8:1:4"))
    shapes: set[tuple[int, ...]] = set()
    seen: set[int] = set()
    for spec in EpochOrder(manifest, plan).batches(0):
        shape = spec.group.shape
        shapes.add(tuple(shape))
        seen |= set(spec.indices)
        assert len(spec.indices) == shape.batch
        for index in spec.indices:
            if shape.height == 64:
                continue
            assert rows[index].height == 288  # small clips are never enlarged to 144p
        request = EpochOrder(manifest, plan).request(spec, spec.indices[0])
        assert (request.num_frames, request.height, request.width) == shape[:3]
    assert shapes == {(16, 144, 256, 2), (32, 64, 64, 3), (8, 64, 64, 4)}
    assert seen == set(range(31))
    other = EpochOrder(manifest, plan).batches(1)
    first = {i: spec.group.shape for spec in EpochOrder(manifest, plan).batches(0) for i in spec.indices}
    second = {i: spec.group.shape for spec in other for i in spec.indices}
    assert first != second  # another draw of the buckets


def test_buckets_of_another_rate_are_refused() -> None:
    plan = dataclasses.replace(PLAN, buckets=BucketPlan.parse("64x64:8:1:4", fps=24))
    with pytest.raises(UsageError, match="buckets are for 24 fps and the feed plan for 16"):
        EpochOrder(clips(4), plan)


def test_clips_that_cannot_fit_are_left_out_and_named() -> None:
    short, silent = row("/short.mp4", "/a.wav", num_frames=12), row("/silent.mp4", "", audio_fps=0)
    manifest = Manifest((short, *clips(4), silent))
    order = EpochOrder(manifest, PLAN)
    assert [(clip.path, clip.index) for clip in order.left_out] == [("/short.mp4", 0), ("/silent.mp4", 5)]
    assert order.left_out[0].reason == "lasts 0.75 s, and 1 s are wanted"
    assert {i for spec in order.batches(0) for i in spec.indices} == {1, 2, 3, 4}
    with pytest.raises(UsageError, match="no clip fits the feed plan; the first one, /short.mp4, lasts 0.75 s"):
        EpochOrder(Manifest((short,)), PLAN)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, "batch of a feed plan must be at least 1"),
        ({"fps": float("nan")}, "fps of a feed plan must be above 0"),
        ({"rank": 2, "world": 2}, "rank 2 of a feed plan must be within 0..1"),
        ({"timeout": 0}, "timeout of a feed plan must be positive"),
    ],
)
def test_unusable_plans_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(PLAN, **change)  # type: ignore[arg-type]
