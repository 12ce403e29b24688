"""The quality gate: the built-in checkpoint holds what is recorded of it, and what is broken does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from javis import JavisPipeline
from javis.cli import main
from javis.errors import UsageError
from javis.eval import gate
from javis.eval.gate import Recorded, Row, Verdict, judge, make_clips, measure_rows
from javis.eval.world_report import Clip

BROKEN = 16  # clips that are damaged: enough to see a broken model


def missed(verdicts: list[Verdict]) -> set[str]:
    return {verdict.name for verdict in verdicts if not verdict.held}


# --- arithmetic -------------------------------------------------------------------------------------------------------


def rows(right: list[float], offset: float = 5.0) -> list[Row]:
    """Clips with four events on each side, of which the given share matches; nine of ten attributes are right."""
    return [Row((8.0 * share, 8.0), (4 * share * offset, 4.0 * share), (9.0, 10.0)) for share in right]


def test_the_same_clips_are_held_and_differ_by_nothing() -> None:
    recorded = rows([1.0, 0.75, 0.5, 1.0] * 8)
    verdicts = judge(recorded, recorded)
    assert [v.name for v in verdicts] == ["f1", "offset_ms", "accuracy"]
    assert not missed(verdicts) and not any(v.better for v in verdicts)
    assert verdicts[0].value == pytest.approx(13 / 16) and verdicts[0].difference == (0.0, 0.0, 0.0)
    # All clips have nine of ten: the bootstrap interval has no width, and is widened to what matters.
    assert (verdicts[2].low, verdicts[2].high) == pytest.approx((0.89, 0.91))


def test_a_loss_within_the_interval_is_seen_on_the_same_clips() -> None:
    """F1 falls by 0.03 where the interval reaches 0.1 down: eight clips of 32 lost an event each, and none won one."""
    recorded = rows([1.0, 0.25, 0.5, 1.0] * 8)
    worse = [replace(row, f1=(row.f1[0] - 1.0, 8.0)) if i % 4 == 0 else row for i, row in enumerate(recorded)]
    verdict = judge(recorded, worse)[0]
    assert verdict.value is not None and verdict.value > verdict.low and not verdict.held
    mixed = [replace(row, f1=(row.f1[0] + (-1.0) ** i, 8.0)) for i, row in enumerate(recorded)]
    assert judge(recorded, mixed)[0].held


def test_better_is_held_and_said_to_be() -> None:
    recorded = rows([0.5, 0.75] * 16, offset=12.0)
    verdicts = judge(recorded, rows([1.0, 1.0] * 16, offset=2.0))
    assert not missed(verdicts) and [v.better for v in verdicts] == [True, True, False]
    assert "record it" in verdicts[0].line()
    assert missed(judge(rows([1.0, 1.0] * 16, offset=2.0), recorded)) == {"f1", "offset_ms"}


def test_nothing_matched_is_missed_and_not_skipped() -> None:
    verdict = judge(rows([1.0] * 8), rows([0.0] * 8))[1]
    assert verdict.value is None and not verdict.held and "undefined" in verdict.line()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "nothing is recorded"),
        ("{", "not a recording"),
        ("[]", "not a recording"),
        ('{"kind": "eval_world", "format": 1}', "eval_world"),
        ('{"kind": "eval_gate", "format": 1, "clips": []}', "no clip"),
        ('{"kind": "eval_gate", "format": 1, "clips": [{"caption": "a red ball bounces", "seed": 1}]}', "KeyError"),
        (
            '{"kind": "eval_gate", "format": 1, "clips": [{"caption": "a red ball bounces", "seed": 1, "f1": [NaN, 1],'
            '"offset_ms": [0, 0], "accuracy": [1, 1]}]}',
            "finite",
        ),
    ],
)
def test_an_unusable_recording_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "gate.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        gate.read(path)
    assert "--record" in str(caught.value)


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    prompts = gate.fixed_prompts()
    recorded = rows([1.0, 0.5] * 16)
    (tmp_path / "gate.json").write_text(gate.as_text(prompts, recorded, {"commit": "abc"}))
    found = gate.read(tmp_path / "gate.json")
    assert found.prompts == prompts and found.rows == recorded and found.facts["commit"] == "abc"


# --- the built-in checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return gate.read(gate.default_file("demo"))


@pytest.fixture(scope="module")
def clips(recorded: Recorded) -> list[Clip]:
    return list(make_clips(JavisPipeline.from_pretrained("demo"), recorded.prompts))


def test_what_is_recorded_is_of_these_weights_and_prompts(recorded: Recorded) -> None:
    again = "record the new weights with 'javis eval gate --record'"
    assert recorded.facts["weights_sha256"] == gate.weights_sha256("demo"), again
    assert len(recorded.prompts) == gate.COUNT == len({prompt.caption for prompt in recorded.prompts})
    assert {"commit", "javis", "torch", "device", "used"} <= set(recorded.facts)
    assert recorded.facts["figures"] == gate.figures_of(recorded.rows)
    from javis.world import is_held_out, scene_from_prompt

    # Those of the scenes they were drawn as; a caption that leaves things open may be drawn otherwise.
    assert recorded.prompts == gate.fixed_prompts()
    named = [p for p in recorded.prompts if all(c.get("size") and c.get("material") for c in p.clauses)]
    assert named and all(is_held_out(scene_from_prompt(p.caption, p.seed)) for p in named)


@pytest.mark.slow
def test_the_built_in_checkpoint_holds_what_is_recorded(recorded: Recorded, clips: list[Clip]) -> None:
    found, _ = measure_rows(clips)
    verdicts = judge(recorded.rows, found)
    assert not missed(verdicts), "\n".join(verdict.line() for verdict in verdicts)


def with_sound_of_another(clips: list[Clip]) -> list[Clip]:
    return [replace(clip, audio=clips[i - 3].audio) for i, clip in enumerate(clips)]


def with_sound_late(clips: list[Clip]) -> list[Clip]:
    return [replace(clip, audio=np.roll(clip.audio, round(0.03 * clip.sample_rate))) for clip in clips]


def with_another_caption(clips: list[Clip]) -> list[Clip]:
    return [replace(clip, clauses=clips[i - 3].clauses) for i, clip in enumerate(clips)]


def silenced(clips: list[Clip]) -> list[Clip]:
    return [replace(clip, audio=np.zeros_like(clip.audio)) for clip in clips]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (with_sound_of_another, {"f1", "offset_ms", "accuracy"}),
        (with_sound_late, {"offset_ms"}),
        (with_another_caption, {"f1", "accuracy"}),
        (silenced, {"f1", "offset_ms", "accuracy"}),
    ],
)
def test_the_gate_is_missed_by_damaged_clips(
    recorded: Recorded, clips: list[Clip], damage: Callable[[list[Clip]], list[Clip]], expected: set[str]
) -> None:
    found, _ = measure_rows(damage(clips[:BROKEN]))
    assert expected <= missed(judge(recorded.rows[:BROKEN], found))


@pytest.mark.slow
def test_the_gate_is_missed_without_bidirectional_attention(recorded: Recorded) -> None:
    pipe = JavisPipeline.from_pretrained("demo")
    found, _ = measure_rows(make_clips(pipe, recorded.prompts[:BROKEN], ablate=["bidirectional"]))
    assert "f1" in missed(judge(recorded.rows[:BROKEN], found))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_passes_fails_and_refuses(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two clips against their own recording, and against one that says that they were better than they can be."""
    assert main(["eval", "gate", "--limit", "2", "--json", str(tmp_path / "verdict.json")]) == 0
    assert "held   event F1" in capsys.readouterr().out
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["clips"] == 2 and verdict["weights_sha256"] == verdict["recorded_weights_sha256"]
    assert [figure["held"] for figure in verdict["figures"]] == [True] * 3

    golden = [Row((row.f1[1], row.f1[1]), (0.0, 10.0), (10.0, 10.0)) for row in recorded.rows]
    facts = {**recorded.facts, "weights_sha256": "another"}
    (tmp_path / "gate.json").write_text(gate.as_text(recorded.prompts, golden, facts))
    assert main(["eval", "gate", "--limit", "2", "--file", str(tmp_path / "gate.json")]) == 1
    said = capsys.readouterr()
    assert "MISSED mean |offset|" in said.out and "other weights" in said.out and "missed by" in said.err
    assert main(["eval", "gate", "--limit", "2", "--file", str(tmp_path / "none.json")]) == 2
    assert main(["eval", "gate", "--limit", "2", "--record"]) == 2
    assert main(["eval", "gate", "--batch-size", "0"]) == 2


def test_record_writes_what_the_gate_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command on rows that are made up, as clips are dear; and no recording of a model at chance level."""
    made = rows([1.0, 0.5] * 16), 0.2
    monkeypatch.setattr(gate, "measure_rows", lambda clips: made)
    path = tmp_path / "new" / "gate.json"
    assert main(["eval", "gate", "--record", "--file", str(path)]) == 0
    found = gate.read(path)
    assert found.rows == made[0] and found.facts["used"]["variant"] in ("student", "teacher")
    assert found.facts["weights_sha256"] == gate.weights_sha256("demo")
    assert "against" not in capsys.readouterr().out
    assert main(["eval", "gate", "--record", "--file", str(path)]) == 0
    assert "against what was recorded before" in capsys.readouterr().out
    kept = path.read_text()
    monkeypatch.setattr(gate, "measure_rows", lambda clips: (rows([0.25, 0.0] * 16), 0.2))
    assert main(["eval", "gate", "--record", "--file", str(path)]) == 1
    assert "chance" in capsys.readouterr().err and path.read_text() == kept
