"""``javis convert``: exit codes, one line of error, the table and the json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from javis.cli import LATER, main
from javis.convert import KINDS
from javis.convert.command import ConvertArgs

from .official import STDIT3, dit_state, prior_state, write_folder


def test_it_is_a_command_now(capsys: Any) -> None:
    assert "convert" not in LATER
    assert main(["convert", "--help"]) == 0
    assert "--no-strict" in capsys.readouterr().out
    assert get_args(get_type_hints(ConvertArgs)["kind"]) == ("auto", *KINDS)


def test_the_table(tmp_path: Path, capsys: Any) -> None:
    state = dit_state(depth=1)
    state["extra.weight"] = torch.zeros(2)
    source = write_folder(tmp_path / "jav", state)
    assert main(["convert", str(source), str(tmp_path / "out"), "--no-strict"]) == 0
    out = capsys.readouterr().out
    assert "spatial_blocks.{i}.attn.*" in out and "layers.{i}.video_spatial.*" in out
    assert "unexpected: 1" in out and "extra.weight" in out
    assert "assumed input_sq_size = 512" in out


def test_the_table_tells_what_a_branch_lacks_by_module(tmp_path: Path, capsys: Any) -> None:
    source = write_folder(tmp_path / "video", dit_state(STDIT3, depth=3))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "absent: 112" in out
    assert "  transformer/layers.{i}.audio_spatial.* (51)\n" in out
    assert "  transformer/embed.audio_text.* (5)\n" in out
    assert "rope.freqs: follows from the sizes" in out
    assert "not complete and not in model_index.json yet" in out


def test_the_json(tmp_path: Path, capsys: Any) -> None:
    source = write_folder(tmp_path / "prior", prior_state())
    assert main(["convert", str(source), str(tmp_path / "out"), "--json", "--dtype", "float16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "prior" / "conversion.json").read_text()) and said["written"]
    assert said["counts"]["used"] == len(prior_state()) and said["counts"]["missing"] == 0
    row = next(row for row in said["used"] if row["source"] == "in_proj.weight")
    assert row == {
        "component": "prior", "source": "in_proj.weight", "target": "in_proj.weight", "shape": [16, 16],
        "dtype": "float16", "renamed": False, "tied": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone", "out"], 2, "there is no gone"),
        (["prior"], 2, "required"),
        (["prior", "prior"], 2, "source and destination are both"),
        (["prior", "out", "--kind", "lora"], 2, "kind"),
        (["broken", "out"], 1, "missing prior/in_proj.bias"),
        (["malicious.bin", "out"], 2, "refused"),
    ],
)
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("prior"), prior_state())
    write_folder(Path("broken"), {n: v for n, v in prior_state().items() if n != "in_proj.bias"})
    torch.save({"a": Path("x")}, "malicious.bin")
    assert main(["convert", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("out").exists()
