"""Shards: clips in tar files as the webdataset package has them, in a folder or at any URL that fsspec knows.

    OUT/shard-000000.tar    KEY.mp4, KEY.wav, KEY.txt (caption), KEY.json (the row), KEY.side.json; ...
    OUT/shard-000000.json   record of that shard: sha256, size, and for each clip its row and where its bytes are
    OUT/index.json          all shards; written last

A shard counts when its record is there, and the set when the index is. The same manifest makes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from javis.data.excerpt import Place, Slice
from javis.data.foreign_shards import index_foreign
from javis.data.manifest import ClipMedia, ClipRow, Manifest, side_path
from javis.data.shard_rows import Shard, ShardPlace, row_of
from javis.data.store import Store
from javis.errors import FailedError, UsageError

FORMAT, VERSION = "javis shards", 1
INDEX = "index.json"
SHARD_BYTES, SHARD_CLIPS = 1 << 30, 10_000


class Written(NamedTuple):
    """What `write_shards` did."""

    shards: tuple[Shard, ...]
    written: int
    skipped: int  # were there already

    @property
    def clips(self) -> int:
        return sum(shard.clips for shard in self.shards)


class _Member(NamedTuple):
    """A file of a clip on its way into a tar: its suffix there, and where it comes from."""

    suffix: str
    source: str | bytes
    size: int


class _Planned(NamedTuple):
    """A clip on its way into a tar."""

    key: str
    row: dict[str, Any]
    members: tuple[_Member, ...]


# -- writing ----------------------------------------------------------------------------------------------------------


def write_shards(
    manifest: Manifest,
    out: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_clips: int = SHARD_CLIPS,
    seed: int | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the clips of a manifest as shards; a second call goes on where the first stopped.

    Args:
        manifest: the clips; a side file (`javis.data.manifest.side_path`) goes along.
        out: folder or fsspec URL.
        shard_bytes: a shard ends before the clip that would make it larger; one clip may be larger than that.
        shard_clips: most clips in a shard.
        seed: shuffles the clips; None: in the order of the manifest.
        verify: reads the shards that are there, and writes those again whose sha256 is another one.
        progress: called with (shards done, shards in all).

    Raises:
        UsageError: files that are missing, or ``out`` holds shards of other clips.
        FailedError: a file changed while it was read.
    """
    if shard_bytes < 1 or shard_clips < 1:
        raise UsageError(f"shards need at least one byte and clip, got {shard_bytes} bytes and {shard_clips} clips")
    store = Store(out)
    planned = _plan(manifest, seed)
    parts = list(_split(planned, shard_bytes, shard_clips))
    plans = [_digest(part) for part in parts]
    index = store.read_json(INDEX)
    if index is not None and (index.get("format") != FORMAT or [s["plan"] for s in index["shards"]] != plans):
        raise UsageError(f"{out} holds shards of other clips or sizes; choose another place or remove them")
    store.prepare()
    finished: list[Shard] = []
    written = 0
    for number, (part, plan) in enumerate(zip(parts, plans, strict=True)):
        name = f"shard-{number:06d}"
        shard = _finished(store, name, plan, verify)
        if shard is None:
            shard = _write_shard(store, name, part, plan)
            written += 1
        finished.append(shard)
        if progress is not None:
            progress(number + 1, len(parts))
    for stale in store.names("shard-*.json"):  # of an earlier attempt with more shards, which has no index
        if int(stale[6:12]) >= len(parts):
            store.remove(stale.replace(".json", ".tar"))
            store.remove(stale)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "clips": len(planned),
        "bytes": sum(shard.bytes for shard in finished),
        "shards": [{**shard._asdict(), "plan": plan} for shard, plan in zip(finished, plans, strict=True)],
    }
    store.write_json(INDEX, facts)
    return Written(tuple(finished), written, len(parts) - written)


def _plan(manifest: Manifest, seed: int | None) -> list[_Planned]:
    order = list(range(len(manifest)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    planned: list[_Planned] = []
    missing: list[str] = []
    for index in order:
        row = manifest[index]
        try:
            planned.append(_clip(row, f"{index:09d}"))
        except (OSError, UsageError) as error:
            missing.append(f"{row.id} ({error})")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"clips cannot be read: {', '.join(missing[:3])}{more}; 'javis data check' writes a manifest without them"
        )
    return planned


def _clip(row: ClipRow, key: str) -> _Planned:
    names = {"video": _suffix(row.path) or "mp4"}
    members = [_Member(names["video"], row.path, Store.size_of(row.path))]
    if row.audio_path == row.path:
        names["audio"] = names["video"]
    elif row.audio_path:
        names["audio"] = _suffix(row.audio_path) or "wav"
        if names["audio"] in (names["video"], "txt", "json"):
            names["audio"] = f"audio.{names['audio']}"
        members.append(_Member(names["audio"], row.audio_path, Store.size_of(row.audio_path)))
    side = side_path(row)
    if side is not None and side.is_file():
        names["side"] = "side.json"
        members.append(_Member(names["side"], str(side), Store.size_of(str(side))))
    # Paths of this machine mean nothing in a shard.
    told = {name: value for name, value in asdict(row).items() if name not in ("path", "audio_path")}
    told["extra"] = {name: value for name, value in row.extra.items() if value}  # an empty cell is as good as none
    told["members"] = names
    for suffix, content in (("txt", row.text), ("json", json.dumps(told, sort_keys=True))):
        data = content.encode()
        members.append(_Member(suffix, data, len(data)))
    return _Planned(key, told, tuple(members))


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower().lstrip(".")


def _split(planned: Sequence[_Planned], shard_bytes: int, shard_clips: int) -> Iterator[list[_Planned]]:
    part: list[_Planned] = []
    size = 0
    for clip in planned:
        own = sum(512 + member.size + -member.size % 512 for member in clip.members)
        whole = size + own + 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar, and it is filled up to whole records
        if part and (whole + -whole % tarfile.RECORDSIZE > shard_bytes or len(part) == shard_clips):
            yield part
            part, size = [], 0
        part.append(clip)
        size += own
    if part:
        yield part


def _digest(part: Sequence[_Planned]) -> str:
    """Of what a shard is to hold: rows and sizes, not the bytes."""
    told = [[clip.key, clip.row, [(member.suffix, member.size) for member in clip.members]] for clip in part]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _finished(store: Store, name: str, plan: str, verify: bool) -> Shard | None:
    record = store.read_json(f"{name}.json")
    if record is None or record.get("plan") != plan or store.size(f"{name}.tar") != record["bytes"]:
        return None
    if verify and store.sha256(f"{name}.tar") != record["sha256"]:
        return None
    return Shard(f"{name}.tar", len(record["clips"]), record["bytes"], record["sha256"])


class _Hashed(io.RawIOBase):
    """A file that is written through, hashed and counted."""

    def __init__(self, file: Any) -> None:
        self.file, self.hash, self.count = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.count += len(data)
        self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.count


def _write_shard(store: Store, name: str, part: Sequence[_Planned], plan: str) -> Shard:
    store.remove(f"{name}.json")  # the old record must not describe the new shard
    clips: list[dict[str, Any]] = []
    with store.writing(f"{name}.tar") as file:
        hashed = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for clip in part:
                places: dict[str, tuple[int, int]] = {}
                for member in clip.members:
                    info = tarfile.TarInfo(f"{clip.key}.{member.suffix}")  # no date, no owner: the same bytes always
                    info.size, info.mode = member.size, 0o644
                    places[member.suffix] = (tar.offset + 512, member.size)
                    _add(tar, info, member)
                clips.append({"key": clip.key, "row": clip.row, "places": places})
        shard = Shard(f"{name}.tar", len(part), hashed.count, hashed.hash.hexdigest())
    record = {"format": FORMAT, "version": VERSION, "plan": plan, **shard._asdict(), "clips": clips}
    store.write_json(f"{name}.json", record)
    return shard


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, member: _Member) -> None:
    if isinstance(member.source, bytes):
        tar.addfile(info, io.BytesIO(member.source))
        return
    with Store.open_source(member.source) as source:
        try:
            tar.addfile(info, source)
        except OSError as error:
            if "unexpected end" not in str(error):
                raise
            raise FailedError(f"{member.source} became shorter while it was read; run the command again") from None
        if source.read(1):
            raise FailedError(f"{member.source} became longer while it was read; run the command again")


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardedManifest(Manifest):
    """The clips of shards. Rows as in any manifest; their paths are fsspec URLs into the tar files.

    `media` gives the bytes of a clip with one read per file, `stream` those of whole shards from front to back.
    """

    where: str = ""
    shards: tuple[Shard, ...] = ()
    places: tuple[ShardPlace, ...] = ()

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> ShardedManifest:
        """Read the index of shards at a folder or URL, or that of tar files which webdataset has written.

        Tar files without an index are read through once; clips need a video (mp4, webm, ...), and may have a sound
        file, a caption (txt) and a json with columns of the manifest.

        Raises:
            UsageError: no shards there, or shards that are not finished.
        """
        store = Store(os.fspath(where).removesuffix(f"/{INDEX}"))
        index = store.read_json(INDEX)
        if index is None:
            if store.names("shard-*.json"):
                raise UsageError(f"the shards at {where} are not finished; run 'javis data shard' again")
            return cls(*index_foreign(store))
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UsageError(f"{where}: {INDEX} is not of {FORMAT!r} version {VERSION}")
        rows: list[ClipRow] = []
        places: list[ShardPlace] = []
        shards: list[Shard] = []
        for number, told in enumerate(index["shards"]):
            shard = Shard(*(told[name] for name in Shard._fields))
            record = store.read_json(shard.name.replace(".tar", ".json"))
            if record is None or record["sha256"] != shard.sha256:
                raise UsageError(
                    f"{where}: the record of {shard.name} is not the index's; run 'javis data shard' again"
                )
            shards.append(shard)
            for clip in record["clips"]:
                own = {suffix: (place[0], place[1]) for suffix, place in clip["places"].items()}
                rows.append(row_of(store, shard.name, clip["key"], clip["row"]))
                places.append(ShardPlace(number, own, clip["row"]["members"]))
        return cls(tuple(rows), str(where), tuple(shards), tuple(places))

    @property
    def store(self) -> Store:
        """Where the shards are."""
        return Store(self.where.removesuffix(f"/{INDEX}"))

    def slices(self, index: int) -> tuple[Place, Place]:
        """Where picture and sound of a clip lie in its tar file; the sound is "" if there is none."""
        place, store = self.places[index], self.store
        name = self.shards[place.shard].name
        file = str(store.folder / name) if store.is_local else store.url(name)

        def part(role: str) -> Place:
            suffix = place.names.get(role)
            return "" if suffix is None else Slice(file, *place.places[suffix])

        return part("video"), part("audio")

    def media(self, index: int) -> ClipMedia:
        """The bytes of a clip, one read per file."""
        place = self.places[index]
        with self.store.reading(self.shards[place.shard].name) as file:
            return self._media(file, place)

    def stream(self, shards: Sequence[int] | None = None) -> Iterator[tuple[ClipRow, ClipMedia]]:
        """Row and bytes of every clip of some shards (None: all), in the order in which they lie."""
        by_shard: dict[int, list[int]] = {}
        for index, place in enumerate(self.places):
            by_shard.setdefault(place.shard, []).append(index)
        for number in range(len(self.shards)) if shards is None else shards:
            with self.store.reading(self.shards[number].name) as file:
                for index in by_shard.get(number, []):
                    yield self.rows[index], self._media(file, self.places[index])

    def verify(self) -> list[str]:
        """Names of shards whose bytes are not those of the index; reads all of them."""
        return [shard.name for shard in self.shards if self.store.sha256(shard.name) != shard.sha256]

    def _media(self, file: Any, place: ShardPlace) -> ClipMedia:
        def read(role: str) -> bytes | None:
            suffix = place.names.get(role)
            if suffix is None or (role == "audio" and suffix == place.names["video"]):
                return None
            offset, size = place.places[suffix]
            file.seek(offset)
            data = file.read(size)
            if len(data) != size:
                name = self.shards[place.shard].name
                raise FailedError(f"{self.where}: {name} ends too early; 'javis data shard --verify' writes it again")
            return bytes(data)

        video = read("video")
        assert video is not None
        return ClipMedia(video, read("audio"), read("side"))


def holds_clips(where: str | os.PathLike[str]) -> bool:
    """Whether `open_clips` is for what is at a path, folder or URL: a CSV file, or tar files, whoever wrote them, and
    not what ``javis data encode`` wrote."""
    if os.fspath(where).endswith(".csv"):
        return True
    store = Store(where)
    index = store.read_json(INDEX)
    return bool(store.names("*.tar")) if index is None else index.get("format") == FORMAT


def open_clips(where: str | os.PathLike[str]) -> Manifest:
    """The clips of a CSV file, or of shards at a folder or URL."""
    return Manifest.read(where) if os.fspath(where).endswith(".csv") else ShardedManifest.open(where)
