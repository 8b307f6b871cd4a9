"""Generated lesions: what each class looks like, as numbers, and how such a look is painted.

The looks are caricatures of the dermatoscopic criteria for the seven diagnoses: enough for a network to tell the
classes apart by shape, colours, border and texture. They are no medical knowledge. All lengths of a painting are in
units of 1/150 of the image's height, so an image shows the same at any size; equal generators give equal pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from records.arrays import Float32Array

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """How a lesion looks. Strengths are 0 to 1, counts are means, colours are sRGB 0 to 255.

    Args:
        main: colour of most of the lesion.
        dark: colour of its patches, dots and network.
        radius: share of half the image's height.
        elongation: longer over shorter axis, at least 1.
        wobble: strength of the few large waves of the outline.
        ragged: strength of the many small ones.
        softness: width of the border, share of the radius.
        lobes: how far a second lobe stands off the first.
        opacity: how much the skin is covered.
        patches: strength of darker patches.
        centre: how much darker the middle is.
        network: strength of the regular mesh.
        dots: number of dark dots.
        veil: strength of a blue-grey veil beside the middle.
        pale: strength of a white area.
        pale_offset: distance of the white area from the middle, share of the radius.
        milia: number of bright dots.
        openings: number of sharp dark pores.
        fissures: strength of dark furrows.
        vessels: number of branching vessels.
        red_dots: number of dotted vessels.
        halo: strength of redness around.
        nests: number of blue-grey ovals.
        lacunae: number of red or dark blood-filled ovals.
        scale: strength of white-yellow flakes.
        strawberry: strength of a red mesh around pale pores.
    """

    main: Colour
    dark: Colour
    radius: float = 0.5
    elongation: float = 1.2
    wobble: float = 0.06
    ragged: float = 0.04
    softness: float = 0.16
    lobes: float = 0.0
    opacity: float = 0.85
    patches: float = 0.2
    centre: float = 0.0
    network: float = 0.0
    dots: float = 0.0
    veil: float = 0.0
    pale: float = 0.0
    pale_offset: float = 0.0
    milia: float = 0.0
    openings: float = 0.0
    fissures: float = 0.0
    vessels: float = 0.0
    red_dots: float = 0.0
    halo: float = 0.0
    nests: float = 0.0
    lacunae: float = 0.0
    scale: float = 0.0
    strawberry: float = 0.0


LOOKS: dict[str, Look] = {
    "akiec": Look(
        main=(206, 118, 108), dark=(150, 84, 68), radius=0.58, elongation=1.35, wobble=0.13, ragged=0.14,
        softness=0.5, opacity=0.5, patches=0.35, red_dots=16, halo=0.45, scale=0.75, strawberry=0.55,
    ),
    "bcc": Look(
        main=(222, 158, 150), dark=(112, 74, 78), radius=0.52, elongation=1.3, wobble=0.12, ragged=0.06,
        softness=0.38, opacity=0.45, patches=0.15, vessels=4, halo=0.2, nests=6, pale=0.25, pale_offset=0.3,
    ),
    "bkl": Look(
        main=(166, 122, 84), dark=(100, 66, 42), radius=0.56, elongation=1.35, wobble=0.1, ragged=0.09,
        softness=0.08, opacity=0.78, patches=0.3, milia=10, openings=8, fissures=0.45,
    ),
    "df": Look(
        main=(186, 132, 112), dark=(138, 90, 68), radius=0.4, elongation=1.12, wobble=0.05, ragged=0.05,
        softness=0.45, opacity=0.66, patches=0.1, network=0.35, pale=0.85, halo=0.25,
    ),
    "mel": Look(
        main=(106, 66, 50), dark=(42, 28, 30), radius=0.64, elongation=1.35, wobble=0.17, ragged=0.11,
        softness=0.16, lobes=0.6, opacity=0.9, patches=0.85, network=0.3, dots=12, veil=0.6, pale=0.4, pale_offset=0.55,
        halo=0.2,
    ),
    "nv": Look(
        main=(148, 94, 66), dark=(88, 52, 38), radius=0.44, elongation=1.2, wobble=0.05, ragged=0.04,
        softness=0.34, opacity=0.8, patches=0.15, centre=0.45, network=0.6, dots=4,
    ),
    "vasc": Look(
        main=(168, 52, 66), dark=(62, 26, 46), radius=0.36, elongation=1.2, wobble=0.08, ragged=0.04,
        softness=0.12, opacity=0.72, patches=0.2, lacunae=12, halo=0.3,
    ),
}  # fmt: skip
"""The typical lesion of each class."""

LOOKALIKES: dict[str, Mapping[str, float]] = {
    "akiec": {"bcc": 0.45, "bkl": 0.45, "mel": 0.1},
    "bcc": {"akiec": 0.5, "nv": 0.2, "df": 0.2, "mel": 0.1},
    "bkl": {"nv": 0.4, "mel": 0.35, "akiec": 0.25},
    "df": {"nv": 0.6, "bcc": 0.4},
    "mel": {"nv": 0.6, "bkl": 0.4},
    "nv": {"mel": 0.45, "bkl": 0.35, "df": 0.2},
    "vasc": {"nv": 0.4, "mel": 0.3, "bcc": 0.3},
}
"""What an untypical lesion of a class is drawn towards, with probabilities."""

UNTYPICAL_SHARE = 0.35
"""Share of lesions that are mixed with another class; it determines how hard the images are to classify."""


def draw_look(code: str, rng: np.random.Generator) -> Look:
    """Draw how one lesion of a class looks.

    It is a variation of the typical look, for a share of the lesions mixed with the look of another class.
    """
    look = LOOKS[code]
    if rng.random() < UNTYPICAL_SHARE:
        others = LOOKALIKES[code]
        other = str(rng.choice(list(others), p=list(others.values())))
        look = blend(look, LOOKS[other], float(rng.uniform(0.25, 0.62)))
    return _jitter(look, rng)


def blend(first: Look, second: Look, share: float) -> Look:
    """Mix two looks linearly: `first` at share 0, `second` at share 1.

    >>> blend(LOOKS["nv"], LOOKS["mel"], 0.5).dots
    8.0
    """
    changes: dict[str, float | Colour] = {}
    for item in fields(Look):
        a, b = getattr(first, item.name), getattr(second, item.name)
        if isinstance(a, tuple):
            changes[item.name] = (_mix(a[0], b[0], share), _mix(a[1], b[1], share), _mix(a[2], b[2], share))
        else:
            changes[item.name] = _mix(a, b, share)
    return replace(first, **changes)  # type: ignore[arg-type]


def _mix(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def _jitter(look: Look, rng: np.random.Generator) -> Look:
    """Vary every number by about a third, and the colours by a common light and warmth."""
    light, warmth = rng.normal(0, 13), rng.normal(0, 7)
    changes: dict[str, float | Colour] = {}
    for item in fields(Look):
        value = getattr(look, item.name)
        if isinstance(value, tuple):
            r, g, b = (channel + light for channel in value)
            changes[item.name] = (r + warmth + rng.normal(0, 4), g + rng.normal(0, 4), b - warmth + rng.normal(0, 4))
        else:
            changes[item.name] = value * float(np.exp(rng.normal(0, 0.3)))
    changes["elongation"] = 1.0 + (look.elongation - 1.0) * float(np.exp(rng.normal(0, 0.5)))
    changes["radius"] = float(np.clip(look.radius * np.exp(rng.normal(0, 0.22)), 0.16, 0.88))
    changes["opacity"] = float(np.clip(look.opacity * np.exp(rng.normal(0, 0.12)), 0.2, 1.0))
    return replace(look, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- painting

SKIN_TONES: tuple[tuple[Colour, float], ...] = (
    ((222, 190, 184), 0.26),
    ((232, 196, 172), 0.24),
    ((226, 160, 152), 0.16),
    ((206, 160, 124), 0.16),
    ((168, 120, 88), 0.1),
    ((116, 78, 58), 0.08),
)
"""Skin colours with their shares, from very light to dark."""

_SHIFT = 4
_WHITE: Colour = (236, 226, 222)
_BLUE_GREY: Colour = (96, 100, 122)
_BLOOD: Colour = (172, 44, 52)


@dataclass
class Lesion:
    """A painted lesion, seen from straight above.

    Args:
        rgb: [S, S, 3], 0 to 255.
        mask: [S, S], 1 inside the lesion.
    """

    rgb: Float32Array
    mask: Float32Array


class _Canvas:
    """State that the painting steps share."""

    def __init__(self, side_px: int, unit_px: float, look: Look, rng: np.random.Generator) -> None:
        self.side_px, self.unit_px, self.look, self.rng = side_px, unit_px, look, rng
        # One plane per channel: blending a colour into it is ten times as fast as into [S, S, 3].
        self.planes: Float32Array = np.empty((3, side_px, side_px), dtype=np.float32)
        axis = (np.arange(side_px, dtype=np.float32) - (side_px - 1) / 2) / unit_px
        self.x, self.y = np.broadcast_to(axis, (side_px, side_px)), np.broadcast_to(axis[:, None], (side_px, side_px))
        self.radius = look.radius * 75.0
        self.outline = _outline(look, rng)
        self.depth, self.alpha = self._shape()

    def noise(self, cell: float, octaves: int = 2) -> Float32Array:
        """Return smooth noise of about unit deviation whose largest features are `cell` units wide."""
        total: Float32Array = np.zeros((1, 1), dtype=np.float32)
        for octave in range(octaves):
            count = max(2, round(self.side_px / self.unit_px / cell * 2**octave)) + 3
            # Coarse octaves are enlarged together with the finer ones, so only one resize is a large one.
            total = _enlarged(total, count)
            total += self.rng.standard_normal((count, count), dtype=np.float32) * np.float32(0.55**octave)
        return _enlarged(total, self.side_px)

    def cover(self, colour: Colour, weight: Float32Array) -> None:
        """Lay a colour over the image; weight 1 hides what is under it."""
        for plane, value in zip(self.planes, colour, strict=True):
            # In place: `plane + (value - plane) * weight` would allocate two more planes for each colour.
            plane -= np.float32(value)
            plane -= plane * weight
            plane += np.float32(value)

    def vary(self, variation: Float32Array, strengths: Colour) -> None:
        """Add a variation to the three channels, each with its own strength."""
        for plane, strength in zip(self.planes, strengths, strict=True):
            plane += variation * np.float32(strength)

    def places(self, count: int, reach: float = 0.85) -> Float32Array:
        """Return [count, 2] random places (x, y) inside the outline, units."""
        angle = self.rng.uniform(0, 2 * np.pi, count)
        index = (angle / (2 * np.pi) * len(self.outline)).astype(int) % len(self.outline)
        # The square root makes the density even over the area; without it places would crowd in the middle.
        distance = self.radius * self.outline[index] * np.sqrt(self.rng.uniform(0, 1, count)) * reach
        return np.stack([np.cos(angle) * distance, np.sin(angle) * distance], axis=1).astype(np.float32)

    def stamp(self, places: Float32Array, radii: Float32Array, stretch: float = 1.0) -> Float32Array:
        """Return a plane with ovals at these places; `stretch` is the longer over the shorter axis."""
        plane = np.zeros((self.side_px, self.side_px), dtype=np.uint8)
        # OpenCV takes fixed-point coordinates, without which small structures would snap to whole pixels.
        scale = 2**_SHIFT
        for (x, y), radius in zip(self.pixels(places), radii * self.unit_px, strict=True):
            axes = (max(1, round(float(radius * stretch) * scale)), max(1, round(float(radius) * scale)))
            angle = float(self.rng.uniform(0, 180)) if stretch > 1.0 else 0.0
            cv2.ellipse(plane, (int(x), int(y)), axes, angle, 0, 360, 255, -1, cv2.LINE_AA, _SHIFT)
        return plane.astype(np.float32) / 255.0

    def pixels(self, places: Float32Array) -> NDArray[np.int32]:
        """Turn units into OpenCV's fixed-point pixels."""
        centred = places * self.unit_px + (self.side_px - 1) / 2
        return np.asarray(np.round(centred * 2**_SHIFT), dtype=np.int32)

    def count(self, mean: float) -> int:
        """Draw a number of things."""
        return int(self.rng.poisson(mean)) if mean > 0.3 else 0

    def blur(self, plane: Float32Array, units: float) -> Float32Array:
        """Return a softened plane."""
        return np.asarray(cv2.GaussianBlur(plane, (0, 0), units * self.unit_px), dtype=np.float32)

    def _shape(self) -> tuple[Float32Array, Float32Array]:
        angle = cv2.phase(self.x.copy(), self.y.copy())
        index = (angle * (len(self.outline) / (2 * np.pi))).astype(np.int32) % len(self.outline)
        distance = np.hypot(self.x, self.y) / self.radius
        waves = self.noise(12.0, 3) * np.float32(self.look.ragged)
        # Positive inside, zero at the outline, so borders of any softness come from one plane.
        depth = np.asarray(1.0 - distance / self.outline[index] + waves, dtype=np.float32)
        return depth, self.blur(_step(depth, self.look.softness), 0.9)


def _enlarged(grid: Float32Array, side_px: int) -> Float32Array:
    return np.asarray(cv2.resize(grid, (side_px, side_px), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def _outline(look: Look, rng: np.random.Generator) -> Float32Array:
    """Return [512] radii over the angle, mean about 1."""
    angle = np.arange(512) * (2 * np.pi / 512)
    turned = angle - rng.uniform(0, np.pi)
    ratio = max(1.0, look.elongation)
    # An ellipse in polar coordinates; both axes change, so the area stays about the same.
    radii = 1.0 / np.sqrt((np.cos(turned) ** 2) / ratio + (np.sin(turned) ** 2) * ratio)
    for wave in range(2, 7):
        radii += look.wobble * rng.normal() / (wave - 0.5) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi)) * 1.5
    if look.lobes > 0.05:
        direction = rng.uniform(0, 2 * np.pi)
        radii *= 1.0 + 0.5 * look.lobes * np.cos(angle - direction) * rng.uniform(0.4, 1.0)
    # Bounded, since a sum of random waves could reach below zero or out of the image.
    return np.asarray(np.clip(radii, 0.3, 1.9), dtype=np.float32)


def _step(value: Float32Array, width: float) -> Float32Array:
    """Return a smooth step from 0 to 1 around 0, `width` wide."""
    t = np.clip(value / np.float32(max(width, 0.02)) + np.float32(0.5), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), dtype=np.float32)


def paint_lesion(look: Look, side_px: int, unit_px: float, rng: np.random.Generator) -> Lesion:
    """Paint a lesion in the middle of a square of skin.

    Args:
        look: how it looks.
        side_px: S.
        unit_px: pixels per 1/150 of the final image's height.
        rng: the generator of this lesion.
    Returns:
        The lesion and its mask.
    """
    canvas = _Canvas(side_px, unit_px, look, rng)
    skin = _paint_skin(canvas)
    _paint_pigment(canvas, skin)
    _paint_red_structures(canvas)
    _paint_dark_structures(canvas)
    _paint_bright_structures(canvas)
    return Lesion(rgb=cv2.merge(tuple(canvas.planes)), mask=(canvas.depth > 0).astype(np.float32))


def _paint_skin(c: _Canvas) -> Colour:
    tones = [tone for tone, _ in SKIN_TONES]
    tone = tones[int(c.rng.choice(len(tones), p=[share for _, share in SKIN_TONES]))]
    light, warmth = float(c.rng.normal(0, 8)), float(c.rng.normal(0, 4))
    r, g, b = tone[0] + light + warmth, tone[1] + light, tone[2] + light - warmth
    c.planes[:] = np.array([r, g, b], dtype=np.float32)[:, None, None]
    c.vary(c.noise(60.0, 2), (3.0, 5.0, 5.0))
    c.vary(c.noise(5.0, 2), (2.6, 3.6, 3.6))
    redness = c.rng.uniform(0.0, 0.22)
    c.cover((r * 0.97, g * 0.74, b * 0.76), _step(c.noise(16.0, 2) - 0.6, 2.0) * np.float32(redness))
    if c.look.halo > 0.05:
        around = c.blur(_step(c.depth + 0.25, 0.8), 5.0)
        c.cover((r * 0.98, g * 0.66, b * 0.68), around * np.float32(min(c.look.halo, 0.8)))
    return (r, g, b)


def _paint_pigment(c: _Canvas, skin: Colour) -> None:
    """Paint the body of the lesion: main colour, darker patches and middle, network, veil."""
    look, rng = c.look, c.rng
    # On dark skin the pigment is darker as well, or it would look lighter than its surroundings.
    shade = min(1.0, sum(skin) / 560.0)
    main, dark = _shaded(look.main, 0.55 + 0.45 * shade), _shaded(look.dark, 0.55 + 0.45 * shade)
    body = c.alpha * np.float32(min(1.0, look.opacity))
    c.cover(main, body)
    c.vary(c.noise(14.0, 3) * body, (11.0, 10.0, 9.0))
    if look.centre > 0.05:
        c.cover(dark, c.alpha * _step(c.depth - 0.5, 0.9) * np.float32(min(0.8, look.centre)))
    if look.patches > 0.05:
        patchy = _step(c.noise(22.0, 3) - np.float32(rng.uniform(-0.3, 0.7)), 1.1)
        c.cover(dark, c.alpha * patchy * np.float32(min(0.95, look.patches)))
    if look.network > 0.08:
        # The pigment network lies in the valleys of the lattice and fades where the noise is low.
        mesh = _step(-_honeycomb(c, float(rng.uniform(4.4, 6.2))), 0.6) * _step(c.noise(20.0, 2) + 0.6, 2.0)
        fade = c.alpha * _step(0.75 - c.depth, 1.2) if look.pale > 0.3 else c.alpha
        c.cover(dark, mesh * fade * np.float32(min(0.85, look.network)))
    if look.veil > 0.08:
        veil = _soft_blob(c, 0.35, 0.55) * c.alpha * np.float32(min(0.85, look.veil))
        c.cover(_BLUE_GREY, veil)


def _shaded(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _honeycomb(c: _Canvas, spacing: float) -> Float32Array:
    """Return a slightly distorted triangular lattice of hills, -0.5 to 1; its valleys form a honeycomb."""
    x = c.x + c.noise(11.0, 2) * np.float32(0.24 * spacing)
    y = c.y + c.noise(11.0, 2) * np.float32(0.24 * spacing)
    turn = c.rng.uniform(0, np.pi / 3)
    k = 2 * np.pi / spacing
    total = np.zeros_like(x)
    for step in range(3):
        angle = turn + step * np.pi / 3
        total += np.cos(x * np.float32(k * np.cos(angle)) + y * np.float32(k * np.sin(angle)))
    return np.asarray(total / 3.0, dtype=np.float32)


def _soft_blob(c: _Canvas, offset: float, size: float) -> Float32Array:
    """Return an uneven soft spot beside the middle; offset and size are shares of the radius."""
    angle = c.rng.uniform(0, 2 * np.pi)
    x, y = (c.radius * offset * f(angle) for f in (np.cos, np.sin))
    distance = np.hypot(c.x - np.float32(x), c.y - np.float32(y)) / np.float32(c.radius * size)
    return _step(1.0 - distance + c.noise(12.0, 2) * np.float32(0.16), 0.9)


def _paint_red_structures(c: _Canvas) -> None:
    look, rng = c.look, c.rng
    if look.strawberry > 0.08:
        hills = _honeycomb(c, float(rng.uniform(6.5, 9.0)))
        c.cover((198, 84, 80), _step(0.2 - hills, 0.6) * c.alpha * np.float32(min(0.6, look.strawberry)))
        c.cover(_WHITE, _step(hills - 0.75, 0.3) * c.alpha * np.float32(min(0.5, look.strawberry)))
    count = c.count(look.red_dots)
    if count:
        dots = c.stamp(c.places(count), rng.uniform(0.8, 1.6, count).astype(np.float32))
        c.cover(_BLOOD, c.blur(dots, 0.5) * np.float32(0.75))
    count = c.count(look.lacunae)
    if count:
        _paint_lacunae(c, count)
    trees = c.count(look.vessels)
    if trees:
        c.cover((188, 70, 72), c.blur(_vessels(c, trees), 0.5) * np.float32(0.8))


def _paint_lacunae(c: _Canvas, count: int) -> None:
    """Paint blood-filled ovals, side by side, of one hue from bright red to nearly black."""
    depth = float(c.rng.beta(1.2, 1.6))
    red, night = np.array(_BLOOD, dtype=np.float32), np.array((44, 24, 52), dtype=np.float32)
    spread = c.radius * 0.26
    for part in range(2):
        n = count - count // 2 if part == 0 else count // 2
        if not n:
            continue
        radii = (spread * c.rng.uniform(0.55, 1.15, n)).astype(np.float32)
        ovals = c.blur(c.stamp(c.places(n, 0.8), radii, 1.3), 0.6)
        tone = red + (night - red) * min(1.0, depth + 0.22 * part)
        c.cover((215, 170, 176), c.blur(ovals, 1.2) * np.float32(0.2))
        c.cover((float(tone[0]), float(tone[1]), float(tone[2])), ovals * np.float32(0.85))


def _vessels(c: _Canvas, trees: int) -> Float32Array:
    """Draw branching vessels that enter from the border."""
    plane = np.zeros((c.side_px, c.side_px), dtype=np.uint8)
    for start in c.places(trees, 1.0):
        heading = float(np.arctan2(-start[1], -start[0]) + c.rng.normal(0, 0.5))
        branches = [(start, heading, 1.3, c.radius * 0.8)]
        for _ in range(5):
            origin, heading, width, length = branches.pop(0)
            turns = np.cumsum(c.rng.normal(0, 0.22, 8)) + heading
            steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * (length / 8)
            path = np.concatenate([origin[None], origin + np.cumsum(steps, axis=0)]).astype(np.float32)
            thickness = max(1, round(width * c.unit_px))
            cv2.polylines(plane, [c.pixels(path)], False, 255, thickness, cv2.LINE_AA, _SHIFT)
            for sign in (-1, 1):
                fork = path[int(c.rng.integers(3, 8))]
                branches.append((fork, float(turns[4] + sign * c.rng.uniform(0.4, 1.0)), width * 0.6, length * 0.55))
    return plane.astype(np.float32) / 255.0


def _paint_dark_structures(c: _Canvas) -> None:
    look, rng = c.look, c.rng
    if look.fissures > 0.08:
        furrow = _step(np.float32(0.2) - np.abs(c.noise(11.0, 2)), 0.9)
        c.cover(look.dark, furrow * c.alpha * np.float32(min(0.7, look.fissures)))
    count = c.count(look.nests)
    if count:
        radii = (c.radius * rng.uniform(0.05, 0.15, count)).astype(np.float32)
        nests = c.blur(c.stamp(c.places(count), radii, 1.5), 1.5)
        c.cover((92, 82, 96), nests * np.float32(0.75))
    count = c.count(look.dots)
    if count:
        dots = c.stamp(c.places(count, 0.95), rng.uniform(0.9, 2.2, count).astype(np.float32))
        c.cover(look.dark, c.blur(dots, 0.5) * np.float32(0.85))
    count = c.count(look.openings)
    if count:
        pores = c.stamp(c.places(count), rng.uniform(1.0, 2.0, count).astype(np.float32))
        c.cover((58, 38, 30), c.blur(pores, 0.35) * np.float32(0.9))


def _paint_bright_structures(c: _Canvas) -> None:
    look, rng = c.look, c.rng
    if look.pale > 0.08:
        spot = _soft_blob(c, look.pale_offset, 0.55) * c.alpha * np.float32(min(0.75, look.pale))
        c.cover((230, 206, 200), spot * _step(c.noise(6.0, 2) + 1.2, 3.0))
    count = c.count(look.milia)
    if count:
        cysts = c.stamp(c.places(count), rng.uniform(0.9, 2.2, count).astype(np.float32))
        c.cover((240, 226, 186), c.blur(cysts, 0.8) * np.float32(0.85))
    if look.scale > 0.08:
        flakes = _step(c.noise(6.0, 3) - np.float32(1.0), 0.5) * c.alpha
        c.cover((240, 228, 206), flakes * np.float32(min(0.85, look.scale)))
