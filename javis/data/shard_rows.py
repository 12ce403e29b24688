"""What is known of the clips of a shard: which shards there are, where a clip's bytes lie, and its row."""

from __future__ import annotations

from typing import Any, NamedTuple

from javis.data.manifest import ClipRow
from javis.data.store import Store


class Shard(NamedTuple):
    """A finished shard."""

    name: str
    clips: int
    bytes: int
    sha256: str


class ShardPlace(NamedTuple):
    """Where the bytes of a clip are: the shard, and per suffix offset and size."""

    shard: int
    places: dict[str, tuple[int, int]]
    names: dict[str, str]


def row_of(store: Store, shard: str, key: str, told: dict[str, Any]) -> ClipRow:
    """The row that a shard tells, with URLs of its files."""

    def url(role: str) -> str:
        suffix = told["members"].get(role)
        return "" if suffix is None else f"tar://{key}.{suffix}::{store.url(shard)}"

    columns = {name: value for name, value in told.items() if name != "members"}
    return ClipRow(path=url("video"), audio_path=url("audio"), **columns)
