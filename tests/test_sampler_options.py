"""Options of the sampler: ranges, what a clip records of them, and what they do to the clips of a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from javis import JavisPipeline
from javis.cli import main
from javis.clips import SampleArgs
from javis.errors import UsageError
from javis.model.dit import JavisDiT
from javis.requests import read_requests
from javis.sample_options import identity
from javis.sampler_options import SamplerArgs, SamplerOptions, check_ranges, check_sampler

from .model.small import check_equal, make_inputs, small_model
from .tiny import write_tiny_checkpoint

PROMPT = "a red ball bounces on the left"
QUICK: dict[str, Any] = {"steps": 4, "seconds": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the shift of the timesteps that the numbers below are worked out for."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    description = json.loads((folder / "config.json").read_text())
    description["sampling"]["timestep_ratio"] = 4.0
    (folder / "config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> JavisPipeline:
    return JavisPipeline.from_pretrained(checkpoint)


# -- ranges ------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"solver": "rk4"}, "unknown solver 'rk4'; expected one of euler, heun, midpoint, ab2"),
    ({"schedule": "karras"}, "unknown schedule 'karras'; expected one of uniform, official, fitted"),
    ({"timestep_ratio": 0}, "timestep_ratio must be a number from 0.01 to 100"),
    ({"timestep_ratio": float("nan")}, "timestep_ratio must be a number from 0.01 to 100"),
    ({"audio_steps": 0}, "audio_steps must be a whole number from 1 to 1000, got 0"),
    ({"audio_steps": 10**6}, "audio_steps must be a whole number from 1 to 1000"),
    ({"audio_steps": 2.5}, "audio_steps must be a whole number"),
    ({"uncond_every": 0}, "uncond_every must be a whole number from 1 to 1000, got 0"),
    ({"uncond_every": True}, "uncond_every must be a whole number"),
    ({"redraw": 0}, r"redraw must be a timestep above 0 \(data\) and at most 1000 \(noise\), got 0"),
    ({"redraw": 1000.5}, "redraw must be a timestep"),
    ({"redraw": float("nan")}, "redraw must be a timestep"),
    ({"guidance_rescale": 1.5}, r"guidance_rescale must be a number from 0 \(off\) to 1, got 1.5"),
    ({"guidance_rescale": float("nan")}, "guidance_rescale must be a number from 0"),
    ({"guidance_interval": (700, 300)}, r"LOW < HIGH from 0 \(data\) to 1000 \(noise\), got \(700, 300\)"),
    ({"guidance_interval": (-1, 300)}, "LOW < HIGH from 0"),
    ({"guidance_interval": (0, 1001)}, "LOW < HIGH from 0"),
    ({"guidance_interval": (0, float("nan"))}, "LOW < HIGH from 0"),
    ({"guidance_interval": (3,)}, "must be two timesteps"),
    ({"guidance_interval": "ab"}, "must be two timesteps"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_ranges(given)


@pytest.mark.parametrize(
    ("given", "steps", "order", "message"),
    [
        ({"audio_steps": 8}, 8, "sound_first", "fewer than the steps.*got 8 of 8"),
        ({"audio_steps": 1}, 1, "sound_first", "fewer than the steps"),
        ({"audio_steps": 4, "solver": "heun"}, 8, "together", "solver 'heun' evaluates twice an interval"),
        ({"redraw": 900}, 8, "together", "redraw is for order 'sound_first', and order is 'together'"),
        ({"redraw": 900, "schedule": "fitted"}, 8, "sound_first", "schedule is 'fitted', whose lists say where"),
        ({"schedule": "official", "timestep_ratio": 2.0}, 8, "together", "timestep_ratio is for schedule 'uniform'"),
    ],
)
def test_combinations_that_cannot_be(given: dict[str, Any], steps: int, order: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_sampler(given, {}, steps=steps, order=order)


def test_what_was_not_given_is_the_checkpoints() -> None:
    sampling = {"steps": 8, "order": "sound_first", "solver": "ab2", "guidance_interval": [200, 800], "audio_steps": 6}
    told = {"steps": 8, "order": "sound_first"}
    assert check_sampler({}, {"steps": 8, "timestep_ratio": 4.0}, **told) == SamplerOptions()
    own = SamplerOptions(solver="ab2", guidance_interval=(200.0, 800.0), audio_steps=6)
    assert check_sampler({"solver": None}, sampling, **told) == own
    assert check_sampler({"solver": "euler"}, sampling, **told).solver == "euler"
    assert check_sampler({}, sampling, steps=4, order="sound_first").audio_steps is None  # it divides 8 steps
    redrawn = {"redraw": 900, "order": "sound_first", "schedule": "fitted"}
    assert check_sampler({}, {**redrawn, "schedule": None}, **told).redraw == 900
    assert check_sampler({}, redrawn, steps=8, order="together").redraw is None
    assert check_sampler({"redraw": 950}, {"schedule": "fitted"}, **told) == SamplerOptions(redraw=950)
    with pytest.raises(UsageError, match="unknown solver"):
        check_sampler({}, {"solver": "x"}, steps=8, order="together")


def test_only_what_is_not_exact_is_recorded() -> None:
    assert SamplerOptions().changed() == {}
    made = SamplerOptions(solver="ab2", guidance_interval=(200.0, 800.0), uncond_every=2)
    assert made.changed() == {"solver": "ab2", "guidance_interval": [200.0, 800.0], "uncond_every": 2}
    json.dumps(made.changed())


def test_a_finished_clip_is_known_by_its_options() -> None:
    def facts(**options: Any) -> dict[str, Any]:
        return identity(SampleArgs(sampler=SamplerArgs(**options)), False)

    plain = facts()
    assert not set(plain) & {"solver", "guidance_interval", "audio_negative_prompt"}  # as before there were any
    assert facts(solver="ab2") == plain | {"solver": "ab2"}
    assert facts(guidance_interval=(100.0, 900.0)) == plain | {"guidance_interval": [100.0, 900.0]}
    assert facts(audio_negative_prompt="x") == plain | {"audio_negative_prompt": "x"}


def test_seeds_of_the_sound_in_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,audio_seed\na,\nb,7\nc,\n")
    assert [r.audio_seed for r in read_requests(path).requests] == [None, 7, None]
    assert [r.audio_seed for r in read_requests(path, audio_seed=20).requests] == [20, 7, 22]
    path.write_text("prompt,audio_seed\na,-1\nb,1\n")
    assert "audio seed -1 is unusable" in read_requests(path).faults[0].message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["--steps", "1000000"], "steps must be a whole number from 1 to 1000"),
        (["--guidance", "nan"], "guidance must be between 0 and 100"),
        (["--solver", "rk4"], "euler"),
        (["--guidance-interval", "700", "300"], "LOW < HIGH from 0"),
        (["--guidance-rescale", "2"], "guidance_rescale must be a number from 0"),
        (["--uncond-every", "0"], "uncond_every must be a whole number from 1 to 1000"),
        (["--audio-steps", "0"], "audio_steps must be a whole number from 1 to 1000"),
        (["--audio-seed", "-1"], "audio seed -1 is unusable"),
        (["--steps", "4", "--audio-steps", "4", "--order", "sound_first"], "audio_steps must be fewer"),
        (["--steps", "4", "--schedule", "fitted"], "no fitted timesteps"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.mp4"
    assert main(["sample", PROMPT, "--checkpoint", str(checkpoint), "--out", str(out), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not out.exists()


# -- on a checkpoint ---------------------------------------------------------------------------------------------------


def test_forwards_are_what_the_model_was_asked(pipeline: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = JavisDiT.denoise

    def counted(self: JavisDiT, video: torch.Tensor, *rest: Any, **masks: Any) -> Any:
        seen.append(len(video))
        return real(self, video, *rest, **masks)

    monkeypatch.setattr(JavisDiT, "denoise", counted)
    for options, forwards in (
        ({}, 8),
        ({"guidance": 1.0}, 4),
        ({"guidance_interval": (900.0, 1000.0)}, 6),  # 1000 twice: the parts of sound first begin there
        ({"uncond_every": 2}, 6),
        ({"solver": "heun"}, 8),
        ({"order": "together", "audio_steps": 6}, 12),
    ):
        seen.clear()
        clips = pipeline([PROMPT] * 3, batch_size=2, **QUICK | {"order": "sound_first"} | options)
        assert clips.forwards == forwards, options
        assert sum(seen) == 3 * forwards, options
        recorded = {name: value for name, value in options.items() if name not in ("guidance", "order")}
        assert clips.options == json.loads(json.dumps(recorded)), options


def test_the_default_is_what_it_was(pipeline: JavisPipeline) -> None:
    """Every option at its exact value is the plain call, bit for bit."""
    plain = pipeline(PROMPT, **QUICK)
    same = pipeline(
        PROMPT, **QUICK, solver="euler", guidance_interval=(0, 1000), guidance_rescale=0.0, uncond_every=1, audio_seed=3
    )
    assert np.array_equal(plain.video, same.video) and np.array_equal(plain.audio, same.audio)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ab3"},
        {"solver": "unipc"},
        {"guidance_interval": (300.0, 900.0)},
        {"guidance_rescale": 0.7},
        {"uncond_every": 2},
    ],
)
def test_a_clip_does_not_depend_on_its_batch(pipeline: JavisPipeline, options: Any) -> None:
    """Final latents differ by rounding, far less than the option changes them."""
    prompts = [PROMPT, "a large blue box swings", "a metal bell rings"]

    def latents(prompt: str | list[str], seed: int | list[int], **options: Any) -> list[torch.Tensor]:
        last: dict[str, torch.Tensor] = {}
        pipeline(
            prompt, **QUICK | {"steps": 6, "seed": seed}, **options,
            callback_on_step_end=lambda _pipe, _i, _t, latents: last.update(latents),
        )  # fmt: skip
        return [last["video_latents"], last["audio_latents"]]

    together, alone = latents(prompts, [5, 6, 7], **options), latents(prompts[1], 6, **options)
    for a, b, plain in zip(together, alone, latents(prompts[1], 6), strict=True):
        scale = float(b.abs().max())
        assert float((a[1] - b[0]).abs().max()) < 1e-4 * scale
        assert float((b - plain).abs().max()) > 1e-2 * scale


def test_the_sound_has_a_seed_of_its_own(pipeline: JavisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sampler starts from: the same picture noise, another sound's; and 1 + i counts up."""
    starts: list[tuple[torch.Tensor, torch.Tensor]] = []
    import javis.batches

    real = javis.batches.sample_in_order

    def spy(model: Any, video: torch.Tensor, audio: torch.Tensor, *rest: Any, **options: Any) -> Any:
        starts.append((video, audio))
        return real(model, video, audio, *rest, **options)

    monkeypatch.setattr(javis.batches, "sample_in_order", spy)
    pipeline([PROMPT] * 2, **QUICK | {"seed": [5, 6]})
    other = pipeline([PROMPT] * 2, **QUICK | {"seed": [5, 6]}, audio_seed=6)
    assert torch.equal(starts[0][0], starts[1][0])
    assert torch.equal(starts[0][1][1], starts[1][1][0])  # seed 6 of the sound, now of the first clip
    assert not torch.equal(starts[0][1][0], starts[1][1][0])
    assert other.audio_seeds == [6, 7] and other.seeds == [5, 6]
    with pytest.raises(UsageError, match="3 seeds for 1 prompts"):
        pipeline(PROMPT, **QUICK, audio_seed=[1, 2, 3])


def test_the_audio_blocks_hear_their_own_negative_prompt(pipeline: JavisPipeline) -> None:
    """Given to both it is the negative prompt of before; given to the sound alone it is another clip than either."""
    negative = "a metal bell rings"
    options = QUICK | {"guidance": 3.0, "order": "together"}
    both = pipeline(PROMPT, **options, negative_prompt=negative)
    same = pipeline(PROMPT, **options, negative_prompt=negative, audio_negative_prompt=negative)
    assert np.array_equal(both.video, same.video) and np.array_equal(both.audio, same.audio)
    plain, sound = pipeline(PROMPT, **options), pipeline(PROMPT, **options, audio_negative_prompt=negative)
    for other in (plain, both):
        assert not np.array_equal(sound.audio, other.audio)
    with pytest.raises(UsageError, match="2 negative audio prompts for 1 prompts"):
        pipeline(PROMPT, **options, audio_negative_prompt=[negative, negative])


def test_audio_captions_reach_the_audio_blocks_only() -> None:
    """Without the attention between the streams, the picture does not notice what the audio blocks are told."""
    model = small_model()
    noisy, told = make_inputs(model.config)
    told["with_bidirectional"] = False
    length = model.config.caption_length
    heard = torch.randn(2, 3, model.config.caption_channels, generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with torch.no_grad():
        plain = model.denoise(**noisy, condition=model.condition(**told))
        told_both = model.denoise(**noisy, condition=model.condition(**told, audio_text=heard, audio_text_mask=mask))
        swapped = model.condition(**told | {"text": heard, "text_mask": mask})
        other = model.denoise(**noisy, condition=swapped)
        again = model.condition(**told, audio_text=told["text"], audio_text_mask=told["text_mask"])
        check_equal(model.denoise(**noisy, condition=again), plain, 0.0)
    assert torch.equal(told_both.video, plain.video)
    torch.testing.assert_close(told_both.audio, other.audio)
    assert (told_both.audio - plain.audio).abs().max() > 1e-3
    assert length != 3  # the two captions need not be of one length
    with pytest.raises(ValueError, match="audio_text is of 1 samples, text of 2"):
        model.condition(**told, audio_text=heard[:1])


def test_an_unknown_argument_is_a_type_error(pipeline: JavisPipeline) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sovler'"):
        pipeline(PROMPT, **QUICK, sovler="ab2")


def test_the_json_says_what_was_not_exact(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    command = [
        "sample", PROMPT, "--checkpoint", str(checkpoint), "--out", str(out), "--steps", "4", "--seconds", "0.5",
        "--guidance", "3", "--solver", "ab2", "--guidance-interval", "300", "900", "--audio-seed", "9",
        "--audio-negative-prompt", "a metal bell rings", "--order", "together",
    ]  # fmt: skip
    assert main(command) == 0
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["solver"] == "ab2" and facts["guidance_interval"] == [300.0, 900.0] and facts["audio_seed"] == 9
    assert facts["forwards"] == 4 + 2  # timesteps shifted by 4: 1000, 923, 800, 571
    assert facts["request"]["audio_negative_prompt"] == "a metal bell rings" and facts["request"]["audio_seed"] == 9
    assert "uncond_every" not in facts


def test_a_row_whose_steps_do_not_fit_the_options_is_skipped(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps cannot be three for the sound; the other row is made."""
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,steps\n{PROMPT},2\n{PROMPT},4\n")
    words = ["--audio-steps", "3", "--order", "sound_first", "--seconds", "0.25", "--checkpoint", str(checkpoint)]
    assert main(["sample", "--prompts", str(path), "--out", str(tmp_path / "out"), *words]) == 1
    assert "line 2: audio_steps must be fewer than the steps" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


def test_fit_schedule_writes_what_sample_uses(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    fit = ["fit-schedule", "--steps", "4", "--fine", "8", "--count", "2", "--seconds", "0.25", "--write"]
    assert main([*fit, "--order", "sound_first", "--checkpoint", str(copied)]) == 0
    told = json.loads(capsys.readouterr().out)["sound_first"]["2+2"]
    stored = json.loads((copied / "config.json").read_text())["sampling"]["fitted"]["sound_first"]["2+2"]
    assert stored == told["timesteps"] and [len(part) for part in stored] == [2, 2]
    assert all(a <= b for a, b in zip(told["distance"], told["distance_uniform"], strict=True))
    timesteps: list[float] = []
    pipe = JavisPipeline.from_pretrained(copied)
    pipe(
        PROMPT, **QUICK, order="sound_first", schedule="fitted",
        callback_on_step_end=lambda _p, _i, t, _l: timesteps.append(t),
    )  # fmt: skip
    assert timesteps == pytest.approx([*stored[0], *stored[1]], abs=1e-3)
    assert main([*fit, "--checkpoint", "demo"]) == 2
    assert "needs a checkpoint folder" in capsys.readouterr().err
