"""An image of what a policy does: rows are images, columns are draws; below, every operation alone.

The draws are those of a run: column d shows each image as epoch d of a run with that seed would, mixing
included. In the lower part each operation of the policy is forced on one image, with the policy's parameters.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from records.arrays import UInt8Array
from records.errors import ContractError
from trainers.augmentation.mixing import draw_mix
from trainers.augmentation.operations import Canvas
from trainers.augmentation.policy import Policy
from trainers.augmentation.runner import Augmenter
from vision.seeding import image_keys, image_seeds

_GAP_PX = 4
_LABEL_PX = 150
_LINE_PX = 18
_INK = (30, 30, 30)


def policy_grid(
    policy: Policy, pixels: UInt8Array, image_ids: Sequence[str], *, draws: int, seed: int = 0, first_epoch: int = 1
) -> UInt8Array:
    """Draw a policy on images as a run would, one column per epoch.

    Args:
        policy: what to show.
        pixels: [n, S, S, 3].
        image_ids: [n] 64 hex characters each.
        draws: d, at least 1.
        seed: of the run.
        first_epoch: 1-based; the one of column 1.
    Returns:
        [n, d + 1, S, S, 3]; column 0 holds the images as they are.
    Raises:
        ContractError: no images, no draws, or ids that do not match.
    """
    if not len(pixels) or len(pixels) != len(image_ids) or draws < 1:
        raise ContractError(f"a preview needs images, an id for each and a draw, not {len(pixels)} and {draws}")
    augmenter = Augmenter(policy, _canvas(pixels))
    keys, first_time = image_keys(list(image_ids)), np.zeros(len(pixels), dtype=np.int64)
    columns = [pixels]
    # Seeds count epochs from 0, the operations of a policy from 1.
    for epoch in range(first_epoch - 1, first_epoch - 1 + draws):
        augmenter.begin_epoch(epoch + 1)
        drawn = augmenter.apply(pixels.copy(), image_seeds(seed, epoch, keys, first_time))
        mixing, side_px = policy.mixing, pixels.shape[1]
        mix = draw_mix(mixing, len(pixels), side_px, seed=seed, epoch=epoch, step=0) if mixing else None
        columns.append(mix.apply(drawn, drawn[mix.partner]) if mix else drawn)
    return np.stack(columns, axis=1)


def operation_grid(
    policy: Policy, pixels: UInt8Array, image_ids: Sequence[str], *, draws: int, seed: int = 0
) -> UInt8Array:
    """Draw every operation of a policy alone and always, on one image each.

    Args:
        policy: with m operations.
        pixels: [n, S, S, 3]; operation i is shown on image i, in turn.
        image_ids: [n] 64 hex characters each.
        draws: d, at least 1.
        seed: of the run.
    Returns:
        [m, d + 1, S, S, 3]; column 0 holds the image as it is.
    """
    rows = []
    for number, operation in enumerate(policy.operations):
        at = number % len(pixels)
        alone = Policy(name=operation.operation, operations=(operation.model_copy(update={"probability": 1.0}),))
        rows.append(policy_grid(alone, pixels[at : at + 1], [image_ids[at]], draws=draws, seed=seed)[0])
    return np.stack(rows) if rows else np.empty((0, draws + 1, *pixels.shape[1:]), dtype=np.uint8)


def paint_preview(
    policy: Policy, pixels: UInt8Array, image_ids: Sequence[str], names: Sequence[str], *, draws: int, seed: int = 0
) -> PillowImage.Image:
    """Paint both grids, with names beside the rows.

    Args:
        policy: what to show.
        pixels: [n, S, S, 3].
        image_ids: [n] 64 hex characters each.
        names: [n] for people.
        draws: number of columns beside the original, at least 1.
        seed: of the run.
    Returns:
        An RGB image.
    """
    wholes = policy_grid(policy, pixels, image_ids, draws=draws, seed=seed)
    alone = operation_grid(policy, pixels, image_ids, draws=draws, seed=seed)
    cell_px = pixels.shape[1] + _GAP_PX
    rows = len(wholes) + len(alone)
    height_px = rows * cell_px + 2 * _LINE_PX
    sheet = PillowImage.new("RGB", (_LABEL_PX + (draws + 1) * cell_px, height_px), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    title = f"policy {policy.name} {policy.content_hash()[:12]}, seed {seed}: as it is, then epochs 0 to {draws - 1}"
    pen.text((4, 3), title, fill=_INK, font=font)
    top_px = _paint_rows(sheet, pen, font, wholes, list(names), _LINE_PX)
    if len(alone):
        pen.text((4, top_px + 3), "each operation alone, always", fill=_INK, font=font)
        labels = [f"{step.operation} ({step.probability:g})" for step in policy.operations]
        _paint_rows(sheet, pen, font, alone, labels, top_px + _LINE_PX)
    return sheet


def _paint_rows(
    sheet: PillowImage.Image,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    grid: UInt8Array,
    labels: list[str],
    top_px: int,
) -> int:
    cell_px = grid.shape[2] + _GAP_PX
    for label, row in zip(labels, grid, strict=True):
        pen.text((4, top_px + cell_px // 2 - 8), label[:24], fill=_INK, font=font)
        for column, square in enumerate(row):
            sheet.paste(PillowImage.fromarray(square), (_LABEL_PX + column * cell_px, top_px))
        top_px += cell_px
    return top_px


def _canvas(pixels: UInt8Array) -> Canvas:
    red, green, blue = (float(round(value)) for value in pixels.mean(axis=(0, 1, 2)))
    return Canvas(pixels.shape[1], (red, green, blue))
