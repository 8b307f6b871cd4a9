"""Mixing two images of a batch and their labels: MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019).

A mix is drawn once per batch from (seed, epoch, step): the partner of each image, the share of the partner and, for
CutMix, the region. So the batch is the same however many workers share it. The loss of a mixed batch is
share * loss(logits, labels) + (1 - share) * loss(logits, partner_labels), for every loss with hard labels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from records.arrays import IntArray, UInt8Array
from vision.seeding import derive_seed


class Mixing(BaseModel):
    """How batches are mixed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["mixup", "cutmix"] = Field(
        description="mixup lays the partner over the image, cutmix replaces a rectangle by the partner's"
    )
    alpha: float = Field(
        default=0.2, gt=0, le=10, description="of the Beta(alpha, alpha) that shares are drawn from; 1 is uniform"
    )
    probability: float = Field(default=0.5, gt=0, le=1, description="share of the batches that are mixed")


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.

    Args:
        partner: [B] position in the batch of everyone's partner.
        share: of the image and its label; the partner has the rest, 0 to 1.
        box: top, bottom, left, right of what the partner replaces, px; None lays the partner over everything.
    """

    partner: IntArray
    share: float
    box: tuple[int, int, int, int] | None = None

    def apply(self, pixels: UInt8Array, partners: UInt8Array) -> UInt8Array:
        """Mix images with their partners.

        Args:
            pixels: [n, S, S, 3].
            partners: [n, S, S, 3].
        Returns:
            [n, S, S, 3], a new array.
        """
        if self.box is None:
            mixed = self.share * pixels.astype(np.float32) + np.float32(1 - self.share) * partners
            return np.rint(mixed).astype(np.uint8)
        top, bottom, left, right = self.box
        mixed = pixels.copy()
        mixed[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
        return mixed


def draw_mix(mixing: Mixing, batch_size: int, side_px: int, *, seed: int, epoch: int, step: int) -> Mix | None:
    """Draw how a batch is mixed.

    Args:
        mixing: of the policy.
        batch_size: B, images of the batch over all workers.
        side_px: S.
        seed: of the run.
        epoch: 0-based.
        step: 0-based, within the epoch.
    Returns:
        The mix, or None for a batch that stays as it is. Equal arguments give equal mixes, on every machine.
    """
    generator = np.random.default_rng(derive_seed(seed, epoch, step, "mixing"))
    if generator.random() >= mixing.probability:
        return None
    partner = generator.permutation(batch_size)
    share = float(generator.beta(mixing.alpha, mixing.alpha))
    if mixing.kind == "mixup":
        return Mix(partner, share)
    box = _draw_box(generator, side_px, np.sqrt(1.0 - share))
    top, bottom, left, right = box
    # The box is cut off at the edge and rounded to pixels; the label follows what is really seen.
    return Mix(partner, 1.0 - (bottom - top) * (right - left) / side_px**2, box)


def _draw_box(generator: np.random.Generator, side_px: int, part: float) -> tuple[int, int, int, int]:
    """Return a square of `part` of the side around a random place, cut off at the edge."""
    middle = generator.integers(0, side_px, 2)
    half_px = round(part * side_px / 2)
    top, left = (int(max(0, m - half_px)) for m in middle)
    bottom, right = (int(min(side_px, m + half_px)) for m in middle)
    return top, bottom, left, right
