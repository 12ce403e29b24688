"""The size of the pictures: an official name, or WIDTHxHEIGHT."""

from __future__ import annotations

import re
from typing import NamedTuple

from javis.data.sizes import SIZES, image_size
from javis.errors import UsageError

SIDE_RANGE = (16, 4096)


class FrameSize(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def frame_size(resolution: str, ratio: str = "9:16", *, multiple: int = 8) -> FrameSize:
    """``"240p"``, ``"720p"``, ``"512"`` (official sizes) or ``"512x288"`` (WIDTHxHEIGHT) -> height and width in pixels.

    Args:
        resolution: the size. Official sizes are taken as they are: the video codec cuts what does not fill a latent, so
            240p (426 x 240) gives pictures of 424 x 240.
        ratio: height:width of an official size, "9:16" is a wide picture.
        multiple: pixels of a latent; both sides of WIDTHxHEIGHT must be multiples of it.

    Raises:
        UsageError: a name or a ratio that the official tables do not have, or a size that cannot be made.
    """
    text = str(resolution).strip()
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if match is None:
        if text not in SIZES:
            raise UsageError(
                f"unknown resolution {text[:40]!r}; expected one of {', '.join(SIZES)}, or WIDTHxHEIGHT such as 512x512"
            )
        return FrameSize(*image_size(text, ratio))
    width, height = int(match[1]), int(match[2])
    low, high = SIDE_RANGE
    if not (low <= width <= high and low <= height <= high):
        raise UsageError(f"resolution {text} is unusable; expected sides from {low} to {high} pixels")
    if width % multiple or height % multiple:
        nearest = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        raise UsageError(
            f"resolution {text} is unusable: sides must be multiples of {multiple} pixels; the nearest is {nearest}"
        )
    return FrameSize(height, width)
