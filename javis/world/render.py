"""Drawing: shapes by signed distance, anti-aliased over one pixel, only inside their bounding windows."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from javis.world.motion import FLOOR, STAR_NOTCH, STAR_TIP, Flash, Knock, Pose, Swing, extents
from javis.world.plan import POST_WIDTH
from javis.world.scene import Scene, Source

COLOURS = {
    "red": (226, 52, 46),
    "green": (52, 196, 84),
    "blue": (52, 104, 244),
    "yellow": (242, 214, 56),
    "purple": (172, 68, 222),
    "white": (240, 240, 240),
}
PROP_COLOUR = (98, 100, 106)
STRING_COLOUR = (132, 132, 138)
FLOOR_LIGHTER = 20
DIM = 0.45  # brightness of what flashes, between its flashes
BLOOM = 0.3  # how far a flash goes to white

F32: TypeAlias = NDArray[np.float32]
U8: TypeAlias = NDArray[np.uint8]


def signed_distance(shape: str, u: F32, v: F32, radius: float) -> F32:
    """Signed distance (negative inside) at points ``u`` right and ``v`` down of the centre, in units of ``radius``."""
    if shape == "ball":
        return np.sqrt(u * u + v * v) - np.float32(radius)
    if shape == "box":
        du, dv = np.abs(u) - np.float32(0.88 * radius), np.abs(v) - np.float32(0.88 * radius)
        outside = np.sqrt(np.maximum(du, 0) ** 2 + np.maximum(dv, 0) ** 2)
        return outside + np.minimum(np.maximum(du, dv), 0)
    if shape == "triangle":
        # Apex (0, -r), base corners (+-r, 0.8 r): the larger of the distances to the base and to a slanted side.
        norm = math.hypot(1.8, 1.0)
        slanted = np.abs(u) * np.float32(1.8 / norm) - (v + np.float32(radius)) * np.float32(1 / norm)
        return np.maximum(slanted, v - np.float32(0.8 * radius))
    if shape == "star":
        # Fold the plane onto one tenth of the star, then take the distance to its one edge, from tip to notch.
        rho, sector = np.sqrt(u * u + v * v), np.float32(0.4 * math.pi)
        turn = np.arctan2(u, -v) + np.float32(0.5) * sector
        turn = np.abs(turn - np.floor(turn / sector) * sector - np.float32(0.5) * sector)
        x, y = rho * np.sin(turn), rho * np.cos(turn) - np.float32(STAR_TIP * radius)
        notch = STAR_NOTCH * STAR_TIP * radius
        ex, ey = notch * math.sin(0.2 * math.pi), notch * math.cos(0.2 * math.pi) - STAR_TIP * radius
        along = np.clip((x * np.float32(ex) + y * np.float32(ey)) / np.float32(ex * ex + ey * ey), 0, 1)
        dx, dy = x - along * np.float32(ex), y - along * np.float32(ey)
        inside = x * np.float32(ey) - y * np.float32(ex) > 0
        distance = np.sqrt(dx * dx + dy * dy)
        return np.where(inside, -distance, distance)
    raise ValueError(f"shape {shape!r}: expected ball, box, triangle or star")


def object_alpha(source: Source, pose: Pose, size: int) -> tuple[F32, NDArray[np.intp], NDArray[np.intp]]:
    """Coverage of one object in windows that follow it.

    Returns:
        alpha: float32 [T, K, K] in 0..1.
        rows, columns: int [T, K], pixels of each window; pixel (i, j) has its centre at x = (j + 0.5) / size, y = (i +
            0.5) / size.
    """
    window = min(size, math.ceil(2 * 1.3 * source.radius * size) + 5)
    x, y = pose.x * size, pose.y * size
    corner_x = np.clip(np.round(x - window / 2).astype(np.intp), 0, size - window)
    corner_y = np.clip(np.round(y - window / 2).astype(np.intp), 0, size - window)
    columns, rows = corner_x[:, None] + np.arange(window), corner_y[:, None] + np.arange(window)
    dx = (columns + 0.5 - x[:, None]).astype(np.float32)[:, None, :]
    dy = (rows + 0.5 - y[:, None]).astype(np.float32)[:, :, None]
    if np.any(pose.angle):
        cosine = np.cos(pose.angle).astype(np.float32)[:, None, None]
        sine = np.sin(pose.angle).astype(np.float32)[:, None, None]
        u, v = dx * cosine - dy * sine, dx * sine + dy * cosine
    else:
        u, v = np.broadcast_arrays(dx, dy)
    u = u / pose.scale_x.astype(np.float32)[:, None, None]
    v = v / pose.scale_y.astype(np.float32)[:, None, None]
    distance = signed_distance(source.shape, u, v, source.radius * size)
    return np.clip(np.float32(0.5) - distance, 0, 1).astype(np.float32), rows, columns


def _blend(frames: U8, alpha: F32, rows: NDArray[np.intp], columns: NDArray[np.intp], colour: F32) -> None:
    """Draw ``colour`` [3] or [T, 3] with coverage ``alpha`` [T, R, C] into windows of ``frames`` [T, H, W, 3]."""
    index = (np.arange(len(frames))[:, None, None], rows[:, :, None], columns[:, None, :])
    under = frames[index].astype(np.float32)
    ink = colour.reshape(-1, 1, 1, 3)
    frames[index] = (under + alpha[..., None] * (ink - under) + np.float32(0.5)).astype(np.uint8)


def _span(low: float | F32, high: float | F32, size: int) -> F32:
    """Exact coverage of pixels 0..size-1 by the interval [low, high] (frame sides): [size] or [T, size]."""
    pixel = np.arange(size)
    left = np.asarray(low, dtype=np.float64)[..., None] * size
    right = np.asarray(high, dtype=np.float64)[..., None] * size
    return np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0, 1).astype(np.float32)


def _rectangle(image: F32, left: float, top: float, right: float, bottom: float, colour: tuple[int, int, int]) -> None:
    alpha = _span(top, bottom, len(image))[:, None, None] * _span(left, right, len(image))[None, :, None]
    image += alpha * (np.asarray(colour, dtype=np.float32) - image)


def _still(scene: Scene) -> U8:
    """What does not move: ground, floor, posts, blocks, stands. uint8 [H, W, 3]."""
    size = scene.config.size
    image: F32 = np.empty((size, size, 3), dtype=np.float32)
    image[:] = scene.background
    floor = tuple(c + FLOOR_LIGHTER for c in scene.background)
    _rectangle(image, 0, FLOOR, 1, 1, (floor[0], floor[1], floor[2]))
    for source in scene.sources:
        path = source.path
        if isinstance(path, Swing):
            face = path.pivot + path.direction * path.side
            low, high = sorted((face, face + path.direction * POST_WIDTH))
            _rectangle(image, low, path.length - 0.10, high, FLOOR, PROP_COLOUR)
        elif isinstance(path, Knock):
            _rectangle(image, path.x - 0.11, 0, path.x + 0.11, path.contact - path.top, PROP_COLOUR)
        elif isinstance(path, Flash):
            foot = path.y + extents(source.shape, source.radius).bottom
            _rectangle(image, path.x - 0.035, foot - 0.01, path.x + 0.035, FLOOR, PROP_COLOUR)
    return (image + 0.5).astype(np.uint8)


def _draw_string(frames: U8, path: Swing, pose: Pose) -> None:
    size = frames.shape[1]
    reach = abs(path.length * np.sin(path.first)) + 0.02
    first = max(0, math.floor((path.pivot - reach) * size))
    last = min(size, math.ceil((path.pivot + reach) * size))
    rows, columns = np.arange(math.ceil(path.length * size)), np.arange(first, last)
    down = ((rows + 0.5) / size).astype(np.float32)
    # The string is nearly upright: distance across it is the horizontal distance times the cosine of its angle.
    line = path.pivot + down * np.tan(pose.angle).astype(np.float32)[:, None]
    across = np.abs(((columns + 0.5) / size).astype(np.float32) - line[:, :, None]) * size
    across *= np.cos(pose.angle).astype(np.float32)[:, None, None]
    ends = (down < pose.y[:, None]).astype(np.float32)
    alpha = np.clip(0.5 + 0.008 * size - across, 0, min(1.0, 0.016 * size)).astype(np.float32) * ends[:, :, None]
    every: NDArray[np.intp] = np.zeros((len(frames), 1), dtype=np.intp)
    _blend(frames, alpha, rows + every, columns + every, np.asarray(STRING_COLOUR, dtype=np.float32))


def _draw_rod(frames: U8, path: Knock, pose: Pose) -> None:
    size = frames.shape[1]
    across = _span(path.x - 0.016, path.x + 0.016, size)
    columns = np.flatnonzero(across)
    down = _span(pose.y, np.full_like(pose.y, FLOOR), size)
    alpha = down[:, :, None] * across[columns]
    every: NDArray[np.intp] = np.zeros((len(frames), 1), dtype=np.intp)
    _blend(frames, alpha, np.arange(size) + every, columns + every, np.asarray(PROP_COLOUR, dtype=np.float32))


def _ink(source: Source, pose: Pose) -> F32:
    base = np.asarray(COLOURS[source.colour or ""], dtype=np.float32)
    if not isinstance(source.path, Flash):
        return base
    glow = pose.glow.astype(np.float32)[:, None]
    return base * (DIM + (1 - DIM) * glow) + BLOOM * glow * (255 - base)


def render_video(scene: Scene) -> U8:
    """Frames of a scene, uint8 [T, H, W, 3]; frame i shows the instant i / fps."""
    times = scene.config.frame_times()
    frames = np.repeat(_still(scene)[None], len(times), axis=0)
    for source in scene.sources:
        if source.path is None:
            continue
        pose = source.path.pose(times)
        if isinstance(source.path, Swing):
            _draw_string(frames, source.path, pose)
        elif isinstance(source.path, Knock):
            _draw_rod(frames, source.path, pose)
        alpha, rows, columns = object_alpha(source, pose, scene.config.size)
        _blend(frames, alpha, rows, columns, _ink(source, pose))
    return frames
