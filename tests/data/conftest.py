"""Clips and their latents, made once for all tests of this folder that ask for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from javis.data.encode import encode_manifest
from javis.data.encoders import Encoders, load_encoders
from javis.data.make_manifest import scan
from javis.data.manifest import Manifest
from javis.world.make import make
from tests.data.encoding import COLOURS, GOOD, PLAN
from tests.data.feeding import CLIPS, SEED
from tests.data.media_files import pictures, tone, write_video, write_wav


@pytest.fixture(scope="session")
def demo() -> Encoders:
    return load_encoders("demo")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Eight clips of half a second; a broken file and a caption with an unknown word between them."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(GOOD):
        write_video(folder / f"clip{i}.mp4", pictures(8, i))
        write_wav(folder / f"clip{i}.wav", tone(0.5, i))
        (folder / f"clip{i}.txt").write_text(f"A {COLOURS[i % 6]} ball bounces" + " on the left" * (i > 5))
    rows = list(scan(folder, processes=1).manifest)
    (folder / "broken.mp4").write_bytes(b"no video")
    broken = dataclasses.replace(rows[0], id="broken", path=str(folder / "broken.mp4"))
    unknown = dataclasses.replace(rows[1], id="unknown", text="a red unicorn bounces")
    return Manifest((rows[0], broken, *rows[1:5], unknown, *rows[5:]))


@pytest.fixture(scope="session")
def latents(manifest: Manifest, demo: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "set"
    done = encode_manifest(manifest, out, demo, PLAN, processes=1)
    assert (done.clips, done.shards, done.written, done.is_finished) == (GOOD, 4, 4, True)
    assert {clip.id: clip.reason.split(":")[0] for clip in done.skipped} == {
        "broken": "BadClip", "unknown": done.skipped[1].reason.split(":")[0],
    }  # fmt: skip
    assert "unicorn" in done.skipped[1].reason
    return out


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips of the synthetic world; read only."""
    folder = tmp_path_factory.mktemp("world")
    make(folder, CLIPS, seed=SEED)
    return folder
