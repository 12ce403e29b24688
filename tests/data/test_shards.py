"""Shards: the same bytes every time, readable by webdataset, resumable, and read back exactly."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from javis import cli
from javis.data.make_manifest import scan
from javis.data.manifest import Manifest
from javis.data.shards import ShardedManifest, write_shards
from javis.data.store import Store
from javis.errors import FailedError, UsageError
from tests.data.media_files import pictures, tone, write_video, write_wav


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Six clips: sound in the video, beside it, or nowhere; one with a dot in its name, two with side files."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(("a", "b", "c", "d.x", "e", "f")):
        write_video(folder / f"{name}.mp4", pictures(8, i), tone(0.5, i) if i % 2 else None)
        if i == 2:
            write_wav(folder / "c.wav", tone(0.5, 2))
        if i > 3:
            (folder / f"{name}.json").write_text(json.dumps({"caption": f"clip {i}, äöü", "events": [i]}))
    return scan(folder, processes=1).manifest


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_what_is_written_is_read_again(manifest: Manifest, tmp_path: Path) -> None:
    done = write_shards(manifest, tmp_path / "s", shard_clips=4)
    assert [shard.clips for shard in done.shards] == [4, 2] and (done.written, done.skipped) == (2, 0)
    again = ShardedManifest.open(tmp_path / "s")
    assert len(again) == 6 and again.verify() == []
    streamed = list(again.stream())
    for index, (row, found) in enumerate(zip(manifest, again, strict=True)):
        for column in ("id", "relpath", "num_frames", "fps", "height", "audio_fps", "text", "extra"):
            assert getattr(row, column) == getattr(found, column)
        media = again.media(index)
        assert media == manifest.media(index) == streamed[index][1] and streamed[index][0] is found
        assert media.video == Path(row.path).read_bytes()
        assert (media.audio is not None) == (row.audio_path not in ("", row.path))
        assert (found.audio_path == found.path) == (row.audio_path == row.path)
    assert json.loads(again.media(4).side or b"")["events"] == [4]
    assert [row.id for row, _ in again.stream([1])] == ["e", "f"]


def test_rows_of_shards_are_urls_that_fsspec_opens(manifest: Manifest, tmp_path: Path) -> None:
    import fsspec

    write_shards(manifest, tmp_path / "s")
    for row, given in zip(ShardedManifest.open(tmp_path / "s"), manifest, strict=True):
        with fsspec.open(row.path, "rb") as file:
            assert file.read() == Path(given.path).read_bytes()


def test_webdataset_reads_ours(manifest: Manifest, tmp_path: Path) -> None:
    import webdataset

    write_shards(manifest, tmp_path / "s", shard_clips=4)
    urls = [str(path) for path in sorted((tmp_path / "s").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 6
    for row, sample in zip(manifest, samples, strict=True):
        assert sample["mp4"] == Path(row.path).read_bytes() and sample["txt"].decode() == row.text
        told = json.loads(sample["json"])
        assert told["id"] == row.id and told["num_frames"] == row.num_frames
    assert samples[2]["wav"] == Path(manifest[2].audio_path).read_bytes()
    assert json.loads(samples[5]["side.json"])["events"] == [5]


def test_ours_reads_webdataset(manifest: Manifest, tmp_path: Path) -> None:
    import webdataset

    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"x-{number}.tar")) as writer:
            for index in range(3 * number, 3 * number + 3):
                row, media = manifest[index], manifest.media(index)
                sample = {"__key__": f"k/{index:04d}", "mp4": media.video, "txt": row.text, "json": {"score": index}}
                if media.audio is not None:
                    sample["flac" if index == 3 else "wav"] = media.audio
                writer.write(sample)
            writer.write({"__key__": f"no-video-{number}", "txt": "only a text"})
    again = ShardedManifest.open(tmp_path)
    assert [row.id for row in again] == [f"k/{i:04d}" for i in range(6)] and [s.clips for s in again.shards] == [3, 3]
    for index, (row, given) in enumerate(zip(again, manifest, strict=True)):
        assert again.media(index)[:2] == manifest.media(index)[:2]
        assert (row.num_frames, row.fps, row.height, row.width) == (8, 16.0, 32, 32)
        assert (row.audio_fps, row.text, row.extra) == (given.audio_fps, given.text, {"score": str(index)})
        assert bool(row.audio_path) == bool(given.audio_path)


def test_the_same_manifest_makes_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(manifest, tmp_path / name, shard_clips=4, seed=7)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    write_shards(manifest, tmp_path / "three", shard_clips=4, seed=8)
    order = [[row.id for row in ShardedManifest.open(tmp_path / name)] for name in ("one", "three")]
    assert order[0] != order[1] and sorted(order[0]) == sorted(order[1])


def test_a_shard_ends_before_it_is_too_large(manifest: Manifest, tmp_path: Path) -> None:
    done = write_shards(manifest, tmp_path / "s", shard_bytes=30 * 1024)
    assert done.clips == 6 and len(done.shards) > 1 and max(shard.clips for shard in done.shards) > 1
    assert all(shard.bytes <= 30 * 1024 for shard in done.shards)
    assert [shard.clips for shard in write_shards(manifest, tmp_path / "t", shard_bytes=1).shards] == [1] * 6


def test_goes_on_where_it_stopped(manifest: Manifest, tmp_path: Path) -> None:
    write_shards(manifest, tmp_path / "s", shard_clips=1)
    whole = content(tmp_path / "s")
    os.remove(tmp_path / "s" / "index.json")
    os.remove(tmp_path / "s" / "shard-000003.json")  # killed between a shard and its record
    (tmp_path / "s" / "shard-000004.tar").write_bytes(b"half")
    with pytest.raises(UsageError, match="not finished"):
        ShardedManifest.open(tmp_path / "s")
    done = write_shards(manifest, tmp_path / "s", shard_clips=1)
    assert (done.written, done.skipped) == (2, 4) and content(tmp_path / "s") == whole
    assert write_shards(manifest, tmp_path / "s", shard_clips=1).written == 0


def test_a_damaged_shard_is_named_and_written_again(manifest: Manifest, tmp_path: Path) -> None:
    write_shards(manifest, tmp_path / "s", shard_clips=2)
    whole = content(tmp_path / "s")
    path = tmp_path / "s" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert ShardedManifest.open(tmp_path / "s").verify() == ["shard-000001.tar"]
    assert write_shards(manifest, tmp_path / "s", shard_clips=2).written == 0
    assert write_shards(manifest, tmp_path / "s", shard_clips=2, verify=True).written == 1
    assert content(tmp_path / "s") == whole
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(FailedError, match=r"shard-000001\.tar ends too early"):
        ShardedManifest.open(tmp_path / "s").media(2)


def test_other_clips_do_not_mix(manifest: Manifest, tmp_path: Path) -> None:
    write_shards(manifest, tmp_path / "s", shard_clips=1)
    with pytest.raises(UsageError, match="other clips or sizes"):
        write_shards(manifest[:3], tmp_path / "s", shard_clips=1)
    os.remove(tmp_path / "s" / "index.json")  # never finished: what is left of it goes
    write_shards(manifest[3:], tmp_path / "s", shard_clips=1)
    assert len(list((tmp_path / "s").glob("shard-*"))) == 6
    again = ShardedManifest.open(tmp_path / "s")
    assert [row.id for row in again] == [row.id for row in manifest[3:]]
    assert [again.media(i) for i in range(3)] == [manifest.media(i) for i in range(3, 6)]


def test_missing_and_changing_files(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gone.mp4"
    path.write_bytes(b"x" * 100)
    import dataclasses

    rows = Manifest((*manifest[:2].rows, dataclasses.replace(manifest[2], path=str(path), id="gone")))
    for size, named in ((99, "longer"), (101, "shorter")):
        monkeypatch.setattr(
            Store, "size_of", staticmethod(lambda p, s=size: s if p == str(path) else os.stat(p).st_size)
        )
        with pytest.raises(FailedError, match=f"gone.mp4 became {named}"):
            write_shards(rows, tmp_path / "s")
        assert not list((tmp_path / "s").glob("shard-*")), "something half was left"
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(UsageError, match="clips cannot be read: gone"):
        write_shards(rows, tmp_path / "s")


def test_any_fsspec_url(manifest: Manifest) -> None:
    import fsspec

    where = "memory://bucket/set"
    try:
        write_shards(manifest, where, shard_clips=4)
        again = ShardedManifest.open(where)
        assert [again.media(i) for i in range(6)] == [manifest.media(i) for i in range(6)]
        assert write_shards(manifest, where, shard_clips=4).skipped == 2
        fs = fsspec.filesystem("memory")
        fs.rm("/bucket/set/index.json")
        fs.pipe_file("/bucket/set/shard-000001.tar", b"half")
        assert write_shards(manifest, where, shard_clips=4).written == 1 and again.verify() == []
        with fsspec.open(again[0].path, "rb") as file:
            assert file.read() == manifest.media(0).video
    finally:
        fsspec.filesystem("memory").store.clear()
    with pytest.raises(UsageError, match="cannot use"):
        Store("nosuchprotocol://x")


def test_the_tar_files_are_plain(manifest: Manifest, tmp_path: Path) -> None:
    write_shards(manifest, tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    (shard,) = index["shards"]
    path = tmp_path / "s" / shard["name"]
    assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    record = json.loads((tmp_path / "s" / "shard-000000.json").read_text())
    with tarfile.open(path) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gname) == (0, 0, "")
            key, suffix = info.name.split(".", 1)
            (clip,) = [clip for clip in record["clips"] if clip["key"] == key]
            assert clip["places"][suffix] == [info.offset_data, info.size]


def test_the_command(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest.write(tmp_path / "m.csv")
    arguments = ["data", "shard", str(tmp_path / "m.csv"), str(tmp_path / "s"), "--shard-clips", "4"]
    assert cli.main(arguments) == 0
    assert "6 clips in 2 shards, 2 written, 0 were there already" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 2
    assert cli.main(["data", "shard", str(tmp_path / "m.csv"), str(tmp_path / "m.csv")]) == 2


def test_killed_at_any_moment(manifest: Manifest, tmp_path: Path) -> None:
    """kill -9 while shards are written: what is left is whole, and the next call finishes the same set."""
    write_shards(manifest, tmp_path / "whole", shard_clips=1)
    whole = content(tmp_path / "whole")
    manifest.write(tmp_path / "m.csv")
    code = (
        "import sys, time, javis.data.shards as s\n"
        "from javis.data.manifest import Manifest\n"
        "add = s._add\n"
        "def slow(*a):\n    time.sleep(0.02)\n    add(*a)\n"
        "s._add = slow\n"
        "print('go', flush=True)\n"
        "s.write_shards(Manifest.read(sys.argv[1]), sys.argv[2], shard_clips=1)\n"
    )
    out = tmp_path / "killed"
    for delay in (0.05, 0.13, 0.21):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "m.csv"), str(out)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for name in [path.name for path in out.glob("shard-*")]:
            assert content(out)[name] == whole[name]
    done = write_shards(manifest, out, shard_clips=1)
    assert done.clips == 6 and content(out) == whole, "the same files, and none left over"


def test_the_doctor_looks_into_shards(manifest: Manifest, tmp_path: Path) -> None:
    from javis.data.doctor import examine

    write_shards(manifest, tmp_path / "s", shard_clips=4)
    found = {(f.id, f.kind) for f in examine(tmp_path / "s", processes=1).findings if f.kind != "no_caption"}
    assert found == {(row.id, "no_audio") for row in manifest if not row.audio_path}
