"""Reading JavisBench.csv and files of its form."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from javis.errors import UsageError
from javis.eval.javisbench import SAMPLE_PROMPTS
from javis.eval.javisbench.prompts import Problems, read_prompts
from javis.eval.javisbench.taxonomy import OFFICIAL, Aspect, read_taxonomy
from javis.requests import read_requests
from javis.world import parse_prompt

HEADER = "path,text,audio_path,audio_text,cat0_ind,cat1_ind,cat2_ind,cat3_ind,cat4_ind\n"


def read(tmp_path: Path, text: str):
    path = tmp_path / "JavisBench.csv"
    path.write_text(text, encoding="utf-8")
    problems = Problems()
    return read_prompts(path, OFFICIAL, problems), problems


def test_the_taxonomy_is_the_papers() -> None:
    """5 aspects, 19 categories (arXiv 2503.23377, section 4.1)."""
    assert [len(aspect.categories) for aspect in OFFICIAL] == [5, 3, 5, 3, 3]
    assert sum(len(aspect.categories) for aspect in OFFICIAL) == 19


def test_official_columns(tmp_path: Path) -> None:
    """Rows are numbered from 0; a cell may name several categories; what is heard falls back to the text."""
    table, problems = read(
        tmp_path,
        HEADER + 'a.mp4,"Rain, and thunder",a.wav,rain,0,0,"0,2","0,2",2\n' + "b.mp4,A dog barks,,,2.0,1,1,0,\n",
    )
    first, second = table.prompts
    assert table.rows == 2 and [p.number for p in table.prompts] == [0, 1]
    assert first.categories == ((0,), (0,), (0, 2), (0, 2), (2,))
    assert (first.text, first.audio_text, first.path, first.audio_path) == (
        "Rain, and thunder",
        "rain",
        "a.mp4",
        "a.wav",
    )
    assert second.categories == ((2,), (1,), (1,), (0,), ())  # pandas writes 2.0; no category in the last aspect
    assert second.audio_text == "A dog barks" and second.audio_path is None
    assert first.name == "0001-rain-and-thunder"  # as javis sample --prompts names it
    assert problems.found == {}


def test_bad_rows_are_named_and_keep_their_number(tmp_path: Path) -> None:
    table, problems = read(
        tmp_path,
        "id,text,audio_text,cat0_ind,cat1_ind,cat2_ind,cat3_ind,cat4_ind\n"
        "a,one,x,0,0,0,0,0\n"
        "a,two,x,0,0,0,0,0\n"
        "c,,x,0,0,0,0,0\n"
        "d,four, with a comma,0,0,0,0,0,0\n"
        "e,five,x,5,0,speech,0,-1\n",
    )
    assert [(p.name, p.number) for p in table.prompts] == [("a", 0), ("e", 4)]
    assert table.rows == 5
    found = problems.json()
    assert found["duplicate id"] == {"count": 1, "names": {"a (line 3)": "already on line 2, which is kept"}}
    assert list(found["unusable row"]["names"]) == ["line 4", "line 5"]
    assert list(found["unknown category"]["names"]) == ["line 6: cat0_ind", "line 6: cat2_ind", "line 6: cat4_ind"]
    assert table.prompts[1].categories == ((), (0,), (), (0,), ())


def test_missing_columns_are_named(tmp_path: Path) -> None:
    table, problems = read(tmp_path, "id,text,cat1_ind\na,one,1\n")
    assert table.prompts[0].categories == ((), (1,), (), (), ())
    assert set(problems.found["missing column"]) == {"cat0_ind", "cat2_ind", "cat3_ind", "cat4_ind", "audio_text"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("id,caption\na,one\n", "needs one column"),
        ("id,text\n", "no usable row"),
        ("id,text\na,\n", "no usable row"),
        ("", "needs one column"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, text)


def test_category_file(tmp_path: Path) -> None:
    path = tmp_path / "category.json"
    path.write_text('[{"aspect": "A", "categories": [{"title": "x"}, {"title": "y"}]}]')
    assert read_taxonomy(path) == (Aspect("A", ("x", "y")),)
    for text in ('{"aspect": "A"}', "[]", "no json", '[{"aspect": "A", "categories": []}]'):
        path.write_text(text)
        with pytest.raises(UsageError, match="category.json"):
            read_taxonomy(path)


def test_the_shipped_prompts() -> None:
    """20 prompts that the built-in model can make, with every aspect, and every category that its world has."""
    problems = Problems()
    table = read_prompts(SAMPLE_PROMPTS, OFFICIAL, problems)
    assert len(table.prompts) == table.rows == 20 and not problems.found
    requests, faults = read_requests(SAMPLE_PROMPTS)
    assert [r.stem for r in requests] == [p.name for p in table.prompts] and not faults
    used: list[set[int]] = [set() for _ in OFFICIAL]
    for prompt in table.prompts:
        clauses = parse_prompt(prompt.text)
        assert all(prompt.categories)
        for found, categories in zip(used, prompt.categories, strict=True):
            found.update(categories)
        unseen = any(clause["visible"] is False for clause in clauses)
        assert (2 in prompt.categories[3]) == unseen  # off-screen sound
        heard = [clause for clause in clauses if clause["audible"]]
        assert (prompt.categories[4] == (0,)) == (len(heard) == 1)  # one source that sounds
    assert [len(found) for found in used] == [1, 1, 2, 3, 3]  # flat shapes in no place: virtual, 2D; no speech, ...


def test_the_shipped_file_has_the_official_columns() -> None:
    with SAMPLE_PROMPTS.open(newline="") as file:
        header = next(csv.reader(file))
    assert {"id", "text", "video_text", "audio_text", *(f"cat{a}_ind" for a in range(5))} == set(header)
