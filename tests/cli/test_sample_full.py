"""``javis sample`` with the full-size pipeline, at toy size: formats, labels, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from javis import JavisPipeline
from javis.cli import main
from javis.media import read_clip

from .conftest import RenderingPipeline, files
from .test_sample import complaint

TOY = ("--random-weights", "--size", "toy", "--device", "cpu", "--steps", "1", "--seconds", "0.2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    return pipe.save_pretrained(tmp_path_factory.mktemp("full") / "checkpoint")


def run(*arguments: str) -> int:
    return main(["sample", *arguments])


def test_random_weights_from_text_to_mp4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("Rain falls on a tin roof", *TOY, "--resolution", "96x64", "--fps", "25", "--out", "a.mp4") == 0
    assert "random weights" in capsys.readouterr().out
    assert files(tmp_path) == {"a.mp4", "a.png", "a.json"}
    clip = read_clip("a.mp4")
    assert clip.video.shape == (5, 64, 96, 3) and clip.audio.shape == (3200,) and clip.fps == 25
    facts = json.loads(Path("a.json").read_text())
    assert facts["random_weights"] is True and facts["request"]["random_weights"] is True
    assert facts["caption"] == "rain falls on a tin roof aesthetic score: 6.5."
    assert (facts["model_resolution"], facts["fps"], facts["frames"], facts["samples"]) == ("96x64", 25, 5, 3200)
    assert facts["request"]["resolution"] == "96x64" and facts["request"]["checkpoint_fingerprint"] is None
    assert {"load", "text", "prior", "condition", "denoise", "video_decode", "audio_decode", "mp4"} <= set(
        facts["seconds_per_stage"]
    )


def test_a_folder_and_many_prompts(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("many.csv").write_text("id,text,seed,seconds\na,rain,3,0.2\nb,a dog barks,4,0.2\nc,,5,0.2\nd,thunder,6,99\n")
    options = ("--prompts", "many.csv", "--out", "many", "--checkpoint", str(saved), "--device", "cpu", "--steps", "1")
    assert run(*options) == 1  # two rows are unusable
    said = capsys.readouterr()
    assert "the prompt is empty" in said.out and "seconds must be above 0 and at most 60" in said.out
    assert {f for f in files(tmp_path) if f.endswith("mp4")} == {"many/a.mp4", "many/b.mp4"}
    first = json.loads(Path("many/a.json").read_text())
    assert first["random_weights"] is True  # the weights of this folder are, and it says so
    assert len(first["request"]["checkpoint_fingerprint"]) == 16
    before = Path("many/a.json").stat().st_mtime_ns
    assert run(*options) == 1
    assert Path("many/a.json").stat().st_mtime_ns == before, "finished clips are skipped"
    assert run(*options, "--negative-prompt", "noise") == 1
    assert Path("many/a.json").stat().st_mtime_ns > before, "another negative prompt makes another clip"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TOY, "--resolution", "big"), "unknown resolution 'big'"),
        ((*TOY, "--resolution", "100x100"), "the nearest is 96x96"),
        ((*TOY, "--resolution", "240p", "--ratio", "2"), "no size for the ratio '2'"),
        ((*TOY, "--fps", "0"), "fps must be between 1 and 120"),
        ((*TOY, "--device", "cuda:77"), "device 'cuda:77' is not there"),
        ((*TOY, "--residency", "staged"), "cannot be loaded again"),
        ((*TOY, "--checkpoint", "somewhere"), "either --checkpoint or --random-weights"),
        (("--size", "toy"), "--size toy is for --random-weights"),
        (("--resolution", "240p"), "--resolution 240p is for the full-size model"),
        (("--fps", "24"), "--fps is for the full-size model"),
        (("--ratio", "1:1"), "--ratio is for the full-size model"),
        (("--checkpoint", "CHECKPOINT", "--seconds", "0"), "seconds must be a number above 0"),
        (("--checkpoint", "CHECKPOINT", "--seconds", "61"), "at most 60"),
        (("--checkpoint", "nowhere/at/all"), "config.json is missing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(saved) if a == "CHECKPOINT" else a for a in arguments]
    assert run("rain", *given, "--out", "clip.mp4") == 2
    assert message in complaint(capsys)
    assert files(tmp_path) == set()


def test_damage_is_one_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    weights = folder / "video_vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run("rain", "--checkpoint", str(folder), "--device", "cpu", "--out", str(tmp_path / "clip.mp4")) == 2
    line = complaint(capsys)
    assert "component 'video_vae': diffusion_pytorch_model.safetensors is corrupt" in line
    assert not (tmp_path / "clip.mp4").exists()


def test_the_options_reach_the_pipeline(
    pipe: RenderingPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    given: list[dict[str, Any]] = []

    def load(source: str, **options: Any) -> RenderingPipeline:
        given.append({"source": source, **options})
        return pipe

    monkeypatch.setattr(JavisPipeline, "from_pretrained", load)
    options = ("--device", "cpu", "--dtype", "bfloat16", "--residency", "offload", "--negative-prompt", "a blue box")
    assert run("a red ball", "--out", "a.mp4", "--resolution", "32x32", *options) == 0
    assert {name: given[0][name] for name in ("source", "device", "dtype", "residency")} == {
        "source": "demo", "device": "cpu", "dtype": torch.bfloat16, "residency": "offload"
    }  # fmt: skip
    assert pipe.calls[0]["negative_prompt"] == "a blue box"


# -- the file is written while the clip is decoded ---------------------------------------------------------------------

ROWS = "id,text,seed,seconds\na,rain,3,0.2\nb,a dog barks,4,0.2\n"


def many(saved: Path) -> tuple[str, ...]:
    Path("many.csv").write_text(ROWS)
    return ("--prompts", "many.csv", "--out", "many", "--checkpoint", str(saved), "--device", "cpu", "--steps", "1")


def test_the_mp4_is_that_of_all_frames_at_once(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("javis.clip_files.write_clip", None)  # would write it again
        assert run(*many(saved)) == 0
    pipe = JavisPipeline.from_pretrained(saved, device="cpu")
    clips = pipe(["rain", "a dog barks"], seed=[3, 4], seconds=0.2, steps=1)
    for index, name in enumerate("ab"):
        expected = clips.save(tmp_path / "expected.mp4", index).read_bytes()
        assert (tmp_path / "many" / f"{name}.mp4").read_bytes() == expected
        facts = json.loads((tmp_path / "many" / f"{name}.json").read_text())
        assert (facts["frames"], facts["samples"]) == (clips.video.shape[1], clips.audio.shape[1])
    (tmp_path / "expected.mp4").unlink()
    assert {f for f in files(tmp_path) if ".part" in f} == set()


def test_frames_are_written_before_all_are_decoded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame a chunk; the hidden file is open while later frames are still to be decoded."""
    from javis import media
    from javis.decode import DecodeOptions, VideoDecoder

    monkeypatch.chdir(tmp_path)
    log: list[str] = []
    stream, convert = VideoDecoder.stream, media._video_frame

    def frame_by_frame(decoder: VideoDecoder, *args: Any, **options: Any) -> Any:
        decoder.options = DecodeOptions(frames_at_once=1)
        for number, chunk in enumerate(stream(decoder, *args, **options)):
            log.append("decoded")
            yield chunk
            if number == 3:  # the encoder has its own thread: wait for it to have done something
                for _ in range(1000):
                    if "encoded" in log:
                        break
                    time.sleep(0.01)

    def converted(*args: Any) -> Any:
        log.append("encoded")
        return convert(*args)

    monkeypatch.setattr(VideoDecoder, "stream", frame_by_frame)
    monkeypatch.setattr(media, "_video_frame", converted)
    options = ("--checkpoint", str(saved), "--device", "cpu", "--steps", "1", "--seconds", "0.5", "--out", "a.mp4")
    assert run("rain", *options) == 0
    assert log.count("decoded") == log.count("encoded") == 12
    assert log.index("encoded") < len(log) - 1 - log[::-1].index("decoded")


def test_an_encoder_that_fails_costs_its_clip_alone(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from javis import media
    from javis.errors import FailedError

    monkeypatch.chdir(tmp_path)
    calls: list[int] = []
    add, call = media._Mp4.add_frames, JavisPipeline.__call__

    def add_frames(file: Any, video: Any) -> None:
        if ".a." in str(file.file):
            raise FailedError("writing a.mp4 failed: No space left on device")
        add(file, video)

    def counted(pipe: JavisPipeline, prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return call(pipe, prompts, **options)

    monkeypatch.setattr(media._Mp4, "add_frames", add_frames)
    monkeypatch.setattr(JavisPipeline, "__call__", counted)
    assert run(*many(saved)) == 1
    assert "line 2: writing a.mp4 failed: No space left" in capsys.readouterr().err
    assert calls == [2], "what was sampled is not sampled again for that"
    assert files(tmp_path / "many") == {"b.mp4", "b.png", "b.json", "_skipped.json"}


def test_an_interruption_leaves_no_hidden_files(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("javis.contact_sheet.contact_sheet", interrupted)
    assert run(*many(saved)) != 0
    assert files(tmp_path) == {"many.csv"}
