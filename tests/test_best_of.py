"""Best of N: candidates, their seeds, the choice, independence of the batch, refusals; and ``javis sample`` with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import javis.eval.sync_score
from javis import JavisPipeline
from javis.best_of import candidate_seeds
from javis.cli import main
from javis.errors import UsageError

from .tiny import write_tiny_checkpoint

PROMPTS = ["a red ball bounces on the left", "a large blue box swings", "a green star flashes"]
QUICK: dict[str, Any] = {"steps": 1, "seconds": 0.5}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("best"))


@pytest.fixture
def pipe(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> JavisPipeline:
    """Random weights make clips in which nothing happens; here the brightest is the best."""
    monkeypatch.setattr(javis.eval.sync_score, "sync_score", brightness)
    return JavisPipeline.from_pretrained(checkpoint)


def brightness(video: np.ndarray, *_: Any) -> float:
    return float(video.mean()) / 255


def test_the_best_of_the_candidates_is_returned(pipe: JavisPipeline) -> None:
    best = pipe(PROMPTS[0], seed=11, best_of=4, **QUICK)
    assert best.candidates is not None
    seeds = [candidate.seed for candidate in best.candidates[0]]
    assert seeds == candidate_seeds(11, 4) and seeds[0] == 11 and len(set(seeds)) == 4
    alone = [pipe(PROMPTS[0], seed=seed, **QUICK) for seed in seeds]
    scores = [brightness(clip.video[0]) for clip in alone]
    assert [candidate.score for candidate in best.candidates[0]] == pytest.approx(scores, abs=2e-4)
    assert len(set(np.round(scores, 3))) > 1
    winner = int(np.argmax(scores))
    assert best.seeds == [seeds[winner]]
    assert np.abs(best.video[0].astype(int) - alone[winner].video[0]).max() <= 1
    assert np.abs(best.audio[0] - alone[winner].audio[0]).max() < 1e-4
    assert len(best) == 1 and best.seconds_per_stage["sync_score"] >= 0


def test_it_does_not_depend_on_the_batch(pipe: JavisPipeline) -> None:
    whole = pipe(PROMPTS, seed=5, best_of=3, batch_size=9, **QUICK)
    for size in (1, 2, 4):
        other = pipe(PROMPTS, seed=5, best_of=3, batch_size=size, **QUICK)
        assert other.seeds == whole.seeds
        assert np.abs(other.video.astype(int) - whole.video).max() <= 1
    for place, prompt in enumerate(PROMPTS):
        single = pipe(prompt, seed=5 + place, best_of=3, **QUICK)
        assert single.seeds == whole.seeds[place : place + 1]
        assert single.candidates is not None and whole.candidates is not None
        assert [c.seed for c in single.candidates[0]] == [c.seed for c in whole.candidates[place]]


def test_best_of_1_is_the_clip_itself_and_ties_go_to_it(pipe: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pipe(PROMPTS, seed=5, **QUICK)
    assert plain.candidates is None
    one = pipe(PROMPTS, seed=5, best_of=1, **QUICK)
    assert np.array_equal(plain.video, one.video) and one.candidates is None
    monkeypatch.setattr(javis.eval.sync_score, "sync_score", lambda *_: 0.0)
    tied = pipe(PROMPTS, seed=5, best_of=3, **QUICK)
    assert tied.seeds == plain.seeds
    assert np.abs(tied.video.astype(int) - plain.video).max() <= 1


def test_more_candidates_keep_the_first_ones() -> None:
    assert candidate_seeds(7, 8)[:3] == candidate_seeds(7, 3)
    drawn = [seed for own in range(200) for seed in candidate_seeds(own, 5)]
    assert len(set(drawn)) == len(drawn) and all(0 <= seed < 2**63 for seed in drawn)
    assert candidate_seeds(2**63 - 1, 2)[0] == 2**63 - 1


def test_progress_and_negative_prompts_follow_the_candidates(pipe: JavisPipeline) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {**QUICK, "steps": 2, "seed": [4, 9], "best_of": 3, "batch_size": 4}
    pipe(PROMPTS[:2], progress=lambda done, total: told.append((done, total)), **options)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # At guidance 0 only the negative prompt counts.
    options = {**options, "guidance": 0}
    one = pipe(PROMPTS[:2], negative_prompt=[PROMPTS[2], PROMPTS[0]], **options)
    other = pipe(PROMPTS[1::-1], negative_prompt=[PROMPTS[2], PROMPTS[0]], **options)
    assert one.seeds == other.seeds


def test_a_seed_of_the_sound_stays(pipe: JavisPipeline) -> None:
    best = pipe(PROMPTS[0], seed=11, audio_seed=4, best_of=3, **QUICK)
    assert best.candidates is not None and best.audio_seeds == [4]
    again = pipe(PROMPTS[0], seed=best.seeds, audio_seed=4, **QUICK)
    assert np.abs(again.video.astype(int) - best.video).max() <= 1 and np.abs(again.audio - best.audio).max() < 1e-4


def test_the_report_of_a_cache_is_that_of_the_clip_that_was_kept(pipe: JavisPipeline) -> None:
    options: dict[str, Any] = {**QUICK, "steps": 3, "cache": "first-block=0.5"}
    best = pipe(PROMPTS, seed=5, best_of=3, batch_size=4, **options)
    alone = pipe(PROMPTS, seed=best.seeds, **options)
    assert best.caches is not None and best.caches == alone.caches and len(best.caches) == 3


def test_no_candidate_is_written_while_it_is_decoded(pipe: JavisPipeline) -> None:
    def take(*_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("which clip is kept is known later")

    pipe.frames_to = take
    assert len(pipe(PROMPTS[0], seed=1, best_of=2, **QUICK)) == 1
    assert pipe.frames_to is take


@pytest.mark.parametrize("count", [0, -1, 65, 10**6, 2.5, True])
def test_unusable_numbers_are_refused_with_the_range(pipe: JavisPipeline, count: Any) -> None:
    with pytest.raises(UsageError, match=f"best_of must be a whole number from 1 to 64, got {count}"):
        pipe(PROMPTS[0], best_of=count, **QUICK)


# -- on the command line -----------------------------------------------------------------------------------------------


def test_javis_sample_takes_the_best_and_goes_on_where_it_was(
    pipe: JavisPipeline, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    report = {"video_events": [], "audio_events": [], "matched": [], "mean_abs_offset_ms": None}
    monkeypatch.setattr("javis.eval.sync.sync_report", lambda *_: report)
    monkeypatch.setattr("javis.contact_sheet.contact_sheet", lambda path, *_, **__: Path(path).write_bytes(b"png"))
    Path("many.csv").write_text("id,prompt\na,a red ball bounces\nb,a blue box swings\n")
    command = ["sample", "--prompts", "many.csv", "--out", "many", "--checkpoint", str(checkpoint), "--steps", "1"]
    command += ["--seconds", "0.5", "--resolution", "32x32", "--batch-size", "2"]
    assert main([*command, "--best-of", "3"]) == 0
    facts = json.loads(Path("many/b.json").read_text())
    assert [candidate["seed"] for candidate in facts["best_of"]] == candidate_seeds(1, 3)
    best = max(facts["best_of"], key=lambda candidate: candidate["score"])
    assert facts["seed"] == best["seed"] and facts["request"]["seed"] == 1 and facts["request"]["best_of"] == 3
    assert facts["variant"] == "teacher" and "variant_because" not in facts
    assert "best of 3: score" in capsys.readouterr().out
    before = Path("many/b.json").stat().st_mtime_ns
    assert main([*command, "--best-of", "3", "--batch-size", "4"]) == 0
    assert Path("many/b.json").stat().st_mtime_ns == before, "finished clips are skipped"
    assert main(command) == 0
    assert "best_of" not in json.loads(Path("many/b.json").read_text()), "without it they are other clips"


@pytest.mark.parametrize("count", ["0", "65", "1000000", "-3"])
def test_the_command_line_refuses_before_anything_is_loaded(count: str, capsys: Any) -> None:
    assert main(["sample", PROMPTS[0], "--best-of", count]) == 2
    assert f"best-of must be a whole number from 1 to 64, got {count}" in capsys.readouterr().err
