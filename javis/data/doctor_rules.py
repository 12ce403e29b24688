"""What can be wrong with a clip, told from its row and from what its files hold. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from javis.data.manifest import ClipRow
from javis.data.probe import SAME_TIME, ClipFacts, Picture

# Kind -> what it means. A clip with any of them is left out of the cleaned manifest, but for CORRECTED.
KINDS: dict[str, str] = {
    "broken_row": "a row of the manifest that names no clip",
    "missing_file": "a file that is not there",
    "unreadable": "a file that cannot be opened or decoded, or damaged frames",
    "truncated": "less in the file than its header promises",
    "no_audio": "no sound file, no sound stream, or nothing in it",
    "length_mismatch": "picture and sound of different lengths",
    "offset_mismatch": "picture and sound that do not start together",
    "fps_drift": "a header whose frame rate does not fit the time stamps",
    "variable_frame_rate": "frames at uneven intervals",
    "silence": "sound that stays below the threshold",
    "bad_samples": "sound with values that are not finite",
    "duplicate_id": "an id that an earlier row has",
    "duplicate_file": "the same bytes as an earlier clip",
    "duplicate_content": "the same frames and samples as an earlier clip, in other files",
    "no_caption": "an empty caption, or a placeholder",
    "wrong_numbers": "columns that do not fit the file",
}
CORRECTED = ("wrong_numbers",)
PLACEHOLDERS = frozenset({"", "nan", "none", "null", "n/a", "na", "-", "todo", "caption"})


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """From when on a difference is a fault."""

    length: float = 0.1  # seconds between the lengths of picture and sound
    offset: float = 0.05  # seconds between their starts
    drift: float = SAME_TIME  # seconds that the header's frame rate misplaces the last frame
    uneven: float = 0.25  # share of the median interval
    silence_db: float = -60.0  # peak in dB of full scale


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: str
    line: int  # of the manifest
    id: str
    path: str
    detail: str


class Checked(NamedTuple):
    """A row, its line, and what was measured."""

    line: int
    row: ClipRow
    facts: ClipFacts


def diagnose(checked: Checked, tolerances: Tolerances) -> list[Finding]:
    """All that is wrong with one clip by itself."""
    line, row, facts = checked
    found: list[tuple[str, str]] = list(facts.faults)
    picture, sound = facts.picture, facts.sound
    if not row.audio_path:
        found.append(("no_audio", "the row names no sound"))
    if sound is not None:
        if not sound.is_finite:
            found.append(("bad_samples", "the sound has values that are not finite"))
        elif sound.peak < 10 ** (tolerances.silence_db / 20):
            found.append(("silence", f"the peak of the sound is {sound.peak:.2g} of full scale"))
    if picture is not None:
        if picture.header_fps:
            drift = abs((picture.frames - 1) * (1 / picture.header_fps - 1 / picture.fps))
            if drift > tolerances.drift:
                found.append(
                    ("fps_drift", f"{picture.header_fps:g} fps in the header, {picture.fps:g} by the time stamps")
                )
        if picture.uneven > tolerances.uneven:
            found.append(("variable_frame_rate", f"intervals differ by {picture.uneven:.0%} of the median"))
    # Lengths of a clip that breaks off say nothing more.
    whole = not any(kind in ("truncated", "unreadable") for kind, _ in found)
    if picture is not None and sound is not None and whole:
        if abs(picture.seconds - sound.seconds) > tolerances.length:
            found.append(("length_mismatch", f"picture {picture.seconds:.3f} s, sound {sound.seconds:.3f} s"))
        if abs(picture.start - sound.start) > tolerances.offset:
            found.append(("offset_mismatch", f"picture starts at {picture.start:.3f} s, sound at {sound.start:.3f} s"))
    if row.text.strip().lower() in PLACEHOLDERS:
        found.append(("no_caption", f"the caption is {row.text.strip()!r}"))
    if whole:
        wrong = [
            f"{name} {getattr(row, name):g} is {getattr(fixed, name):g}"
            for fixed in (corrected(row, facts),)
            for name in ("num_frames", "height", "width", "aspect_ratio", "fps", "resolution", "audio_fps")
            if getattr(row, name) != getattr(fixed, name)
        ]
        if wrong:
            found.append(("wrong_numbers", ", ".join(wrong)))
    return [Finding(kind, line, row.id, row.path, detail) for kind, detail in found]


def corrected(row: ClipRow, facts: ClipFacts) -> ClipRow:
    """The row with the numbers of its files; numbers that are right within rounding stay as they are."""
    picture, sound = facts.picture, facts.sound
    if picture is not None:
        row = replace(
            row,
            num_frames=picture.frames,
            height=picture.height,
            width=picture.width,
            resolution=picture.height * picture.width,
            aspect_ratio=_near(row.aspect_ratio, picture.height / picture.width),
            fps=row.fps if _fits(row.fps, picture) else picture.fps,
        )
    if sound is not None:
        row = replace(row, audio_fps=sound.sample_rate)
    return row


def _near(given: float, measured: float) -> float:
    """``given`` if it is ``measured`` rounded to three digits or better."""
    return given if abs(given - measured) <= 1e-3 * measured else measured


def _fits(fps: float, picture: Picture) -> bool:
    """Whether ``fps`` puts the last frame where its time stamp is, and is not off by more than rounding."""
    misplaced = abs((picture.frames - 1) * (1 / fps - 1 / picture.fps))
    return misplaced <= SAME_TIME and abs(fps / picture.fps - 1) <= 5e-3


def duplicates(checked: Sequence[Checked], unusable: Iterable[int]) -> list[Finding]:
    """Clips that are there twice. The one that stays is the first of those with nothing else wrong.

    Args:
        checked: all clips. unusable: lines of clips that are left out for another reason.
    """
    bad, found = set(unusable), []
    seen: dict[tuple[str, str], Checked] = {}
    ordered = sorted(checked, key=lambda clip: (clip.line in bad, clip.line))
    for clip in ordered:
        facts = clip.facts
        keys: list[tuple[str, str, str]] = [("duplicate_id", clip.row.id, "the id")]
        if facts.file_digest and not any(kind == "missing_file" for kind, _ in facts.faults):
            keys.append(("duplicate_file", facts.file_digest, "the bytes"))
        if facts.picture is not None and facts.picture.digest:
            sound = facts.sound.digest if facts.sound is not None else ""
            keys.append(("duplicate_content", f"{facts.picture.digest}/{sound}", "the frames and samples"))
        is_same_file = False
        for kind, key, what in keys:
            first = seen.setdefault((kind, key), clip)
            if first is clip or (kind == "duplicate_content" and is_same_file):
                continue
            is_same_file = is_same_file or kind == "duplicate_file"
            row = clip.row
            found.append(
                Finding(kind, clip.line, row.id, row.path, f"has {what} of {first.row.id} (line {first.line})")
            )
    return sorted(found, key=lambda finding: finding.line)
