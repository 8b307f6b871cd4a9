"""What is known about an image that a report should look at separately."""

from collections.abc import Sequence
from dataclasses import dataclass

from records.types import Image
from trainers.evaluation.skin import tone_of

CONFIRMED_BY = ("histopathology", "confocal or follow-up", "consensus", "one reader", "flag")
"""By label rank."""

AGE_BAND_YEARS = 20


@dataclass(frozen=True)
class Traits:
    """One image's; None where nothing is known."""

    age: str | None
    sex: str | None
    localization: str | None
    confirmation: str | None
    skin_tone: str | None


def age_band(age_years: float | None) -> str | None:
    """Name the band of an age: under 20, 20 to 39, 40 to 59, 60 to 79, 80 and older."""
    if age_years is None:
        return None
    low = int(age_years) // AGE_BAND_YEARS * AGE_BAND_YEARS
    if low == 0:
        return f"under {AGE_BAND_YEARS}"
    return "80 and older" if low >= 80 else f"{low} to {low + AGE_BAND_YEARS - 1}"


def traits_of_images(
    images: Sequence[Image], label_ranks: Sequence[int], angles: Sequence[float | None]
) -> list[Traits]:
    """Gather the traits of stored images.

    Args:
        images: [N] ledger rows.
        label_ranks: [N] of their labels.
        angles: [N] of the skin, see `trainers.evaluation.skin`.
    Returns:
        [N] traits.
    """
    return [
        Traits(
            age=age_band(image.age_years),
            sex=image.sex,
            localization=image.localization,
            confirmation=CONFIRMED_BY[rank] if rank < len(CONFIRMED_BY) else None,
            skin_tone=tone_of(angle),
        )
        for image, rank, angle in zip(images, label_ranks, angles, strict=True)
    ]
