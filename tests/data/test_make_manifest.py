"""``javis data make``: which files become clips, with which sound, caption and numbers."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from javis import cli
from javis.data.make_manifest import scan
from javis.data.manifest import COLUMNS, Manifest, side_path
from javis.errors import UsageError
from javis.world import WorldConfig, caption, sample_scene
from javis.world.make import make as make_world
from tests.data.media_files import FPS, FRAMES, RATE, SIDE, pictures, tone, write_video, write_wav


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_video(folder / "a.mp4", pictures(), tone())
    (folder / "a.txt").write_text("  a red\nball \n", encoding="utf-8")
    write_video(folder / "b" / "a.mp4", pictures(seed=1), tone())  # and a wav beside it, which comes first
    write_wav(folder / "b" / "a.wav", tone(2, 1, 22050), 22050)
    (folder / "b" / "a.json").write_text(json.dumps({"prompt": ["a blue box", "other"], "note": 1}))
    write_video(folder / "b" / "a.webm", pictures(seed=2), codec="libvpx")  # the wav is its sound, too
    write_video(folder / "b" / "c" / "Ünï.MKV", pictures(seed=3))  # no sound, no caption
    write_video(folder / "b" / "c" / "d.mp4", pictures(seed=4))
    (folder / "b" / "c" / "d.wav").write_bytes(b"RIFF")
    (folder / "b" / "c" / "d.json").write_text("[" * 100_000)
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    write_video(folder / ".hidden" / "e.mp4", pictures())
    write_video(folder / ".f.mp4", pictures())
    (folder / "notes.txt").write_text("no clip")
    return folder


def test_a_tree_becomes_rows(tree: Path) -> None:
    made = scan(tree, processes=2)
    rows = {row.id: row for row in made.manifest}
    assert [row.relpath for row in made.manifest] == ["a.mp4", "b/a.mp4", "b/a.webm", "b/c/d.mp4", "b/c/Ünï.MKV"]
    for row in made.manifest:
        assert (row.num_frames, row.height, row.width, row.fps) == (FRAMES, SIDE, SIDE, FPS), row.id
        assert (row.aspect_ratio, row.resolution) == (1.0, SIDE * SIDE)
        assert row.path == str(tree / row.relpath)
    assert (rows["a"].audio_path, rows["a"].audio_fps) == (rows["a"].path, RATE)
    assert (rows["b/a"].audio_path, rows["b/a"].audio_fps) == (str(tree / "b" / "a.wav"), 22050)
    assert rows["b/a.webm"].audio_path == rows["b/a"].audio_path
    assert (rows["b/c/Ünï"].audio_path, rows["b/c/Ünï"].audio_fps, rows["b/c/Ünï"].text) == ("", 0, "")
    assert rows["a"].text == "a red ball" and rows["b/a"].text == "a blue box"
    assert side_path(rows["b/a"]) == tree / "b" / "a.json" and side_path(rows["a"]) is None
    assert (made.without_caption, made.without_sound) == (2, 2)
    assert sorted(Path(skip.path).name for skip in made.skipped) == ["broken.mp4", "d.wav"]


def test_captions_from_a_table(tree: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("video,caption,license,path\na.mp4,doubtful,CC0,\nb/a.mp4,exact,CC1,\nÜnï,by stem,,\n", "utf-8")
    rows = {row.id: row for row in scan(tree, captions=table, processes=1).manifest}
    assert rows["b/a"].text == "exact" and rows["b/a"].extra["license"] == "CC1"
    assert rows["b/c/Ünï"].text == "by stem"
    # "a.mp4" is a row of its own and also the file name of another row: neither is guessed at, the text file holds.
    assert rows["a"].text == "a red ball"


@pytest.mark.parametrize(
    "content, named", [("a,b\n1,2\n", "has the columns a, b"), ('text,id\n"x', "not CSV"), (None, "cannot read")]
)
def test_unusable_tables(tree: Path, tmp_path: Path, content: str | None, named: str) -> None:
    table = tmp_path / "captions.csv"
    if content is not None:
        table.write_text(content)
    with pytest.raises(UsageError, match=named):
        scan(tree, captions=table)


def test_folders_without_clips(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no video"):
        scan(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        scan(tmp_path / "none")


def test_world_clips_with_captions_and_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = tmp_path / "world", WorldConfig(size=32, seconds=1.0)
    make_world(folder, 3, 5, config)
    assert cli.main(["data", "make", str(folder), "--processes", "1"]) == 0
    assert "3 clips, 0 without a caption, 0 without sound, 0 files skipped" in capsys.readouterr().out
    manifest = Manifest.read(folder / "clips.csv")
    with (folder / "clips.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert tuple(first)[:12] == COLUMNS and first["path"] == "clip_000000.mp4" and first["side"] == "clip_000000.json"
    for index, row in enumerate(manifest):
        scene = sample_scene(5_000_000 + index, config)
        assert row.text == caption(scene) and row.id == f"clip_{index:06d}"
        assert (row.num_frames, row.fps, row.height, row.width) == (16, 16.0, 32, 32)
        assert (Path(row.audio_path).suffix, row.audio_fps) == (".wav", 16000)
        truth = side_path(row)
        assert truth is not None and json.loads(truth.read_text()) == scene.truth()
    # The world's own table gives its columns as well.
    made = scan(folder, captions=folder / "manifest.csv", processes=1).manifest
    assert made[1].extra["seed"] == "5000001" and side_path(made[1], "truth") == folder / "clip_000001.json"
    assert cli.main(["data", "check", str(folder / "clips.csv"), "--keep", "silence", "--strict"]) == 0
    # What is there is not overwritten without being asked.
    before = (folder / "clips.csv").read_bytes()
    assert cli.main(["data", "make", str(folder)]) == 2
    os.remove(folder / "clip_000002.wav")
    capsys.readouterr()
    assert cli.main(["data", "make", str(folder), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_sound"] == 1
    assert (folder / "clips.csv").read_bytes() != before
