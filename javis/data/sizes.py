"""Sizes of clips that the official JavisDiT weights were trained on: frames, pixels, audio latents.

The pixel sizes are data, since no rounding rule reproduces all of them; the rest follows from rules.
"""

from __future__ import annotations

import math

from javis.errors import UsageError

# Ratio height:width -> the name under which the official tables file it. "50:27" is filed as 2.08 (25:12) there.
RATIO_NAMES: dict[str, str] = {
    "3:8": "0.38",
    "9:21": "0.43",
    "12:25": "0.48",
    "1:2": "0.50",
    "9:17": "0.53",
    "27:50": "0.54",
    "9:16": "0.56",
    "5:8": "0.62",
    "2:3": "0.67",
    "3:4": "0.75",
    "1:1": "1.00",
    "4:3": "1.33",
    "3:2": "1.50",
    "16:9": "1.78",
    "17:9": "1.89",
    "2:1": "2.00",
    "50:27": "2.08",
}


def _sizes(text: str) -> dict[str, tuple[int, int]]:
    """Parse "HxW HxW ..." in the order of RATIO_NAMES."""
    pairs = (tuple(int(n) for n in size.split("x")) for size in text.split())
    return {name: (h, w) for name, (h, w) in zip(RATIO_NAMES.values(), pairs, strict=True)}


def _square_sizes(side: int) -> dict[str, tuple[int, int]]:
    """The few ratios of the square resolutions, multiples of those at 512."""
    at_512 = {"0.48": (352, 736), "0.50": (352, 704), "1.00": (512, 512), "2.00": (704, 352)}
    return {name: (h * side // 512, w * side // 512) for name, (h, w) in at_512.items()}


# Resolution -> ratio name -> (height, width) in pixels.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "144p": _sizes(
        "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 "
        "235x156 256x144 263x139 271x135 277x132"
    ),
    "240p": _sizes(
        "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 "
        "392x262 426x240 440x232 452x226 462x222"
    ),
    "360p": _sizes(
        "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 "
        "588x392 640x360 660x350 678x340 692x332"
    ),
    "480p": _sizes(
        "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 "
        "784x522 854x480 880x466 906x454 924x444"
    ),
    "720p": _sizes(
        "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
        "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666"
    ),
    "1080p": _sizes(
        "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
        "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998"
    ),
    "2k": _sizes(
        "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 "
        "1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330"
    ),
    "4k": _sizes(
        "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 "
        "2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994"
    ),
    "256": _square_sizes(256),
    "512": _square_sizes(512),
    "1024": _square_sizes(1024),
    "2048": _square_sizes(2048),
    "2880": {"1.00": (2880, 2880)},
}

BASE_FRAMES = 51  # frames of the official "2 s" clip: 3 chunks of 17
AUDIO_LATENT_FREQUENCIES = 16  # 64 mel bins / 4
AUDIO_LATENT_CHANNELS = 8
AUDIO_DEFAULT_LATENTS = 256  # latent frames of the AudioLDM2 VAE's own clip of 10.24 s


def image_size(resolution: str, ratio: str) -> tuple[int, int]:
    """(height, width) in pixels of an official bucket.

    Args:
        resolution: "144p" ... "4k", or the side of a square resolution ("512").
        ratio: height:width ("9:16") or its official name ("0.56").

    Raises:
        UsageError: the official table has no such combination.
    """
    sizes = SIZES.get(resolution)
    if sizes is None:
        raise UsageError(f"unknown resolution {resolution!r}; use one of {', '.join(SIZES)}")
    name = RATIO_NAMES.get(ratio, ratio)
    if name not in sizes:
        ratios = ", ".join(given for given, known in RATIO_NAMES.items() if known in sizes)
        raise UsageError(
            f"resolution {resolution} has no size for the ratio {ratio!r} (height:width); use one of {ratios}"
        )
    return sizes[name]


def num_pixels(resolution: str) -> int:
    """Nominal pixels per frame of a resolution: its 9:16 size, or the square one where there is no 9:16."""
    sizes = SIZES.get(resolution)
    if sizes is None:
        raise UsageError(f"unknown resolution {resolution!r}; use one of {', '.join(SIZES)}")
    height, width = sizes.get("0.56", sizes["1.00"])
    return height * width


def official_num_frames(length: str | int) -> int:
    """Frames of an official length: "4x" (times 51), "4s" (51 per 2 s, whatever the frame rate), or a plain number.

    For a duration that means what it says at any frame rate use :func:`num_frames`.
    """
    text = str(length).strip()
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("x", "s") else (text, "")
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(f"length {length!r} is not a number of frames, nor like '2x' or '2s'")
    count = int(number)
    if unit == "x":
        return count * BASE_FRAMES
    if unit == "s":
        if count % 2:
            raise UsageError(f"official lengths in seconds are multiples of 2 s, got {length!r}; use num_frames")
        return count // 2 * BASE_FRAMES
    return count


def num_frames(seconds: float, fps: float) -> int:
    """Frames that cover ``seconds`` at ``fps``, at least one."""
    if not (math.isfinite(seconds) and seconds > 0 and math.isfinite(fps) and fps > 0):
        raise UsageError(f"seconds and frames per second must be positive, got {seconds} s at {fps} fps")
    return max(1, round(seconds * fps))


def audio_latent_length(seconds: float | None, *, sample_rate: int = 16000, hop_length: int = 160) -> int:
    """Latent frames of the AudioLDM2 VAE for ``seconds`` of audio; None: its own length, 256.

    Mel frames (cut, not rounded) are rounded up to a multiple of 32, and 4 of them make one latent frame.
    """
    frame = hop_length / sample_rate
    if seconds is None:
        seconds = AUDIO_DEFAULT_LATENTS * 4 * frame
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"the audio length must be positive, got {seconds} s")
    return math.ceil(int(seconds / frame) / 32) * 32 // 4


def audio_latent_shape(seconds: float | None, batch: int = 1) -> tuple[int, int, int, int]:
    """Shape [B, 8, Ta, 16] of the AudioLDM2 latents for ``seconds`` of audio."""
    return (batch, AUDIO_LATENT_CHANNELS, audio_latent_length(seconds), AUDIO_LATENT_FREQUENCIES)


def waveform_length(seconds: float | None, *, sample_rate: int = 16000, hop_length: int = 160) -> int:
    """Samples of ``seconds`` of audio, to which a decoded waveform is cut; None: those of 256 latent frames."""
    if seconds is None:
        seconds = AUDIO_DEFAULT_LATENTS * 4 * hop_length / sample_rate
    return int(seconds * sample_rate)
