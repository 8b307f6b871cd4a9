"""What the generated lesions of each class look like, as numbers; and how they shade into each other.

The table is a caricature of the dermatoscopic criteria for the seven diagnoses: enough for a network to
tell the classes apart by shape, colours, border and texture, and for a person to recognise the idea.
It is no medical knowledge, and nothing learned from it says anything about skin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

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
"""Share of lesions that lie between two classes; it sets how hard the images are."""


def draw_look(code: str, rng: np.random.Generator) -> Look:
    """Draw how one lesion looks.

    Args:
        code: its class.
        rng: the lesion's own generator.
    Returns:
        A look around the typical one, for some lesions part of the way to another class.
    """
    look = LOOKS[code]
    if rng.random() < UNTYPICAL_SHARE:
        others = LOOKALIKES[code]
        other = str(rng.choice(list(others), p=list(others.values())))
        look = blend(look, LOOKS[other], float(rng.uniform(0.25, 0.62)))
    return _jitter(look, rng)


def blend(first: Look, second: Look, share: float) -> Look:
    """Mix two looks.

    Args:
        first: the look at share 0.
        second: the look at share 1.
        share: 0 to 1.
    Returns:
        The look between them, every number on the straight line.

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
