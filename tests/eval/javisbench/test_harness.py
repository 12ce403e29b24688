"""The whole evaluation on real clips of the built-in world, good ones and bad ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from javis.cli import main
from javis.errors import UsageError
from javis.eval.javisbench import clips as clips_module
from javis.eval.javisbench.config import Config
from javis.eval.javisbench.harness import evaluate
from javis.eval.javisbench.measure import ClipData, Options, cut_clip
from javis.eval.javisbench.page import page
from javis.eval.javisbench.text import latex
from javis.media import write_clip
from javis.world import WorldConfig, render_audio, render_video, scene_from_prompt

GOOD = (
    "a red ball bounces on the left",
    "a large blue metal box knocks on the right",
    "a green star flashes in the middle",
    "a small yellow glass ball bounces on the left and a white star flashes on the right",
    "a purple triangle swings in the middle",
    "an unseen metal bell rings",
)
BAD = ("one_frame", "silent", "flat", "mute", "long", "corrupt", "absent", "empty")
FORM = WorldConfig()


def write(path: Path, video: np.ndarray, audio: np.ndarray) -> None:
    write_clip(path, video, audio, FORM.fps, FORM.sample_rate, quality=8)


def clip(text: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    scene = scene_from_prompt(text, seed=seed)
    return render_video(scene), render_audio(scene)


def table(path: Path, names: list[str], texts: list[str]) -> Path:
    rows = [f"{name},{text},,4,1,2,{i % 3},{i % 2}" for i, (name, text) in enumerate(zip(names, texts, strict=True))]
    path.write_text("id,text,audio_text,cat0_ind,cat1_ind,cat2_ind,cat3_ind,cat4_ind\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Six real clips and their prompts, evaluated once."""
    root = tmp_path_factory.mktemp("good")
    (root / "samples").mkdir()
    names = [f"g{i}" for i in range(len(GOOD))]
    for i, (name, text) in enumerate(zip(names, GOOD, strict=True)):
        write(root / "samples" / f"{name}.mp4", *clip(text, 40 + i))
    config = Config(
        samples=root / "samples", out=root / "out", prompts=table(root / "p.csv", names, list(GOOD)), processes=1
    )
    evaluate(config)
    return config


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clips are measured in this process; starting others takes most of the time of these tests."""

    def in_process(function: Any, items: Any, *, processes: int, timeout: float) -> Iterator[tuple[int, Any]]:
        yield from ((index, function(item)) for index, item in enumerate(items))

    threads = torch.get_num_threads()
    monkeypatch.setattr("javis.data.workers.isolated_map", in_process)
    yield
    torch.set_num_threads(threads)


def stored(config: Config) -> dict[str, int]:
    return {str(p.relative_to(config.out)): p.stat().st_mtime_ns for p in config.out.rglob("*") if p.is_file()}


def test_real_clips_are_in_synchrony_and_shuffled_ones_are_not(good: Config) -> None:
    found = evaluate(good).results
    figures = found["figures"]
    f1 = figures["event_f1_62.5ms"]
    assert f1["value"] >= 0.95 and f1["n"] == 5  # the bell is not seen
    assert f1["shuffled"] < 0.6 < f1["low"] <= f1["value"] <= f1["high"]
    assert figures["offset_ms"]["value"] < 10 < figures["offset_ms"]["shuffled"]
    assert figures["caption"]["value"] >= 0.95 and figures["caption"]["n"] == 6
    assert figures["builtin_sound"]["rank_deficient"] and figures["builtin_sound"]["n_real"] > 100
    assert found["asked"] == found["evaluated"] == 6 and found["problems"] == {}
    # What has no weights is skipped, with a reason, and has no figure.
    assert set(found["skipped"]) >= {"fvd", "kvd", "fad", "ib_av", "javis_score", "clap", "desync"}
    assert all(found["skipped"].values()) and not set(found["skipped"]) & set(figures)
    assert found["fingerprint"]["protocol"] == "corrected" and found["fingerprint"]["n"] == 6
    assert (found["fingerprint"]["fps"], found["fingerprint"]["size"]) == (16, "64x64")


def test_categories_are_those_of_the_rows(good: Config) -> None:
    found = evaluate(good).results["categories"]["caption"]
    assert {name: figure["n"] for name, figure in found["Spatial Composition"].items()} == {
        "Single Subject": 2,
        "Multiple Subject": 2,
        "Off-screen Sound": 2,
    }
    assert list(found["Visual Style"]) == ["2D-Animate"] and found["Visual Style"]["2D-Animate"]["n"] == 6


def test_a_second_run_measures_nothing(good: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("measured again")

    before, first = stored(good), evaluate(good).results
    monkeypatch.setattr("javis.data.workers.isolated_map", refuse)
    assert evaluate(good).results == first and stored(good) == before
    monkeypatch.setattr(clips_module, "VERSION", 2)
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(good)


@pytest.mark.usefixtures("here")
def test_only_what_changed_is_measured_again(good: Config) -> None:
    before = stored(good)
    os.utime(good.samples / "g1.mp4", ns=(5, 5))
    evaluate(good)
    changed = {name for name, stamp in stored(good).items() if before.get(name) != stamp}
    assert changed == {f"measured/{part}/g1.json" for part in ("facts", "sync", "peaks", "builtin")} | {
        "measured/builtin/g1.safetensors"
    }


@pytest.mark.usefixtures("here")
def test_bad_samples_are_named_and_the_others_are_not_affected(good: Config, tmp_path: Path) -> None:
    """The figures of good clips among bad ones are those of the good ones alone."""
    samples = tmp_path / "samples"
    samples.mkdir()
    for path in good.samples.glob("*.mp4"):
        (samples / path.name).write_bytes(path.read_bytes())
    names = [f"g{i}" for i in range(len(GOOD))] + list(BAD)
    video, audio = clip(GOOD[0], 7)
    write(samples / "one_frame.mp4", video[:1], 0.1 * np.ones(round(FORM.sample_rate / FORM.fps)))
    write(samples / "silent.mp4", video, np.zeros_like(audio))
    write(samples / "flat.mp4", np.full_like(video, 90), audio)
    soundfile.write(samples / "long.wav", np.concatenate([audio, audio[:8000]]), FORM.sample_rate)
    write(samples / "long.mp4", video, audio)
    write(samples / "mute.mp4", video, audio)
    soundfile.write(samples / "mute.wav", np.zeros(0), FORM.sample_rate)  # the wav stands for the sound: none
    (samples / "corrupt.mp4").write_bytes((samples / "g0.mp4").read_bytes()[:700])
    (samples / "empty.mp4").touch()
    write(samples / "stranger.mp4", video, audio)
    config = replace(
        good, samples=samples, out=tmp_path / "out", prompts=table(tmp_path / "p.csv", names, [*GOOD] + [GOOD[0]] * 8)
    )
    found = evaluate(config)
    problems = {kind: sorted(problem["names"]) for kind, problem in found.results["problems"].items()}
    assert problems["no sample"] == ["absent"]
    assert problems["sample without prompt"] == ["stranger.mp4"]
    assert problems["unreadable"] == ["corrupt", "empty"]
    assert problems["no sound"] == ["mute"]
    assert problems["silent"] == ["silent"] and problems["constant colour"] == ["flat"]
    assert problems["lengths differ"] == ["long"] and problems["too few frames"] == ["one_frame"]
    assert all(p["count"] == len(p["names"]) for p in found.results["problems"].values())
    assert found.results["asked"] == 14 and found.results["evaluated"] == 11
    alone = evaluate(good).results["figures"]
    ids = [clip.sample.name for clip in found.clips]
    kept = evaluate(replace(config, prompts=table(tmp_path / "q.csv", names[:6], list(GOOD)), name=good.name)).results
    for name in ("event_f1_62.5ms", "caption", "av_align", "builtin_picture"):
        assert kept["figures"][name] == alone[name], name
    assert ids == [*names[:6], "one_frame", "silent", "flat", "mute", "long"]
    text = page(found)
    assert all(name in text for name in ("absent", "corrupt", "stranger.mp4"))


@pytest.mark.usefixtures("here")
def test_no_sample_can_be_read(good: Config, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "g0.mp4").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"none of the 1 samples .* can be read: g0: cannot read"):
        evaluate(replace(good, samples=tmp_path / "s", out=tmp_path / "out"))


@pytest.mark.usefixtures("here")
def test_reference_folder_and_its_cache(good: Config, tmp_path: Path) -> None:
    """Clips are nearer to themselves than to others; the cache of a folder gives the folder's figures."""
    metrics = ("builtin_picture", "builtin_sound")
    same = replace(good, reference=good.samples, out=tmp_path / "a", metrics=metrics)
    figures = evaluate(same).results["figures"]
    assert figures["builtin_picture"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert figures["builtin_picture"]["n_real"] == 6
    cached = replace(same, reference=tmp_path / "a" / "reference.safetensors")
    again = evaluate(cached).results["figures"]
    assert again["builtin_sound"]["value"] == pytest.approx(figures["builtin_sound"]["value"], abs=1e-4)


@pytest.mark.usefixtures("here")
def test_a_data_set_in_folders(good: Config, tmp_path: Path) -> None:
    """Landscape: scenes are the categories, texts play no part, real clips come from a folder of the same layout."""
    for i, scene in enumerate(("raining", "raining", "thunder")):
        (tmp_path / "set" / "train" / scene).mkdir(parents=True, exist_ok=True)
        source = good.samples / f"g{i}.mp4"
        (tmp_path / "set" / "train" / scene / f"{i}.mp4").write_bytes(source.read_bytes())
    config = Config(
        samples=tmp_path / "set", layout="landscape", reference=tmp_path / "set", out=tmp_path / "out",
        metrics=("ib_tv", "av_align", "builtin_sound"),
    )  # fmt: skip
    found = evaluate(config).results
    assert found["skipped"] == {"ib_tv": "needs prompts; give --prompts FILE.csv"}
    assert found["categories"]["av_align"]["Scene"].keys() == {"raining", "thunder"}
    assert found["categories"]["builtin_sound"]["Scene"]["raining"]["n_real"] == 2
    with pytest.raises(UsageError, match="has no prompts"):
        evaluate(replace(config, prompts=good.prompts))


@pytest.mark.usefixtures("here")
def test_cut_to_seconds_is_another_evaluation(good: Config, tmp_path: Path) -> None:
    whole, cut = evaluate(good).results, evaluate(replace(good, options=Options(seconds=1.0), out=tmp_path)).results
    assert cut["fingerprint"]["id"] != whole["fingerprint"]["id"] and cut["fingerprint"]["cut_to_seconds"] == 1


@pytest.mark.parametrize(
    "seconds, samples, frames, kept",
    [
        (None, 24000, 24, 24000),
        (1.0, 24000, 16, 16000),
        (None, 40000, 32, 32000),
        (5.0, 0, 32, 0),
        (0.01, 32000, 1, 160),
    ],
)
def test_picture_and_sound_are_cut_to_the_shorter(seconds: float | None, samples: int, frames: int, kept: int) -> None:
    """32 frames at 16 fps beside sound at 16 kHz; without sound the picture stays whole."""
    video = np.zeros((32, 4, 4, 3), np.uint8)
    found = cut_clip(ClipData(video, np.zeros(samples, np.float32), 16.0, 16000), seconds)
    assert (len(found.video), len(found.audio)) == (frames, kept)


class Page(HTMLParser):
    """Tags and where they point."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_self_contained_and_escapes(good: Config) -> None:
    found = evaluate(replace(good, name="<script>x</script> & co"))
    text = page(found)
    parsed = Page()
    parsed.feed(text)
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert len(parsed.sources) == 6 and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "&lt;script&gt;" in text and parsed.tags.count("svg") >= 6
    assert f"{found.results['figures']['event_f1_62.5ms']['value']:.3f}" in text
    assert all(prompt in text for prompt in GOOD)


def test_the_latex_row_has_a_cell_for_each_column(good: Config) -> None:
    lines = latex(evaluate(replace(good, name="50%_a&b")).results).splitlines()
    assert lines[1].startswith("% Model & FVD") and lines[1].count(" & ") == lines[2].count(" & ")
    assert lines[2].startswith(r"50\%\_a\&b & -- & ") and lines[2].endswith(r"\\")


def test_as_a_command(good: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = str(good.out), tmp_path / "rows.jsonl"
    arguments = ["eval", "javisbench", "--samples", str(good.samples), "--prompts", str(good.prompts), "--out", out]
    assert main([*arguments, "--processes", "1", "--append", str(rows), "--name", "real"]) == 0
    said = capsys.readouterr().out
    assert "F1@62.5" in said and "Off-screen Sound" in said and "skipped fvd: " in said
    written = json.loads((good.out / "results.json").read_text())
    row = json.loads(rows.read_text())
    assert row["kind"] == "eval_javisbench" and row["figures"] == written["figures"] and "commit" in row
    assert str(good.samples.parent) not in rows.read_text()
    assert (good.out / "results.html").is_file() and (good.out / "results.tex").is_file()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "expected --samples"),
        (["--samples", "none", "--prompts", "sample"], "no such folder: none"),
        (["--samples", "."], "expected --prompts"),
        (["--samples", ".", "--prompts", "sample", "--metrics", "fvdd"], "there is no metric 'fvdd'"),
        (["--samples", ".", "--prompts", "sample", "--window-overlap", "2"], "--window-overlap 2"),
        (["--samples", ".", "--prompts", "sample", "--processes", "0"], "--processes 0"),
        (["--samples", ".", "--prompts", "none.csv"], "cannot read none.csv"),
        (["--samples", ".", "--prompts", "sample", "--weights", "none"], "no such folder: none"),
    ],
)
def test_unusable_arguments(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "javisbench", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_sample_can_be_written(tmp_path: Path) -> None:
    assert main(["eval", "javisbench", "--write-sample", str(tmp_path / "s.csv")]) == 0
    assert (tmp_path / "s.csv").read_text().count("\n") == 21


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(good: Config, tmp_path: Path) -> None:
    """kill -9 after the first clip; the next run keeps what is there and comes to the figures of an undisturbed one."""
    arguments = [
        sys.executable, "-m", "javis", "eval", "javisbench", "--samples", str(good.samples), "--prompts",
        str(good.prompts), "--out", str(tmp_path / "out"), "--processes", "1",
    ]  # fmt: skip
    running = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True)
    sync = tmp_path / "out" / "measured" / "sync"
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline and not list(sync.glob("g*.json")) and running.poll() is None:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kept = {path: path.stat().st_mtime_ns for path in sync.glob("g*.json")}
    assert kept and len(kept) < 6 and not (tmp_path / "out" / "results.json").exists()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, timeout=50)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["figures"] == evaluate(good).results["figures"]
    assert not list((tmp_path / "out").rglob(".*"))
