"""The page in a real browser: no error in the console, clips that play and seek, nothing wider than a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from javis.cli import main

from . import runs
from .browser import CHROMIUM, DRIVER, Browser, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DRIVER is None or CHROMIUM is None,
        reason="no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)",
    ),
]


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with clips and an evaluation, whose words are hostile."""
    import json

    folder = tmp_path_factory.mktemp("report") / "run"
    runs.training(folder)
    runs.clips(folder)
    (folder / "world.json").write_text(json.dumps(runs.evaluation()))
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def test_no_error_and_nothing_of_a_caption_runs(tab: Browser, page: Path) -> None:
    tab.open(page)
    assert tab.console() == []
    assert tab.run("return document.title") == "javis: run"
    assert (
        tab.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    )
    # The policy holds: a script that found its way in would not run, and is reported.
    planted = "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\";"
    tab.run(planted + "document.body.append(s)")
    assert tab.run("return document.title") == "javis: run"
    assert any("Content Security Policy" in line for line in tab.console())


def test_clips_play_and_seek_and_the_axis_follows(tab: Browser, page: Path) -> None:
    tab.open(page)
    assert tab.run("return document.querySelectorAll('video').length") == 2
    tab.run("document.querySelectorAll('video')[1].play()")
    tab.wait("return document.querySelectorAll('video')[1].currentTime > 0.2")
    facts = tab.run("const v = document.querySelectorAll('video')[1]; return [v.duration, v.videoWidth, v.error]")
    assert facts == [pytest.approx(1.0, abs=0.02), 64, None]
    # A second clip that plays stops the first one.
    tab.run("document.querySelectorAll('video')[0].play()")
    tab.wait("const [a, b] = document.querySelectorAll('video'); return b.paused && a.currentTime > 0")
    tab.run("const v = document.querySelectorAll('video')[0]; v.pause(); v.currentTime = 0.75")
    tab.wait("const v = document.querySelectorAll('video')[0]; return !v.seeking && v.readyState >= 2")
    assert tab.run("return document.querySelectorAll('video')[0].currentTime") == pytest.approx(0.75, abs=0.01)
    line = "return Number(document.querySelectorAll('.playhead')[0].getAttribute('x1'))"
    assert tab.run(line) == pytest.approx(52 + 0.75 * (410 - 52), abs=2)
    assert tab.console() == []


def test_a_click_on_the_axis_seeks_even_before_the_clip_was_played(tab: Browser, page: Path) -> None:
    tab.open(page)
    tab.run(
        """const axis = document.querySelector('.timeline'), box = axis.getBoundingClientRect();
        const at = box.left + box.width * (52 + 0.5 * (410 - 52)) / 420;
        axis.dispatchEvent(new MouseEvent('click', {clientX: at, clientY: box.top + 5, bubbles: true}))"""
    )
    tab.wait("return document.querySelector('video').currentTime > 0")
    assert tab.run("return document.querySelector('video').currentTime") == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_fits_the_screen_and_can_be_read(tab: Browser, page: Path, width: int, dark: bool) -> None:
    tab.size(width, 844, dark=dark)
    tab.open(page)
    assert tab.run("return document.documentElement.scrollWidth") <= width
    # Words against what is behind them, WCAG 2.2: at least 4.5 to 1, those of plots included.
    contrast = """
    const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number)
      .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => { for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
    const words = document.querySelectorAll('p, td, th, a, figcaption, summary, .note, h1, svg text');
    return Math.min(...[...words].filter((e) => !e.closest('video')).map((e) => {
      const style = getComputedStyle(e), b = light(behind(e));
      const a = light(e.tagName == 'text' ? style.fill : style.color);
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
    """
    assert tab.run(contrast) >= 4.5
    # Words of a plot are not smaller than 9 pixels on the screen.
    small = """return Math.min(...[...document.querySelectorAll('figure > svg')].map(
      (s) => s.getBoundingClientRect().width / s.viewBox.baseVal.width * 12))"""
    assert tab.run(small) >= 9
    names = "return [...document.querySelectorAll('video, svg[role=img], .scroll, img')].every(" \
        "(e) => e.ariaLabel || e.alt || e.querySelector('title'))"  # fmt: skip
    assert tab.run(names) is True
