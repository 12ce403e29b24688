"""The experiments: replaced priors, gaps, rankings, collapse, the page. Attention: test_attention_experiment.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from javis.cli import main
from javis.eval.experiments import EXPERIMENTS, alignment, collapse, multi_event, priors
from javis.eval.negatives import TRUE
from javis.eval.steps_points import MeasuredClip
from javis.eval.steps_prompts import prompts
from javis.eval.world_report import Measured
from javis.pipeline import JavisPipeline
from javis.world import WorldConfig, caption, render_audio

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipe() -> JavisPipeline:
    return JavisPipeline.from_pretrained("demo")


# -- (a) priors --------------------------------------------------------------------------------------------------------


def replaced(pipe: JavisPipeline, source: Any, chosen: Any) -> priors.ReplacedPriors:
    return priors.ReplacedPriors.of(pipe, source, priors.partners_of(chosen), priors.prior_moments(pipe, chosen))


def test_every_prompt_gets_the_priors_of_another_one() -> None:
    chosen = prompts(6, 40)
    partners = priors.partners_of(chosen)
    assert sorted(partners) == sorted(p.seed for p in chosen) == sorted(seed for _, seed in partners.values())
    words = {p.seed: caption(p.scene) for p in chosen}
    assert all(seed != other and told == words[other] for seed, (told, other) in partners.items())
    with pytest.raises(ValueError, match="at least 2"):
        priors.partners_of(chosen[:1])


def test_priors_come_from_where_they_should(pipe: JavisPipeline) -> None:
    chosen = prompts(4, 40)
    seeds = [p.seed for p in chosen[:3]]
    text, _, real = pipe.encode_prompts([caption(p.scene) for p in chosen[:3]], seeds)

    zero = replaced(pipe, "zero", chosen).estimate_priors(text, seeds)
    assert not zero.spatial.any() and not zero.temporal.any()
    null = replaced(pipe, "null", chosen).estimate_priors(text, seeds)
    assert torch.equal(null.spatial[2], pipe.model.null_prior[0]) and torch.equal(
        null.temporal[1], pipe.model.null_prior[1]
    )
    swapped = replaced(pipe, "swapped", chosen)
    given = swapped.estimate_priors(text, seeds)
    for i, seed in enumerate(seeds):
        words, other = swapped.partners[seed]
        expected = pipe.encode_prompts([words], [other])[2]
        torch.testing.assert_close(given.spatial[i], expected.spatial[0])
        assert not torch.allclose(given.spatial[i], real.spatial[i], atol=1e-3)
    random = replaced(pipe, "random", chosen)
    many = random.estimate_priors(text[:1].expand(400, -1, -1), list(range(400)))
    tokens = torch.cat((many.spatial, many.temporal), 1)
    mean, deviation = random.moments
    assert (tokens.mean(0) - mean).abs().max() < 5 * deviation.max() / 20  # five standard errors of 400 draws
    torch.testing.assert_close(tokens.std(0), deviation, rtol=0.25, atol=1e-4)
    # A clip does not depend on its batch, and the pipeline itself is as it was.
    torch.testing.assert_close(random.estimate_priors(text, [5, 7, 9]).spatial[1], many.spatial[7])
    torch.testing.assert_close(pipe.encode_prompts([caption(chosen[0].scene)], seeds[:1])[2].spatial, real.spatial[:1])


def clip(seen: list[float], heard: list[float], kind: str = "one_source", **more: Any) -> MeasuredClip:
    features = more.get("features", {})
    return MeasuredClip(
        Measured(kind, [(seen, heard)], None, more.get("checks", {"side": [True]})), features, 1.0, 32.0
    )


def test_equal_clips_have_no_difference_and_other_prompts_are_far() -> None:
    rng = np.random.default_rng(0)
    sizes = {"picture": 24, "sound": 24, "both": 32}
    real = [clip([0.5], [0.5], features={n: rng.normal(size=k) for n, k in sizes.items()}) for _ in range(400)]
    late = [replace(c, measured=replace(c.measured, sources=[([0.5], [0.52])])) for c in real]
    lost = [replace(c, measured=replace(c.measured, sources=[([0.5], [1.5])])) for c in real]
    assert priors.changed(real, real) == 0.0
    assert priors.changed(np.roll(np.array(real, object), 1).tolist(), real) == pytest.approx(1.0, abs=0.03)
    found = priors.figures({"real": real[:6], "zero": real[:6], "random": late[:6], "swapped": lost[:6]})["less_real"]
    assert found["zero"]["f1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["random"]["f1"]["value"] == 0.0 and found["random"]["mean_abs_offset_ms"]["value"] == pytest.approx(20)
    assert found["swapped"]["f1"]["value"] == -1.0
    lines = priors.findings({"less_real": found})
    assert (
        "nearly the same clips" in lines[0]
        and "no figure differs" in lines[0]
        and "offset +20" in lines[1]
        and "event F1 -1" in lines[2]
    )


# -- (e) one source against two ---------------------------------------------------------------------------------------


def test_the_gap_is_the_difference_of_the_two_f1_and_narrows_by_what_two_sources_gain(tmp_path: Path) -> None:
    good, bad = ([0.5], [0.5]), ([0.5], [1.5])
    usual = [clip(*good)] * 9 + [clip(*bad)] + [clip(*good, "two_sources")] * 6 + [clip(*bad, "two_sources")] * 4
    better = usual[:10] + [clip(*good, "two_sources")] * 8 + [clip(*bad, "two_sources")] * 2
    worse = [clip(*good)] * 10 + usual[10:]
    value, low, high = multi_event.gap(usual)  # type: ignore[misc]
    assert value == pytest.approx(0.9 - 0.6) and low < value < high
    assert multi_event.narrowed(usual, usual) == (0.0, 0.0, 0.0)
    assert multi_event.narrowed(usual, better)[0] == pytest.approx(0.2)  # type: ignore[index]
    assert multi_event.narrowed(usual, worse)[0] == pytest.approx(-0.1)  # type: ignore[index]
    # Standard error of a difference of two shares of ten clips each: 0.18; the interval is of that size.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.09 / 10 + 0.24 / 10), rel=0.15)
    found = multi_event.figures({multi_event.USUAL: usual, "better": better})
    assert found["settings"]["better"]["gain"]["one_source"]["value"] == 0.0
    page = multi_event.section({**found, "steps": 16})
    assert "| better | 0.900 [0.700, 1.000] | 0.800" in page and "better: does not change the gap beyond chance" in page
    multi_event.plot(found, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes()[:4] == b"\x89PNG"
    assert multi_event.gap([c for c in usual if c.measured.kind == "one_source"]) is None


def test_measures_are_of_the_checkpoint_s_own_sampling() -> None:
    found = multi_event.settings(16, {"guidance": 2.5, "audio_guidance": 4.0, "order": "sound_first"})
    assert [(s.steps, dict(s.options)) for s in found.values()] == [
        (16, {}),
        (16, {"best_of": 4}),
        (16, {"audio_guidance": 6.0}),
        (24, {"audio_steps": 16}),
    ]
    assert len(multi_event.settings(16, {"guidance": 2.5})) == 3  # made together, the sound has no steps of its own


# -- (d) alignment -----------------------------------------------------------------------------------------------------


def test_rankings_follow_their_definitions() -> None:
    def pair(spatial: float, temporal: float, distance: float = 1.0) -> np.ndarray:
        return np.array([[spatial, distance], [temporal, distance]])

    kinds = {TRUE: pair(0, 0), alignment.MIRRORED: pair(-1, 9), alignment.OTHER_PICTURE: pair(1, -9, 2.0)}
    kinds[alignment.OTHER_SOUND] = pair(9, -1, 0.5)
    for shift in alignment.SHIFTS_MS:
        kinds |= {f"{shift:g} ms": pair(0, -shift), f"{-shift:g} ms": pair(0, -shift if shift > 100 else 5.0)}
    found = alignment.ranking([kinds] * 10)
    rates = {kind: (f["axis"], f["discriminator"]["rate"], f["distance"]["rate"]) for kind, f in found["pairs"].items()}
    assert rates[alignment.MIRRORED] == ("spatial", 1.0, 0.0)
    assert rates[alignment.OTHER_PICTURE] == ("spatial", 0.0, 1.0)
    assert rates[alignment.OTHER_SOUND] == ("temporal", 1.0, 0.0)
    assert rates["62.5 ms"] == ("temporal", 0.5, 0.0) and rates["500 ms"] == ("temporal", 1.0, 0.0)
    assert found["order"]["value"] > 0.9
    assert alignment.rank_correlation([1, 2, 3], [5, 4, 3]) == -1.0
    assert alignment.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(np.sqrt(0.9))  # Pearson of ranks
    assert alignment.rank_correlation([1, 2, 3], [1, 1, 1]) == 0.0


def test_sound_is_turned_by_the_time_that_is_said() -> None:
    scene = alignment.scenes(1, WorldConfig())[0]
    sound, onset = render_audio(scene), scene.events[0][0]
    late = alignment.turned(sound, 125, 16000)
    assert np.flatnonzero(np.abs(late) > 0)[0] == np.flatnonzero(np.abs(sound) > 0)[0] + 2000
    assert np.array_equal(alignment.turned(late, -125, 16000), sound) and onset > 0


def test_a_caption_that_says_all_finds_its_pair_and_one_that_says_nothing_does_not() -> None:
    tokens = torch.eye(32).reshape(32, 1, 32).repeat(1, 4, 1)
    same = torch.ones(32, 4, 32)
    knowing = alignment.retrieval([{axis: (t, t) for axis in ("spatial", "temporal")} for t in tokens])
    blind = alignment.retrieval(
        [{axis: (s, t) for axis in ("spatial", "temporal")} for s, t in zip(same, tokens, strict=True)]
    )
    assert knowing["chance"] == 1 / 16 and knowing["spatial"]["rate"] == 1.0
    assert blind["temporal"]["rate"] == pytest.approx(1 / 16) and blind["temporal"]["clips"] == 32


# -- (f) collapse ------------------------------------------------------------------------------------------------------


def test_collapse_is_seen_and_its_absence_too() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 12))
    assert collapse.participation(x) == pytest.approx(12, rel=0.05)
    assert collapse.participation(np.outer(rng.normal(size=900), np.ones(12))) == pytest.approx(1)
    assert collapse.participation(np.ones((9, 3))) == 0.0
    assert collapse.mean_cosine(x) == pytest.approx(0, abs=0.02)
    assert collapse.mean_cosine(np.ones((9, 3))) == pytest.approx(1)
    assert collapse.prompt_share(2 * x, np.ones_like(x)) == pytest.approx(0.8, abs=0.02)
    assert collapse.prompt_share(np.ones_like(x), np.ones_like(x)) == 0.0
    labels = ["abc"[i] for i in x[:, :3].argmax(axis=1)]
    told, untold = collapse.probe(x, labels), collapse.probe(x[:, 3:], labels)
    assert told["rate"] > 0.9 and told["clips"] == 300
    assert untold["low"] < untold["chance"] and 0.33 <= untold["chance"] < 0.45


# -- the command and the page ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "there is no experiment 'nonsense'"),
        (["alignment"], "javis train prior"),
        (["all"], "javis train prior"),
        (["collapse", "--count", "1"], "--count 1"),
        (["negatives", "--prior-checkpoint", "demo"], "no embedding network"),
    ],
)
def test_unusable_arguments_are_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", "experiments", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error.replace("keeps no", "no") and error.count("\n") == 1


def test_an_experiment_writes_figures_picture_page_and_row(tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    given = ["--count", "60", "--out", str(tmp_path / "out"), "--append", str(rows), "--figures", str(tmp_path / "img")]
    assert main(["eval", "experiments", "collapse", *given]) == 0
    row = json.loads(rows.read_text())
    assert (row["kind"], row["experiment"], row["count"]) == ("eval_experiment", "collapse", 60)
    assert {"device", "torch", "commit", "date", "checkpoint_fingerprint"} <= set(row)
    assert json.loads((tmp_path / "out/collapse.json").read_text()) == row
    assert collapse.section(row) in (tmp_path / "out/collapse.md").read_text()
    assert (tmp_path / "img/experiments-collapse.png").read_bytes()[:4] == b"\x89PNG"
    assert "of the checkpoint, spatial tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_clips_are_made_once_for_all_experiments(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    given = ["--count", "2", "--steps", "1", "--out", str(tmp_path)]
    assert main(["eval", "experiments", "priors", *given]) == 0
    assert "| swapped |" in (tmp_path / "priors.md").read_text()
    first = (tmp_path / "priors.json").read_text()
    monkeypatch.setattr(JavisPipeline, "__call__", lambda *_, **__: pytest.fail("a clip was made again"))
    assert main(["eval", "experiments", "priors", *given]) == 0
    kept = ("arms", "less_real")
    assert all(json.loads(first)[k] == json.loads((tmp_path / "priors.json").read_text())[k] for k in kept)


@pytest.mark.slow
def test_attention_makes_its_pictures(tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", "experiments", "attention", "--count", "4", "--steps", "2", "--out", str(tmp_path)]) == 0
    made = {path.name for path in tmp_path.glob("*.png")}
    assert {"attention.png", "attention-single.png", "attention-simultaneous.png"} <= made and len(made) == 6


@pytest.mark.skipif(not (ROOT / "benchmarks/experiments_page.py").is_file(), reason="needs a source tree")
def test_the_page_is_generated_from_the_rows() -> None:
    from benchmarks.experiments_page import page
    from benchmarks.tables import read_rows

    text = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    assert text == page(read_rows(ROOT / "benchmarks/results")), "run `make docs`"
    assert text.count("\n## ") == len(EXPERIMENTS), "an experiment has no row"
    shown = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert shown and all((ROOT / "docs" / name).is_file() for name in shown)
