"""Generate dermatoscopy-like images in HAM10000's official layout, so that everything runs without a download.

    relook data synth DIR --lesions 600 --seed 7

writes `HAM10000_images_part_1/`, `HAM10000_images_part_2/`, `masks/` and `HAM10000_metadata.csv`. Equal arguments give
equal bytes. Ids start at ISIC_9000001, far above real ones. The images are artificial: they test the software and say
nothing about skin.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image as PillowImage
from rich.progress import Progress

from images.parallel import chunks_of, map_in_order
from images.synth_lesion import LOOKS, Lesion, draw_look, paint_lesion
from records.arrays import Float32Array, FloatArray, UInt8Array
from records.durable import replacing, write_file
from records.errors import ConfigError, DataError

SHARES: dict[str, float] = {
    "akiec": 0.08, "bcc": 0.10, "bkl": 0.14, "df": 0.05, "mel": 0.16, "nv": 0.42, "vasc": 0.05,
}  # fmt: skip
"""Share of the lesions in each class: unbalanced as in practice, but with enough of each to train on."""

IMAGES_PER_LESION = (0.58, 0.27, 0.15)
"""Probability of 1, 2 and 3 images of a lesion."""

_MARK = "synth.json"
_TABLE = "HAM10000_metadata.csv"
_PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")
_COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
_DX_TYPES: dict[str, dict[str, float]] = {
    "akiec": {"histo": 1.0},
    "bcc": {"histo": 1.0},
    "bkl": {"histo": 0.7, "consensus": 0.25, "confocal": 0.05},
    "df": {"histo": 0.45, "consensus": 0.55},
    "mel": {"histo": 1.0},
    "nv": {"follow_up": 0.5, "histo": 0.36, "consensus": 0.12, "confocal": 0.02},
    "vasc": {"histo": 0.2, "consensus": 0.8},
}
_MEAN_AGE = {"akiec": 66, "bcc": 67, "bkl": 64, "df": 52, "mel": 61, "nv": 45, "vasc": 51}
_SITES = ("back", "lower extremity", "trunk", "upper extremity", "abdomen", "face", "chest", "foot", "neck", "scalp")
_SITE_SHARES = (0.22, 0.21, 0.14, 0.11, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02)


@dataclass(frozen=True)
class SynthReport:
    """Content of a generated folder.

    Args:
        folder: its path.
        images: number of images.
        lesions: number of lesions.
        classes: class code to number of images.
        seed: seed of the generator.
    """

    folder: Path
    images: int
    lesions: int
    classes: dict[str, int]
    seed: int

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {**self.__dict__, "folder": str(self.folder)}


@dataclass(frozen=True)
class _PlannedLesion:
    number: int
    code: str
    first_image: int
    num_images: int
    context: tuple[str, str, str, str]


def synthesize(
    folder: Path,
    *,
    lesions: int,
    seed: int,
    width_px: int = 200,
    shares: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> SynthReport:
    """Generate a data folder.

    Args:
        folder: empty, missing, or generated before with equal arguments (then only finished).
        lesions: number of lesions, at least one per class.
        seed: 0 or more.
        width_px: width of the images, at least 80; the height is three quarters of it (600 = original size).
        shares: class code to share of the lesions; default `SHARES`.
        progress: gets a bar.
    Returns:
        The content of the folder.
    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder holds something else.
    """
    weights = dict(SHARES if shares is None else shares)
    _check_arguments(lesions, seed, width_px, weights)
    plan = _plan(lesions, seed, weights)
    request = {"generator": 1, "lesions": lesions, "seed": seed, "width_px": width_px, "shares": weights}
    if not _is_finished(folder, request):
        _write(folder, plan, seed, width_px, request, progress)
    classes = {code: sum(p.num_images for p in plan if p.code == code) for code in weights}
    return SynthReport(folder, sum(classes.values()), lesions, classes, seed)


def render(code: str, *, seed: int, number: int = 0, view: int = 0, width_px: int = 200) -> bytes:
    """Generate one image as a JPEG file.

    Args:
        code: class code; an unknown one raises ConfigError.
        seed: 0 or more.
        number: number of the lesion.
        view: number of the image of the lesion.
        width_px: width; the height is three quarters of it.
    Returns:
        The bytes.
    """
    if code not in LOOKS:
        raise ConfigError(f"the generator knows no class {code!r}; it knows {', '.join(LOOKS)}")
    planned = _PlannedLesion(number, code, 0, view + 1, ("", "", "", ""))
    return _render_lesion(planned, seed, width_px)[view][0]


def _check_arguments(lesions: int, seed: int, width_px: int, shares: Mapping[str, float]) -> None:
    unknown = sorted(set(shares) - set(LOOKS))
    if unknown:
        raise ConfigError(f"the generator knows no class {unknown[0]!r}; it knows {', '.join(LOOKS)}")
    if not shares or min(shares.values()) <= 0:
        raise ConfigError("every share of a class must be above 0; leave a class out to get none of it")
    if lesions < len(shares):
        raise ConfigError(f"lesions is {lesions}; at least {len(shares)} are needed, one for each class")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or more")
    if width_px < 80:
        raise ConfigError(f"width_px is {width_px}; it must be at least 80")


def _is_finished(folder: Path, request: dict[str, object]) -> bool:
    """Return whether the folder is complete already; refuse one that holds something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    mark = folder / _MARK
    if not mark.is_file():
        raise DataError(f"{folder} is not empty and was not generated by Relook; choose an empty folder")
    if json.loads(mark.read_text()).get("request") != request:
        raise DataError(f"{folder} was generated with other arguments; choose an empty folder, or use the same ones")
    return (folder / _TABLE).is_file()


def _counts(lesions: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split a number by shares, at least 1 each, the rest by largest remainder."""
    total = sum(shares.values())
    exact = {code: lesions * share / total for code, share in shares.items()}
    counts = {code: max(1, int(value)) for code, value in exact.items()}
    by_need = sorted(shares, key=lambda code: (counts[code] - exact[code], code))
    step = 0
    # Rounding down left some lesions; they go to the classes that lost most by it.
    while sum(counts.values()) < lesions:
        counts[by_need[step % len(by_need)]] += 1
        step += 1
    # At least one lesion per class may be too many in sum; the largest classes give them up.
    while sum(counts.values()) > lesions:
        counts[max(counts, key=lambda code: (counts[code], code))] -= 1
    return counts


def _plan(lesions: int, seed: int, shares: Mapping[str, float]) -> list[_PlannedLesion]:
    """Draw the class, the images and the metadata of every lesion, before any is painted."""
    # One generator for the plan and one per lesion, so that lesions can be painted in any order on all cores.
    rng = np.random.default_rng([seed, 0])
    codes = [code for code, count in _counts(lesions, shares).items() for _ in range(count)]
    rng.shuffle(codes)
    plan: list[_PlannedLesion] = []
    next_image = 1
    for number, code in enumerate(codes, start=1):
        count = int(rng.choice(len(IMAGES_PER_LESION), p=IMAGES_PER_LESION)) + 1
        plan.append(_PlannedLesion(number, code, next_image, count, _context(code, rng)))
        next_image += count
    return plan


def _context(code: str, rng: np.random.Generator) -> tuple[str, str, str, str]:
    """Draw (dx_type, age, sex, localization)."""
    kinds = _DX_TYPES[code]
    dx_type = str(rng.choice(list(kinds), p=list(kinds.values())))
    years = float(np.clip(5 * round(rng.normal(_MEAN_AGE[code], 13) / 5), 5, 85))
    age = "" if rng.random() < 0.006 else f"{years:.1f}"
    sex = "unknown" if rng.random() < 0.006 else str(rng.choice(["male", "female"], p=[0.54, 0.46]))
    return dx_type, age, sex, str(rng.choice(_SITES, p=_SITE_SHARES))


def _write(
    folder: Path,
    plan: Sequence[_PlannedLesion],
    seed: int,
    width_px: int,
    request: dict[str, object],
    progress: Progress | None,
) -> None:
    for name in (*_PARTS, "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # The marker is written first and the table last, so that a killed run is recognized and finished.
    mark = {"what": "generated images, not images of patients", "request": request}
    write_file(folder / _MARK, json.dumps(mark, indent=2) + "\n", sync=False)
    num_images = sum(planned.num_images for planned in plan)

    def paint(chunk: Sequence[_PlannedLesion]) -> int:
        for planned in chunk:
            _write_lesion(folder, planned, seed, width_px, num_images)
        return sum(planned.num_images for planned in chunk)

    task = progress.add_task("Painting images", total=num_images) if progress else None
    for count in map_in_order(paint, chunks_of(plan, 8)):
        if progress and task is not None:
            progress.advance(task, count)
    with replacing(folder / _TABLE, sync=False) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for planned in plan:
            dx_type, age, sex, localization = planned.context
            lesion_id = f"HAM_{9_000_000 + planned.number:07d}"
            for view in range(planned.num_images):
                row = (lesion_id, _image_id(planned, view), planned.code, dx_type, age, sex, localization)
                writer.writerow(row)


def _image_id(planned: _PlannedLesion, view: int) -> str:
    return f"ISIC_{9_000_000 + planned.first_image + view:07d}"


def _write_lesion(folder: Path, planned: _PlannedLesion, seed: int, width_px: int, num_images: int) -> None:
    for view, (jpeg, mask_png) in enumerate(_render_lesion(planned, seed, width_px)):
        # By number of the image, so the images of one lesion may lie in both folders.
        part = _PARTS[0] if planned.first_image + view <= num_images // 2 else _PARTS[1]
        image_id = _image_id(planned, view)
        write_file(folder / part / f"{image_id}.jpg", jpeg, sync=False)
        write_file(folder / "masks" / f"{image_id}_segmentation.png", mask_png, sync=False)


def _render_lesion(planned: _PlannedLesion, seed: int, width_px: int) -> list[tuple[bytes, bytes]]:
    """Paint a lesion once and image it as often as planned; returns (JPEG, mask PNG) pairs."""
    height_px = width_px * 3 // 4
    rng = np.random.default_rng([seed, planned.number, 1])
    look = draw_look(planned.code, rng)
    lesion = paint_lesion(look, width_px, height_px / 150.0, rng)
    habits = draw_habits(rng)
    pairs: list[tuple[bytes, bytes]] = []
    for view in range(planned.num_images):
        # Each view has its own generator, so a lesion with more views keeps the first ones unchanged.
        view_rng = np.random.default_rng([seed, planned.number, 2 + view])
        image, mask = draw_view(lesion, habits, width_px, height_px, view_rng)
        jpeg, png = io.BytesIO(), io.BytesIO()
        PillowImage.fromarray(image).save(jpeg, "JPEG", quality=88)
        PillowImage.fromarray(mask).save(png, "PNG", compress_level=3)
        pairs.append((jpeg.getvalue(), png.getvalue()))
    return pairs


# ---------------------------------------------------------------- view of a lesion


@dataclass(frozen=True)
class Habits:
    """Properties that all images of a lesion share.

    Args:
        hairs: mean number of hairs.
        hair_tone: grey value of the hairs, 0 to 255.
        vignette: whether the dermatoscope's rim is visible.
        cast: [3] gain of the camera's channels.
    """

    hairs: float
    hair_tone: float
    vignette: bool
    cast: tuple[float, float, float]


def draw_habits(rng: np.random.Generator) -> Habits:
    """Draw a lesion's surroundings and camera; about a third of the lesions have hairs, a quarter a vignette."""
    hairs = float(rng.gamma(1.5, 6.0)) if rng.random() < 0.35 else 0.0
    exposure, warmth, tint = rng.normal(0, 0.03), rng.normal(0, 0.035), rng.normal(0, 0.012)
    return Habits(
        hairs=hairs,
        hair_tone=float(rng.choice([32.0, 52.0, 84.0, 170.0], p=[0.4, 0.3, 0.2, 0.1])),
        vignette=bool(rng.random() < 0.25),
        cast=(1.0 + exposure + warmth, 1.0 + exposure - abs(tint), 1.0 + exposure - warmth),
    )


def draw_view(
    lesion: Lesion, habits: Habits, width_px: int, height_px: int, rng: np.random.Generator
) -> tuple[UInt8Array, UInt8Array]:
    """Render one image of a lesion: a random pose, hairs, light, vignette and noise.

    Several images of one lesion differ as those of several visits do.

    Args:
        lesion: painted.
        habits: shared by all images of the lesion.
        width_px: W.
        height_px: H.
        rng: the generator of this image.
    Returns:
        The image, uint8 [H, W, 3], and the lesion's mask, uint8 [H, W], 0 or 255.
    """
    matrix = _pose(lesion.rgb.shape[0], width_px, height_px, rng)
    size = (width_px, height_px)
    # Skin is mirrored at the border of the painting, while the mask ends there.
    image = cv2.warpAffine(lesion.rgb, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    mask = cv2.warpAffine(lesion.mask, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    unit_px = height_px / 150.0
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 1.1)) * unit_px)
    planes: list[Float32Array] = [np.asarray(plane) for plane in cv2.split(image)]
    if habits.hairs:
        _draw_hairs(planes, int(rng.poisson(habits.hairs)), habits.hair_tone, unit_px, rng)
    _light(planes, habits, rng)
    grain = rng.standard_normal((height_px, width_px), dtype=np.float32) * np.float32(rng.uniform(1.2, 4.0))
    finished = cv2.merge([np.clip(plane + grain, 0, 255).astype(np.uint8) for plane in planes])
    return np.asarray(finished, dtype=np.uint8), np.where(mask > 0.5, 255, 0).astype(np.uint8)


def _pose(side_px: int, width_px: int, height_px: int, rng: np.random.Generator) -> FloatArray:
    """Return the 2 x 3 matrix from the painting to the image: any rotation, some shift and zoom."""
    angle, zoom = float(rng.uniform(0, 360)), float(np.exp(rng.normal(0, 0.09)))
    middle = (side_px - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, zoom)
    matrix[0, 2] += (width_px - 1) / 2 - middle + rng.normal(0, 0.04) * width_px
    matrix[1, 2] += (height_px - 1) / 2 - middle + rng.normal(0, 0.035) * height_px
    return np.asarray(matrix)


def _draw_hairs(planes: list[Float32Array], count: int, tone: float, unit_px: float, rng: np.random.Generator) -> None:
    """Draw bent hairs of about one direction."""
    height_px, width_px = planes[0].shape
    # Hairs are collected in one plane of weights, so crossing hairs do not darken each other.
    drawn = np.zeros((height_px, width_px), dtype=np.uint8)
    direction = rng.uniform(0, np.pi)
    t = np.linspace(0.0, 1.0, 12)[:, None]
    for _ in range(count):
        angle = direction + rng.normal(0, 0.45)
        along = np.array([np.cos(angle), np.sin(angle)])
        start = rng.uniform(-0.1, 1.0, 2) * (width_px, height_px)
        length = rng.uniform(30, 130) * unit_px
        bow = np.array([-along[1], along[0]]) * rng.normal(0, 0.16) * length
        path = start + along * length * t + bow * 4 * t * (1 - t)
        fixed = np.round(path * 16).astype(np.int32)
        cv2.polylines(drawn, [fixed], False, int(rng.integers(70, 220)), max(1, round(0.8 * unit_px)), cv2.LINE_AA, 4)
    weight = drawn.astype(np.float32) / np.float32(255.0)
    for plane, warmth in zip(planes, (1.1, 0.92, 0.84), strict=True):
        plane += (np.float32(tone * warmth) - plane) * weight


def _light(planes: list[Float32Array], habits: Habits, rng: np.random.Generator) -> None:
    """Apply exposure, the camera's colour cast, uneven light and the rim, in place."""
    height_px, width_px = planes[0].shape
    x = np.linspace(-1, 1, width_px, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height_px, dtype=np.float32)[:, None]
    slope_x, slope_y = rng.normal(0, 0.045, 2)
    gain = np.float32(np.exp(rng.normal(0, 0.06))) * (1 + np.float32(slope_x) * x + np.float32(slope_y) * y)
    distance = np.hypot(x * np.float32(width_px / height_px), y)
    gain = gain * (1 - np.float32(0.07) * distance * distance)
    if habits.vignette:
        rim = np.float32(rng.uniform(1.15, 1.5))
        gain = gain * np.clip((rim - distance) / np.float32(0.16) + 0.5, 0.07, 1.0)
    shades = 1.0 + rng.normal(0, 0.012, 3)
    for plane, cast, shade in zip(planes, habits.cast, shades, strict=True):
        plane *= gain * np.float32(cast * shade)
