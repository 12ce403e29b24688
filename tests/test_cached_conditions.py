"""`JavisPipeline.cache_conditions`: the same clip, encoders that stay where they are, files that are not trusted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from javis import JavisPipeline
from javis.clip_batch import ClipBatch
from javis.errors import UsageError

PROMPTS = ["rain falls on a tin roof", "a dog barks twice"]
ENCODERS = ("text_encoder", "prior_text_encoder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    return pipe.save_pretrained(tmp_path_factory.mktemp("toy") / "checkpoint")


@pytest.fixture(scope="module")
def plain(saved: Path) -> ClipBatch:
    """Without a cache."""
    return make(JavisPipeline.from_pretrained(saved, device="cpu"))


def make(pipe: JavisPipeline, prompts: Sequence[str] = PROMPTS, **options: Any) -> ClipBatch:
    return pipe(prompts, seed=1, steps=1, seconds=0.2, negative_prompt="noise", **options)


def loaded(saved: Path, cache: Path, **options: Any) -> tuple[JavisPipeline, list[list[str]]]:
    """A pipeline with the cache, and what its encoders are asked from now on."""
    pipe, asked = JavisPipeline.from_pretrained(saved, device="cpu", **options), []
    for name in ENCODERS:
        getattr(pipe, name).register_forward_pre_hook(lambda _, args: asked.append(list(args[0])))
    pipe.cache_conditions(cache)
    return pipe, asked


def check_same(a: ClipBatch, b: ClipBatch) -> None:
    assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
    assert a.video.std() > 1 and np.abs(a.audio).max() > 1e-3


def test_the_same_clip_in_bfloat16(saved: Path, tmp_path: Path) -> None:
    """Encoders give float32 whatever they compute in; what is kept in bfloat16 is no other number."""
    expected = make(JavisPipeline.from_pretrained(saved, device="cpu", dtype=torch.bfloat16))
    for _ in range(2):
        check_same(make(loaded(saved, tmp_path, dtype=torch.bfloat16)[0]), expected)


def test_the_same_clip_without_encoding_again(saved: Path, plain: ClipBatch, tmp_path: Path) -> None:
    first, asked = loaded(saved, tmp_path / "cache")
    check_same(make(first), plain)
    captions = first.captions(PROMPTS)
    assert asked == [captions, first.captions(["noise"], negative=True), captions]
    asked.clear()
    check_same(make(first), plain)
    second, asked_later = loaded(saved, tmp_path / "cache")  # as in another process
    check_same(make(second), plain)
    assert asked == asked_later == []
    make(second, [*PROMPTS, "thunder"])
    assert asked_later == [second.captions(["thunder"])] * 2  # only what is new


def test_a_file_of_other_content_is_not_used(
    saved: Path, plain: ClipBatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, _ = loaded(saved, tmp_path)
    make(pipe)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 + 2 + 1
    files[0].write_bytes(files[0].read_bytes()[:-40])
    files[1].write_bytes(b"")
    files[2].write_bytes(files[3].read_bytes())  # of another caption
    again, asked = loaded(saved, tmp_path)
    with caplog.at_level(logging.WARNING):
        check_same(make(again), plain)
    assert sum(map(len, asked)) == 3 and caplog.text.count("is not usable") >= 3
    assert all(load_file(path) for path in files)


def test_hidden_states_of_the_cache_are_those_that_are_used(saved: Path, plain: ClipBatch, tmp_path: Path) -> None:
    """Other numbers under the right key make another clip: nothing is encoded behind the cache's back."""
    pipe, _ = loaded(saved, tmp_path)
    make(pipe)
    for path in tmp_path.glob("*.safetensors"):
        entry = load_file(path)
        save_file(entry | {"hidden": 3 - entry["hidden"]}, path, {"key": path.stem})
    assert not np.array_equal(make(loaded(saved, tmp_path)[0]).video, plain.video)


@pytest.mark.parametrize("policy", ["offload", "staged"])
def test_an_encoder_that_is_not_needed_is_not_brought_in(
    saved: Path, plain: ClipBatch, tmp_path: Path, policy: Any
) -> None:
    make(loaded(saved, tmp_path)[0])
    pipe, _ = loaded(saved, tmp_path, residency=policy)
    brought: list[str] = []
    bring = pipe.residency._bring_in
    pipe.residency._bring_in = lambda name: (brought.append(name), bring(name))[1]  # type: ignore[method-assign]
    check_same(make(pipe), plain)
    assert "model" in brought and "prior" in brought and not set(brought) & set(ENCODERS)
    make(pipe, ["thunder"])  # one that is new, so they come after all
    assert set(brought) >= set(ENCODERS)


def test_another_dtype_has_keys_of_its_own(saved: Path, plain: ClipBatch, tmp_path: Path) -> None:
    """Hidden states in bfloat16 must not be kept as if they were those of float32."""
    pipe, asked = loaded(saved, tmp_path)
    pipe.to(dtype=torch.bfloat16)
    make(pipe)
    assert len(asked) == 3
    entries = [load_file(path)["hidden"] for path in tmp_path.glob("*.safetensors")]
    assert {hidden.dtype for hidden in entries} == {torch.bfloat16}
    wide, asked_wide = loaded(saved, tmp_path)
    check_same(make(wide), plain)
    assert len(asked_wide) == 3


def test_only_a_checkpoint_folder_tells_encoders_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a full-size checkpoint folder"):
        JavisPipeline.with_random_weights("toy", device="cpu").cache_conditions(tmp_path)
    with pytest.raises(UsageError, match="needs a full-size checkpoint folder"):
        JavisPipeline.from_pretrained("demo").cache_conditions(tmp_path)
    assert list(tmp_path.iterdir()) == []
