"""Which file is the sample of which prompt; and data sets that are folders of clips (Landscape, AIST++).

Samples of prompts lie in one folder, named by row as the official scripts do (``sample_0000.mp4``), or by id as ``javis
sample --prompts`` does. A wav of the same name is the sound, as in the official harness, even if the mp4 has one.

MM-Diffusion (arXiv 2212.09478) evaluates on Landscape, whose clips lie in a folder for each scene, and on AIST++, whose
file names begin with the genre of the dance (``gBR_sBM_c01_..``). Neither has prompts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from javis.errors import UsageError
from javis.eval.javisbench.prompts import Problems, Prompt
from javis.eval.javisbench.taxonomy import Aspect, Taxonomy

DataSet = Literal["landscape", "aist", "folder"]
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
# AIST Dance Video Database, file names: https://aistdancedb.ongaaccel.jp/data_formats/
GENRES = {
    "BR": "Break", "PO": "Pop", "LO": "Lock", "MH": "Middle Hip-hop", "LH": "LA-style Hip-hop", "HO": "House",
    "WA": "Waack", "KR": "Krump", "JS": "Street Jazz", "JB": "Ballet Jazz",
}  # fmt: skip
_GENRE = re.compile(r"g([A-Z]{2})_s[A-Z]{2}_")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Sample:
    """A clip to be measured: its files, what was asked for (None where nothing was), and its categories."""

    key: str  # names its results; unique in a run, and a file name
    name: str  # for people
    video: Path
    audio: Path | None  # a wav that takes the place of the video's own sound
    prompt: Prompt | None
    categories: tuple[tuple[int, ...], ...]
    row: int | None = None  # of the CSV file, which is that of cached features too


def samples_of_prompts(folder: Path, prompts: Sequence[Prompt], problems: Problems) -> list[Sample]:
    """The samples of prompts in a folder. Prompts without one, and clips without a prompt, go to ``problems``.

    Of the namings by row and by id the one with more files is taken for the whole folder, so that an id cannot be
    mistaken for a row.

    Raises:
        UsageError: no such folder, or not one sample of these prompts in it.
    """
    clips = {path.stem: path for path in _videos(folder, "*")}
    namings: tuple[Callable[[Prompt], str], ...] = (lambda prompt: prompt.name, lambda p: f"sample_{p.number:04d}")
    stem_of = max(namings, key=lambda naming: sum(naming(prompt) in clips for prompt in prompts))
    samples = []
    for prompt in prompts:
        path = clips.pop(stem_of(prompt), None)
        if path is None:
            problems.add("no sample", prompt.name, f"expected {stem_of(prompt)}.mp4")
            continue
        samples.append(_sample(path, prompt.name, prompt, prompt.categories, prompt.number))
    for stem in clips:
        problems.add("sample without prompt", clips[stem].name)
    if not samples:
        names = " or ".join(f"{naming(prompts[0])}.mp4" for naming in namings)
        raise UsageError(f"{folder} holds no sample of these {len(prompts)} prompts; expected names such as {names}")
    return samples


def samples_of_tree(root: Path, layout: DataSet) -> tuple[Taxonomy, list[Sample]]:
    """All clips below a folder, and what divides them: the scene (Landscape), the genre (AIST++), or nothing.

    Raises:
        UsageError: no such folder, or no clip below it.
    """
    paths = _videos(root, "**/*")
    if not paths:
        raise UsageError(f"{root} holds no clip; expected files that end in {', '.join(VIDEOS)}")
    if layout == "folder":
        return (), [_sample(path, str(path.relative_to(root)), None, (), None) for path in paths]
    classes = [_scene(path, root) if layout == "landscape" else _genre(path) for path in paths]
    names = tuple(sorted(set(classes), key=lambda name: (name == UNKNOWN, name)))
    taxonomy = (Aspect("Scene" if layout == "landscape" else "Genre", names),)
    return taxonomy, [
        _sample(path, str(path.relative_to(root)), None, ((names.index(name),),), None)
        for path, name in zip(paths, classes, strict=True)
    ]


def _videos(root: Path, pattern: str) -> list[Path]:
    if not root.is_dir():
        raise UsageError(f"no such folder: {root}; expected a folder with clips")
    found = [path for path in root.glob(pattern) if path.suffix.lower() in VIDEOS and path.is_file()]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def _scene(path: Path, root: Path) -> str:
    """The folder of a Landscape clip; generated ones, which lie side by side, have none."""
    return UNKNOWN if path.parent == root or path.parent.name in ("train", "test") else path.parent.name


def _genre(path: Path) -> str:
    found = _GENRE.match(path.name)
    return GENRES.get(found[1], UNKNOWN) if found else UNKNOWN


def _sample(
    path: Path, name: str, prompt: Prompt | None, categories: tuple[tuple[int, ...], ...], row: int | None
) -> Sample:
    wav = path.with_suffix(".wav")
    return Sample(_key(name), name, path, wav if wav.is_file() else None, prompt, categories, row)


def _key(name: str) -> str:
    """A file name from any name; what two names share after the cleaning, their digests tell apart."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "clip"
    return clean if clean == name else f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
