"""Hidden states on disk: the same bits as computed, no half files, bad files replaced, a bounded size."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from javis import condition_cache
from javis.condition_cache import CachedTextEncoder, ConditionCache, component_identity
from javis.errors import UsageError


class Encoder:
    """Random hidden states that depend on the caption alone; remembers what it was asked."""

    def __init__(self, length: int = 5) -> None:
        self.asked: list[list[str]] = []
        self.length = length

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.asked.append(list(captions))
        rows = [
            torch.randn(
                self.length, 4, generator=torch.Generator().manual_seed(sum(caption.encode("utf-8", "surrogatepass")))
            )
            for caption in captions
        ]
        lengths = torch.tensor([1 + len(caption) % self.length for caption in captions])
        return torch.stack(rows), torch.arange(self.length) < lengths[:, None]


def cached(
    folder: Path, limit: int = 1 << 20, identity: str = "t5", dtype: torch.dtype = torch.float32
) -> CachedTextEncoder:
    return CachedTextEncoder(Encoder(), ConditionCache(folder, limit=limit), identity=identity, dtype=dtype)


def check(encoder: CachedTextEncoder, captions: list[str], computed: list[str]) -> None:
    """The bits are those of the encoder, which was asked for ``computed`` alone, in one batch."""
    inner = encoder.encoder
    assert isinstance(inner, Encoder)
    before = len(inner.asked)
    hidden, mask = encoder(captions)
    assert inner.asked[before:] == ([computed] if computed else [])
    expected, expected_mask = Encoder()(captions)
    assert torch.equal(hidden, expected.to(encoder.dtype)) and torch.equal(mask, expected_mask)
    assert hidden.dtype == encoder.dtype and mask.dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_missing_captions_are_encoded(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = cached(tmp_path, dtype=dtype)
    check(encoder, ["a", "b", "a"], ["a", "b"])
    check(encoder, ["b", "c", "a"], ["c"])
    assert (encoder.hits, encoder.misses) == (2, 3)
    again = cached(tmp_path, dtype=dtype)  # another process
    check(again, ["c", "b", "a", "a"], [])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".safetensors"] * 3


def test_keys_hold_caption_encoder_and_dtype(tmp_path: Path) -> None:
    check(cached(tmp_path), ["ab"], ["ab"])
    check(cached(tmp_path, identity="clip"), ["ab"], ["ab"])
    check(cached(tmp_path, dtype=torch.bfloat16), ["ab"], ["ab"])
    check(cached(tmp_path), ["ab ", "Ab"], ["ab ", "Ab"])
    check(cached(tmp_path, identity="t5a"), ["b"], ["b"])
    assert cached(tmp_path, identity="t5a").key("b") != cached(tmp_path, identity="t5").key("ab")
    check(cached(tmp_path), ["", "名前", "x" * 10_000, "\ud800"], ["", "名前", "x" * 10_000, "\ud800"])


def damage(path: Path, how: str, key: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(os.urandom(200))
    elif how == "of another caption":
        save_file({"hidden": torch.zeros(5, 4), "mask": torch.ones(5, dtype=torch.bool)}, path, {"key": "other"})
    elif how == "other dtype":
        save_file({"hidden": torch.zeros(5, 4).half(), "mask": torch.ones(5, dtype=torch.bool)}, path, {"key": key})
    elif how == "no mask":
        save_file({"hidden": torch.zeros(5, 4)}, path, {"key": key})
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "noise", "of another caption", "other dtype", "no mask", "a folder"]
)
def test_a_file_that_is_not_usable_is_made_again(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = cached(tmp_path)
    check(encoder, ["a"], ["a"])
    (path,) = tmp_path.iterdir()
    damage(path, how, encoder.key("a"))
    with caplog.at_level(logging.WARNING):
        check(cached(tmp_path), ["a", "b"], ["a", "b"])
    if how not in ("other dtype", "no mask"):
        assert "not usable" in caplog.text and str(path) in caplog.text
    if how != "a folder":  # which is not ours to remove
        check(cached(tmp_path), ["a", "b"], [])


def test_the_size_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    check(cached(tmp_path), ["a"], ["a"])
    size = next(tmp_path.iterdir()).stat().st_size
    encoder = cached(tmp_path, limit=3 * size + size // 2)
    for i, caption in enumerate(("a", "b", "c")):
        encoder([caption])
        os.utime(encoder.cache.path(encoder.key(caption)), ns=(i, i + 1))
    check(encoder, ["a"], [])  # used again: now the newest
    encoder(["d"])
    assert len(list(tmp_path.iterdir())) == 3
    check(encoder, ["a", "c", "d"], [])
    check(encoder, ["b"], ["b"])
    tiny = cached(tmp_path, limit=1)
    check(tiny, ["z"], ["z"])  # nothing fits: still right
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_later(tmp_path: Path) -> None:
    old, new, other = tmp_path / ".x.safetensors", tmp_path / ".y.safetensors", tmp_path / "notes.txt"
    for path in (old, new, other):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * condition_cache.LEFTOVER_SECONDS,) * 2)
    cached(tmp_path)(["a"])
    assert not old.exists() and new.exists() and other.exists()


def test_a_full_disk_costs_the_entry_not_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(condition_cache, "save_file", full)
    with caplog.at_level(logging.WARNING):
        check(cached(tmp_path), ["a"], ["a"])
    assert "No space left" in caplog.text and list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object, path: Path, *__: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(condition_cache, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path)(["a"])
    assert list(tmp_path.iterdir()) == []
    check(cached(tmp_path), ["a"], ["a"])


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        ConditionCache(tmp_path / "file")
    with pytest.raises(UsageError, match="at least 1 byte, got 0"):
        ConditionCache(tmp_path, limit=0)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(UsageError):
            ConditionCache(tmp_path / "closed")
    assert ConditionCache(tmp_path / "new" / "folder").folder.is_dir()


def test_encoders_of_different_lengths_are_not_mixed(tmp_path: Path) -> None:
    cached(tmp_path)(["a"])
    longer = CachedTextEncoder(Encoder(7), ConditionCache(tmp_path), identity="t5", dtype=torch.float32)
    with pytest.raises(ValueError, match="different shapes"):
        longer(["a", "b"])


def _many(folder: str, number: int) -> None:
    encoder = cached(Path(folder), limit=20_000)
    for i in range(40):
        check_captions = [f"{(i * (number + 1)) % 13}", "shared"]
        hidden, _ = encoder(check_captions)
        assert torch.equal(hidden, Encoder()(check_captions)[0])


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Two write, read and remove the same few files."""
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_many, args=(str(tmp_path), number)) for number in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0]


def test_the_identity_of_a_component(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    weights = tmp_path / "sub" / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    first = component_identity(tmp_path)
    assert component_identity(tmp_path) == first
    found = {first}
    for at in (0, (3 << 20) - 1):
        data = bytearray(3 << 20)
        data[at] = 1
        weights.write_bytes(data)
        found.add(component_identity(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    found.add(component_identity(tmp_path))
    weights.rename(tmp_path / "model.safetensors")
    found.add(component_identity(tmp_path))
    assert len(found) == 5
    with pytest.raises(UsageError, match="no folder of a component"):
        component_identity(tmp_path / "missing")
