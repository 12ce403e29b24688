"""Buckets: which clip goes where, how often, and in which size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from javis.data.buckets import Bucket, BucketPlan
from javis.data.manifest import ClipRow
from javis.errors import UsageError
from tests.data.rows import clip_row

OFFICIAL = {"240p": {1: (1.0, 16), 51: (1.0, 8), 102: (0.25, 4)}, "480p": {51: (0.5, 2)}}
TEXT = "240p:1:1:16, 240p:51:1:8, 240p:102:0.25:4, 480p:51:0.5:2"


def wide(identity: str, frames: int, height: int = 480, width: int = 854, fps: float = 24.0) -> ClipRow:
    return clip_row(identity, num_frames=frames, height=height, width=width, fps=fps)


def test_text_mapping_and_file_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(OFFICIAL))
    plans = [BucketPlan.parse(TEXT), BucketPlan.parse(OFFICIAL), BucketPlan.parse(str(tmp_path / "b.json"))]
    assert plans[0] == plans[1] == plans[2] == BucketPlan.parse(str(plans[0]))
    assert [(b.resolution, b.num_frames) for b in plans[0].buckets] == [
        ("480p", 51), ("240p", 102), ("240p", 51), ("240p", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "plan, named",
    [
        ("", "no bucket"), ("240p:51:1", "expected RESOLUTION"), ("241p:51:1:8", "unknown resolution"),
        ("240p:0:1:8", "frames must"), ("240p:51:1.5:8", "probability"), ("240p:51:nan:8", "probability"),
        ("240p:51:1:0", "batch"), ("240p:x:1:8", "unusable"), ("240p:51:1:8,240p:51:0.5:4", "two buckets"),
        ({"240p": {51: 8}}, "unusable"), ({"240p": {51: (1.0, 2.5)}}, "batch"), ([1], "unusable"),
        ("none.json", "cannot read"),
    ],
)  # fmt: skip
def test_unusable_plans_are_named(plan: object, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        BucketPlan.parse(plan)  # type: ignore[arg-type]


def test_shares_are_the_probabilities() -> None:
    plan, n = BucketPlan.parse(OFFICIAL), 4000
    rows = [wide(f"clip{i}", 150) for i in range(n)]
    counts = {str(bucket): len(places) for bucket, places in plan.partition(rows, seed=3).items()}
    # Half stay in 480p; of the others a quarter in 102 frames, and all the rest in 51.
    for name, share in (("480p:51:0.5:2", 1 / 2), ("240p:102:0.25:4", 1 / 8), ("240p:51:1:8", 3 / 8)):
        assert abs(counts[name] - share * n) < 4.5 * math.sqrt(share * (1 - share) * n), (name, counts)
    assert counts["240p:1:1:16"] == 0 and sum(counts.values()) == n


def test_a_clip_goes_where_it_fits() -> None:
    plan = BucketPlan.parse({"240p": {51: (1.0, 8), 102: (1.0, 4)}, "480p": {51: (1.0, 2)}})

    def place(row: ClipRow) -> tuple[str, int] | None:
        bucket = plan.assign(row, 0)
        return None if bucket is None else (bucket.resolution, bucket.num_frames)

    assert place(wide("a", 51)) == ("480p", 51)
    assert place(wide("a", 50)) is None
    assert place(wide("a", 1)) is None  # a picture
    assert place(wide("a", 102, 240, 426)) == ("240p", 102)
    assert place(wide("a", 101, 240, 426)) == ("240p", 51)
    assert place(wide("a", 51, 430, 764)) == ("480p", 51)  # 80 % of the pixels are enough
    assert place(wide("a", 51, 425, 756)) == ("240p", 51)  # 78 % are not
    assert place(wide("a", 51, 200, 300)) is None
    pictures = BucketPlan.parse("240p:1:1:16")
    assert pictures.assign(wide("a", 1), 0) is not None and pictures.assign(wide("a", 51), 0) is None


def test_frames_are_counted_at_the_frame_rate_of_the_plan() -> None:
    plan = BucketPlan.parse("240p:51:1:8", fps=24)
    assert plan.assign(wide("a", 60, fps=30.0), 0) is None  # 2 s: 48 frames at 24 fps
    assert plan.assign(wide("a", 64, fps=30.0), 0) is not None  # 51.2
    assert plan.assign(wide("a", 51, fps=24.0), 0) is not None


def test_the_draw_depends_on_seed_and_clip_alone() -> None:
    plan = BucketPlan.parse(OFFICIAL)
    rows = [wide(f"clip{i}", 150) for i in range(200)]
    first = [plan.assign(row, 1) for row in rows]
    assert first == [plan.assign(row, 1) for row in rows[::-1]][::-1]
    assert first != [plan.assign(row, 2) for row in rows]


def test_sizes_keep_the_ratio_of_the_clip() -> None:
    bucket = Bucket("240p", 51, 1.0, 8)
    assert bucket.size(wide("a", 51)) == (240, 426)
    assert bucket.size(wide("a", 51, 854, 480)) == (426, 240)
    assert bucket.size(wide("a", 51, 700, 700)) == (320, 320)
    assert Bucket("512", 51, 1.0, 8).size(wide("a", 51)) == (352, 704)  # 0.562 is nearest to 1:2 there
    assert Bucket("64x32", 51, 1.0, 8).size(wide("a", 51)) == (32, 64)
