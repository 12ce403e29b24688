"""``javis sample`` under torchrun, as it is used: real processes, gloo, a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from javis.media import read_clip
from tests.parallel.processes import Process, wait_all
from tests.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.slow
QUICK = ("--steps", "2", "--seconds", "0.5", "--resolution", "64x64", "--checkpoint", "checkpoint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrun")
    write_tiny_checkpoint(path)
    return path


def sample(folder: Path, processes: int, *arguments: str, module: str = "javis", restarts: int = 0) -> tuple[int, str]:
    """Exit code and output of ``torchrun --nproc-per-node N -m javis sample ...``; of one process without torchrun."""
    counts = ("--nproc-per-node", str(processes), "--max-restarts", str(restarts))
    launch = ("-m", "torch.distributed.run", "--standalone", *counts) if processes > 1 else ()
    command = [*launch, "-m", module, "sample", *arguments, *QUICK]
    process = Process(command, folder / "log.txt", {"TORCH_CPP_LOG_LEVEL": "ERROR"}, cwd=folder)
    code = wait_all([process], timeout=240)[0]
    return code, process.output


def test_a_clip_made_by_four_processes_is_that_of_one(folder: Path) -> None:
    """Guidance over two processes, tokens over two."""
    for processes, options in ((1, ()), (4, ("--cfg-parallel", "2", "--seq-parallel", "2"))):
        code, said = sample(folder, processes, "a red ball bounces on the left", "--out", f"{processes}.mp4", *options)
        assert code == 0, said
        assert said.count(f"{processes}.mp4") == 1, "one of them writes it"
    one, four = read_clip(folder / "1.mp4"), read_clip(folder / "4.mp4")
    assert one.video.std() > 1 and np.abs(one.audio).max() > 1e-3
    # Rounding may move a value to the next of 256 levels, which the encoder may make a little more of.
    assert np.abs(one.video.astype(int) - four.video.astype(int)).max() <= 4
    np.testing.assert_allclose(one.audio, four.audio, atol=1e-2)


def test_a_bad_row_of_one_process_does_not_end_the_others(folder: Path) -> None:
    """torchrun ends all processes when one ends with an error: the one with little to do must wait before it does."""
    rows = ["a,a red dragon", *(f"b{i},a blue box swings\nc{i},a dragon swings" for i in range(3))]
    (folder / "many.csv").write_text("\n".join(["id,text", *rows, ""]))
    code, said = sample(folder, 2, "--prompts", "many.csv", "--out", "many", "--batch-size", "1")
    assert code == 1
    assert {path.name for path in (folder / "many").iterdir()} == {"_skipped.json"} | {
        f"b{i}{suffix}" for i in range(3) for suffix in (".mp4", ".png", ".json")
    }, said
    assert "javis: many.csv: skipped 4 unusable rows: line 2: unknown word(s) 'dragon'" in said


def test_torchrun_goes_on_after_the_death_of_a_process(folder: Path) -> None:
    rows = [f"{name},a red ball bounces" for name in "abcd"]
    (folder / "dead.csv").write_text("\n".join(["id,text", *rows, ""]))
    arguments = ("--prompts", "dead.csv", "--out", "dead", "--batch-size", "1")
    code, said = sample(folder, 2, *arguments, module="tests.parallel.dying", restarts=1)
    assert code == 0, said
    assert (folder / "died").exists()
    made = {f"{name}{suffix}" for name in "abcd" for suffix in (".mp4", ".png", ".json")}
    assert {path.name for path in (folder / "dead").iterdir()} == made, said
