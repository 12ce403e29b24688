"""Tar files that the webdataset package, or anything else, has written: read through once, and then used like ours."""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from javis.data.make_manifest import AUDIO, TEXT_KEYS, VIDEO
from javis.data.manifest import COLUMNS, ClipRow
from javis.data.probe import ClipFiles, measure
from javis.data.shard_rows import Shard, ShardPlace, row_of
from javis.data.store import Store
from javis.errors import UsageError

_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # key and suffix, as webdataset splits them
_NUMBERS = ("num_frames", "height", "width", "fps")


class _Sample(NamedTuple):
    """Files of one key: suffix -> (offset, size); small texts are read along."""

    key: str
    places: dict[str, tuple[int, int]]
    texts: dict[str, bytes]


def _samples(tar: tarfile.TarFile) -> Iterator[_Sample]:
    """Neighbours in the tar that have the same key."""
    current: _Sample | None = None
    for info in tar:
        match = _NAME.fullmatch(info.name)
        if not info.isfile() or match is None or info.name.startswith("__"):
            continue
        key, suffix = match[1], match[2].lower()
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Sample(key, {}, {})
        current.places[suffix] = (info.offset_data, info.size)
        if suffix in ("txt", "json") and info.size < 1 << 20:
            content = tar.extractfile(info)
            current.texts[suffix] = b"" if content is None else content.read()
    if current is not None:
        yield current


def index_foreign(store: Store) -> tuple[tuple[ClipRow, ...], str, tuple[Shard, ...], tuple[ShardPlace, ...]]:
    """The clips of all tar files at ``store``, in the order of their names: rows, where, shards, places.

    Raises:
        UsageError: no tar file, a damaged one, or none with a video in it.
    """
    names = store.names("*.tar")
    if not names:
        raise UsageError(
            f"{store.where} holds neither index.json nor tar files; expected what 'javis data shard' makes"
        )
    rows: list[ClipRow] = []
    places: list[ShardPlace] = []
    shards: list[Shard] = []
    for number, name in enumerate(names):
        count = 0
        with store.reading(name) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for sample in _samples(tar):
                        told = _told(tar, file, sample, f"{store.where}/{name}")
                        if told is None:
                            continue
                        count += 1
                        rows.append(row_of(store, name, sample.key, told))
                        places.append(ShardPlace(number, sample.places, told["members"]))
            except tarfile.TarError as error:
                raise UsageError(f"{store.where}/{name} is not a whole tar file: {error}; copy it again") from None
        shards.append(Shard(name, count, store.size(name) or 0, store.sha256(name) or ""))
    if not rows:
        raise UsageError(f"the tar files at {store.where} hold no video; expected files such as KEY.mp4")
    return tuple(rows), store.where, tuple(shards), tuple(places)


def _first(sample: _Sample, suffixes: tuple[str, ...]) -> str | None:
    return next((suffix[1:] for suffix in suffixes if suffix[1:] in sample.places), None)


def _told(tar: tarfile.TarFile, file: Any, sample: _Sample, name: str) -> dict[str, Any] | None:
    """The columns of a sample, with its members; None: no video that can be read."""
    video, audio = _first(sample, VIDEO), _first(sample, AUDIO)
    if video is None:
        return None
    try:
        side = json.loads(sample.texts.get("json", b"{}"))
    except (ValueError, RecursionError):
        side = {}
    side = side if isinstance(side, dict) else {}
    members = {"video": video} | ({"audio": audio} if audio is not None else {})
    text = sample.texts.get("txt", b"").decode(errors="replace").strip()
    text = text or next((side[key] for key in TEXT_KEYS if isinstance(side.get(key), str)), "")
    numbers: dict[str, Any] = {column: side.get(column) for column in (*_NUMBERS, "audio_fps")}
    known = all(isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0 for n in numbers.values())
    if not known:
        found = _measured(file, sample, video, audio)
        if found is None:
            return None
        numbers = found
        if audio is None and numbers["audio_fps"]:
            members["audio"] = video
    elif audio is None:
        members["audio"] = video
    height, width = int(numbers["height"]), int(numbers["width"])
    extra: dict[str, Any] = side["extra"] if isinstance(side.get("extra"), dict) else {}
    others = {k: v for k, v in side.items() if k not in (*COLUMNS, *TEXT_KEYS, "extra", "members")}
    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (others | extra).items()}
    return {
        "id": side["id"] if isinstance(side.get("id"), str) and side["id"] else sample.key,
        "relpath": side["relpath"] if isinstance(side.get("relpath"), str) else f"{sample.key}.{video}",
        "num_frames": int(numbers["num_frames"]),
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "fps": float(numbers["fps"]),
        "resolution": height * width,
        "audio_fps": int(numbers["audio_fps"]),
        "text": " ".join(text.split()),
        "extra": flat,
        "members": members,
    }


def _measured(file: Any, sample: _Sample, video: str, audio: str | None) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for suffix in dict.fromkeys((video, audio or video)):
            offset, size = sample.places[suffix]
            place = file.tell()
            file.seek(offset)
            paths[suffix] = f"{folder}/clip.{suffix}"
            with open(paths[suffix], "wb") as copy:
                copy.write(file.read(size))
            file.seek(place)
        facts = measure(ClipFiles(paths[video], paths[audio or video], decode=False))
    if facts.picture is None:
        return None
    p = facts.picture
    rate = facts.sound.sample_rate if facts.sound is not None else 0
    return {"num_frames": p.frames, "height": p.height, "width": p.width, "fps": p.fps, "audio_fps": rate}
