"""``javis sample --prompts``: bad rows, killed runs, and several processes."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import javis.clip_files
import javis.clips
from javis.cli import main
from javis.errors import FailedError
from javis.media import atomic_file, read_clip, remove_leftovers
from javis.parallel import Rank
from javis.parallel.ranks import Share

from .conftest import RenderingPipeline, files

ROWS = [
    ("a", "a red ball bounces on the left", 3),
    ("b", "a blue box knocks on the right", 4),
    ("c", "a green star flashes", 5),
    ("d", "a yellow ball swings", 6),
    ("e", "a small red box bounces", 7),
]
SUFFIXES = (".mp4", ".png", ".json")


def clips(names: str) -> set[str]:
    return {f"many/{name}{suffix}" for name in names for suffix in SUFFIXES}


def write_rows(*more: str, names: str = "abcde") -> None:
    rows = [f"{name},{prompt},{seed}" for name, prompt, seed in ROWS if name in names]
    Path("many.csv").write_text("\n".join(["id,text,seed", *rows, *more, ""]), encoding="utf-8")


def run_many(*arguments: str) -> int:
    return main(["sample", "--prompts", "many.csv", "--out", "many", "--resolution", "32x32", *arguments])


# -- a bad row is reported and skipped --------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_reported(
    pipe: RenderingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["f,a red dragon,8", "g,,9", "h,a red ball,-1", "a,a red ball,2", "i,a red ball,2,3", "j,a red b\xe4ll,2"]
    write_rows(*bad, names="abc")
    Path("many.csv").write_bytes(Path("many.csv").read_text(encoding="utf-8").encode("latin-1"))
    assert run_many() == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and said.err.startswith("javis: many.csv: skipped 6 unusable rows: line 5: ")
    assert "unknown word(s) 'dragon'" in said.err and "see many/_skipped.json" in said.err
    assert "skipped 6 unusable rows" in said.out, "said before the work, too"
    assert files(tmp_path) == {"many.csv", "many/_skipped.json"} | clips("abc")
    listed = json.loads(Path("many/_skipped.json").read_text())["rows"]
    assert [row["line"] for row in listed] == [5, 6, 7, 8, 9, 10]
    messages = ("dragon", "is empty", "seed -1", "already on line 2", "4 cells", "not text in UTF-8")
    for row, message in zip(listed, messages, strict=True):
        assert message in row["error"]

    made = pipe.made
    assert run_many() == 1, "what is missing is missing still"
    assert pipe.made == made
    write_rows("f,a red ball,8", names="abc")
    assert run_many() == 0
    assert files(tmp_path) == {"many.csv"} | clips("abcf")


def test_a_row_that_fails_does_not_stop_the_others(
    pipe: RenderingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch fails because of one clip; made one by one, only that clip does."""
    write_rows()
    whole = pipe.__class__.__call__

    def fails(self: RenderingPipeline, prompt: list[str], *, seed: list[int], **kwargs: Any) -> Any:
        if 4 in seed:
            raise FailedError("values that are not finite")
        if 6 in seed:
            raise MemoryError
        return whole(self, prompt, seed=seed, **kwargs)

    pipe.__class__ = type("Failing", (RenderingPipeline,), {"__call__": fails})
    assert run_many("--batch-size", "3") == 1
    assert "skipped 2 unusable rows: line 3: values that are not finite; line 5: out of memory" in (
        capsys.readouterr().err
    )
    assert files(tmp_path) == {"many.csv", "many/_skipped.json"} | clips("ace")
    pipe.__class__ = RenderingPipeline
    assert run_many() == 0
    assert files(tmp_path) == {"many.csv"} | clips("abcde")
    assert pipe.made == 5


def test_a_full_disk_stops_everything(pipe: RenderingPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_rows()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("javis.clip_files.write_clip", full)
    assert run_many("--batch-size", "1") == 1
    assert pipe.made == 1
    assert files(tmp_path) == {"many.csv"}


# -- a killed run leaves no half clip ---------------------------------------------------------------------------------


def in_a_child(action: Callable[[], object]) -> int:
    """Wait status of a forked process that does ``action``; it ends by itself after a minute at most."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            action()
        except BaseException:  # noqa: BLE001  whatever it is must not unwind into pytest
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_oneself(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["half an mp4", "before mp4", "before png", "before json", "after json"])
def test_a_killed_run_leaves_no_half_clip(
    pipe: RenderingPipeline, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the second clip, at every step of its way to its place."""
    write_rows(names="abc")
    replace, real_write = os.replace, javis.clip_files.write_clip
    steps = {"before mp4": (".mp4", False), "before png": (".png", False), "before json": (".json", False)}

    def stop_at(source: Path, target: Path) -> None:
        suffix, after = steps.get(moment, (".json", True))
        at = target.name == f"b{suffix}" and moment != "half an mp4"
        if at and not after:
            kill_oneself()
        replace(source, target)
        if at:
            kill_oneself()

    def stop_within(path: Path, *args: Any, **kwargs: Any) -> None:
        real_write(path, *args, **kwargs)
        if ".b." in str(path) and moment == "half an mp4":
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            kill_oneself()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at)
        patch.setattr("javis.clip_files.write_clip", stop_within)
        assert os.WTERMSIG(in_a_child(lambda: run_many("--batch-size", "1"))) == signal.SIGKILL
    left = files(tmp_path)
    assert clips("a") <= left, "what was finished is kept"
    assert not any(name.startswith("many/c") for name in left)
    for mp4 in Path("many").glob("[!.]*.mp4"):
        assert read_clip(mp4).video.shape == (32, 32, 32, 3), "whatever bears a clip's name is whole"
    if Path("many/b.json").exists():
        assert clips("b") <= left, "the json comes last"
    hidden = {name for name in left if name.startswith("many/.")}
    assert bool(hidden) == (moment != "after json"), "the test did kill it in the middle"

    assert run_many() == 0
    assert files(tmp_path) == {"many.csv"} | clips("abc"), "and what the killed run left is cleared away"
    assert pipe.made == (1 if moment == "after json" else 2)


def test_files_of_running_processes_stay(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "clip.mp4") as own:
        machine = own.name.split(".")[2].rpartition("-")[0]
        elsewhere = tmp_path / f".clip.other{machine}-1.00000000.part.mp4"
        foreign = tmp_path / ".notes.part.txt"
        dead = in_a_child(lambda: (tmp_path / "pid").write_text(str(os.getpid())))
        assert dead == 0
        left = tmp_path / f".clip.{machine}-{(tmp_path / 'pid').read_text()}.00000000.part.mp4"
        for path in (elsewhere, foreign, left):
            path.write_bytes(b"x")
        remove_leftovers(tmp_path)
        assert own.exists() and elsewhere.exists() and foreign.exists()
        assert not left.exists()


# -- several processes ------------------------------------------------------------------------------------------------


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, *arguments: str) -> int:
    with monkeypatch.context() as patch:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
            patch.setenv(name, str(value))
        return run_many(*arguments)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_clip_is_made_by_exactly_one_rank(
    pipe: RenderingPipeline, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows()
    for rank in reversed(range(world)):
        before = len(files(tmp_path))
        assert as_rank(monkeypatch, rank, world) == 0
        assert len(files(tmp_path)) - before == 3 * len(ROWS[rank::world])
    assert files(tmp_path) == {"many.csv"} | clips("abcde")
    assert sorted(seed for call in pipe.calls for seed in call["seed"]) == [3, 4, 5, 6, 7], "none twice"


def test_the_rest_of_a_dead_rank_is_made_by_the_next_run(
    pipe: RenderingPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows()
    assert as_rank(monkeypatch, 1, 2) == 0  # rank 0 has died before its first clip, and rank 1 does not care
    assert files(tmp_path) == {"many.csv"} | clips("bd")
    assert run_many() == 0
    assert files(tmp_path) == {"many.csv"} | clips("abcde")
    assert pipe.made == 5


def test_each_share_reports_its_own_bad_rows(
    pipe: RenderingPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows("f,,8", "g,a red dragon,9", names="abc")  # shares of two: a, c and b, g; the empty prompt is no request
    assert as_rank(monkeypatch, 0, 2) == 1
    assert "line 5: the prompt is empty" in capsys.readouterr().err
    assert as_rank(monkeypatch, 1, 2) == 1
    said = capsys.readouterr().err
    assert "line 6: unknown word(s) 'dragon'" in said and "line 5" not in said
    assert files(tmp_path) == {"many.csv", "many/_skipped.json", "many/_skipped-1.json"} | clips("abc")
    assert run_many() == 1, "one process reports all of them, and clears the lists of shares that are no more"
    assert files(tmp_path) == {"many.csv", "many/_skipped.json"} | clips("abc")
    assert [row["line"] for row in json.loads(Path("many/_skipped.json").read_text())["rows"]] == [5, 6]


def test_one_clip_needs_its_processes_to_work_together(
    pipe: RenderingPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["sample", "a red ball"]) == 2
    assert "4 processes for one clip; expected --cfg-parallel and --seq-parallel" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "4")
    assert main(["sample", "a red ball"]) == 2
    assert "is no place among processes" in capsys.readouterr().err
    assert pipe.calls == []


@pytest.mark.parametrize("option", ["--cfg-parallel", "--seq-parallel"])
def test_processes_that_make_a_clip_together_have_no_graphs(
    pipe: RenderingPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """With guidance shared, each would have replayed all of the model by itself, and nobody would have noticed."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sample", "a red ball", "--cuda-graphs", option, "2"]) == 2
    assert "--cuda-graphs cannot be used with --cfg-parallel or --seq-parallel" in capsys.readouterr().err


def test_shares_of_groups() -> None:
    rows = list(range(10))
    shares = [Share(Rank(rank, 8), 2, 2) for rank in range(8)]
    assert [share.of(rows) for share in shares] == [rows[::2]] * 4 + [rows[1::2]] * 4
    assert [share.leads for share in shares] == [True, False, False, False] * 2
    assert [share.shows for share in shares] == [True] + [False] * 7


def test_arrays_of_the_same_clips_whatever_the_share_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model: 1 and 2 ranks, batches of 1 and 3."""
    monkeypatch.chdir(tmp_path)
    write_rows(names="abcd")
    made: dict[tuple[int, int], dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    for world, size in ((1, 1), (1, 3), (2, 1), (2, 3)):
        found = made[world, size] = {}

        def keep(batch: Any, index: int, out: Path, *_: Any, found: dict[str, Any] = found, **__: Any) -> str:
            found[out.stem] = (batch.video[index], batch.audio[index])
            return ""

        monkeypatch.setattr(javis.clips, "save", keep)
        for rank in range(world):
            options = ("--batch-size", str(size), "--variant", "teacher", "--steps", "2", "--seconds", "0.5")
            assert as_rank(monkeypatch, rank, world, *options) == 0
        assert sorted(found) == list("abcd")
    reference = made[1, 1]
    for found in made.values():
        for name, (video, audio) in reference.items():
            assert video.std() > 1 and np.abs(audio).max() > 1e-3
            levels = np.abs(found[name][0].astype(int) - video.astype(int))
            # Matrix products of other sizes round differently, so a value may fall to the next of 256 levels.
            assert levels.max() <= 1 and (levels > 0).mean() < 1e-3
            np.testing.assert_allclose(found[name][1], audio, atol=1e-4)
    for name, (video, audio) in made[2, 1].items():  # the same batches
        assert np.array_equal(video, reference[name][0]) and np.array_equal(audio, reference[name][1])
