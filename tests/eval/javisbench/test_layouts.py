"""Which file is whose sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from javis.errors import UsageError
from javis.eval.javisbench.layouts import samples_of_prompts, samples_of_tree
from javis.eval.javisbench.prompts import Problems, Prompt


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(number, name, name, name, name, ((0,),)) for number, name in enumerate(names)]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_by_row(tmp_path: Path) -> None:
    """As the official scripts write them, with a wav beside; what is missing and what is left over is named."""
    touch(tmp_path, "sample_0000.mp4", "sample_0000.wav", "sample_0002.mp4", "sample_0009.mp4", ".hidden.mp4", "b.png")
    problems = Problems()
    found = samples_of_prompts(tmp_path, prompts("a", "b", "c"), problems)
    assert [(s.name, s.video.name, s.row) for s in found] == [("a", "sample_0000.mp4", 0), ("c", "sample_0002.mp4", 2)]
    assert found[0].audio == tmp_path / "sample_0000.wav" and found[1].audio is None
    assert problems.found == {
        "no sample": {"b": "expected sample_0001.mp4"},
        "sample without prompt": {"sample_0009.mp4": ""},
    }


def test_by_id_even_if_ids_look_like_rows(tmp_path: Path) -> None:
    """Ids in another order than the rows: the file of an id is never taken for that of a row."""
    touch(tmp_path, "sample_0001.mp4", "sample_0000.mp4", "sample_0005.mp4")
    found = samples_of_prompts(tmp_path, prompts("sample_0001", "sample_0005", "sample_0000"), Problems())
    assert [(s.row, s.video.stem) for s in found] == [(0, "sample_0001"), (1, "sample_0005"), (2, "sample_0000")]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.mp4 or sample_0000\.mp4"):
        samples_of_prompts(tmp_path, prompts("a"), Problems())
    with pytest.raises(UsageError, match="no such folder"):
        samples_of_prompts(tmp_path / "x", prompts("a"), Problems())
    with pytest.raises(UsageError, match="holds no clip"):
        samples_of_tree(tmp_path, "folder")


def test_landscape(tmp_path: Path) -> None:
    """A folder for each scene, below train or not; generated clips, side by side, have none."""
    touch(tmp_path, "train/raining/a.mp4", "train/raining/b.mp4", "train/thunder/a.mp4", "c.mp4")
    taxonomy, found = samples_of_tree(tmp_path, "landscape")
    assert taxonomy[0].categories == ("raining", "thunder", "unknown")
    assert {s.name: taxonomy[0].categories[s.categories[0][0]] for s in found} == {
        "train/raining/a.mp4": "raining",
        "train/raining/b.mp4": "raining",
        "train/thunder/a.mp4": "thunder",
        "c.mp4": "unknown",
    }
    assert len({s.key for s in found}) == 4 and not any("/" in s.key for s in found)


def test_aist(tmp_path: Path) -> None:
    """The genre is in the name (AIST Dance Video Database)."""
    touch(tmp_path, "gBR_sBM_c01_d04_mBR0_ch01.mp4", "gJB_sFM_c01_d09_mJB5_ch21.mp4", "gXX_sBM_c01.mp4", "7.mp4")
    taxonomy, found = samples_of_tree(tmp_path, "aist")
    assert [taxonomy[0].categories[s.categories[0][0]] for s in found] == ["unknown", "Break", "Ballet Jazz", "unknown"]


def test_keys_tell_names_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a/b.mp4", "a-b.mp4", "a b.mp4")
    _, found = samples_of_tree(tmp_path, "folder")
    assert len({s.key for s in found}) == 3
