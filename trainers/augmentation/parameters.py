"""The parameters that operations take: documented fields with bounds, so that every policy that can be parsed can run.

A span is a range from which a value is drawn for each image. Lengths are shares of the side, so that a policy has the
same effect at 64 and at 224 px.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _within(low: float, high: float) -> AfterValidator:
    """Check a pair of numbers: ascending, both from `low` to `high`."""

    def check(value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the range {list(value)} runs backwards; write {[value[1], value[0]]}")
        if not (low <= value[0] and value[1] <= high):
            raise ValueError(f"both ends should be from {low:g} to {high:g}")
        return value

    return AfterValidator(check)


Span = tuple[float, float]
WholeSpan = tuple[int, int]


class Parameters(BaseModel):
    """Base of an operation's parameters; an operation without any uses it as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RotateParameters(Parameters):
    """Of `rotate`."""

    limit_deg: float = Field(default=45.0, gt=0, le=180, description="turned by up to this many degrees, either way")


class BlurParameters(Parameters):
    """Of `gaussian_blur`."""

    sigma_px: Annotated[Span, _within(0.05, 10.0)] = Field(
        default=(0.1, 1.0), description="width of the blur, pixels of the input side"
    )


class NoiseParameters(Parameters):
    """Of `gaussian_noise`."""

    std: Annotated[Span, _within(0.0, 0.5)] = Field(
        default=(0.01, 0.04), description="standard deviation, as a share of the value range"
    )


class CropParameters(Parameters):
    """Of `crop`."""

    area: Annotated[Span, _within(0.05, 1.0)] = Field(
        default=(0.7, 1.0), description="share of the image's area that is kept"
    )
    aspect: Annotated[Span, _within(0.2, 5.0)] = Field(
        default=(0.9, 1.1), description="width over height of what is kept"
    )


class CutoutParameters(Parameters):
    """Of `cutout`."""

    side: Annotated[Span, _within(0.01, 0.9)] = Field(
        default=(0.1, 0.3), description="height and width of the hole, share of the side"
    )


class ColorJitterParameters(Parameters):
    """Of `color_jitter`."""

    brightness: float = Field(default=0.1, ge=0, le=1, description="changed by up to this share, either way")
    contrast: float = Field(default=0.1, ge=0, le=1, description="changed by up to this share, either way")
    saturation: float = Field(default=0.1, ge=0, le=1, description="changed by up to this share, either way")
    hue: float = Field(
        default=0.0, ge=0, le=0.5, description="turned by up to this share of the colour circle, either way"
    )


class AffineParameters(Parameters):
    """Of `affine`."""

    scale: Annotated[Span, _within(0.5, 2.0)] = Field(default=(0.9, 1.1), description="size, 1 keeps it")
    shift: float = Field(default=0.05, ge=0, le=0.5, description="moved by up to this share of the side, either way")
    rotate_deg: float = Field(default=20.0, ge=0, le=180, description="turned by up to this many degrees, either way")
    shear_deg: float = Field(default=5.0, ge=0, le=45, description="slanted by up to this many degrees, either way")


class JpegParameters(Parameters):
    """Of `jpeg`."""

    quality: Annotated[WholeSpan, _within(5, 100)] = Field(
        default=(40, 90), description="of the compression, as Pillow and OpenCV count it; 100 is nearly lossless"
    )


class DownscaleParameters(Parameters):
    """Of `downscale`."""

    scale: Annotated[Span, _within(0.1, 0.99)] = Field(
        default=(0.4, 0.9), description="share of the side that the image is reduced to before it is brought back"
    )


class VignetteParameters(Parameters):
    """Of `vignette`."""

    radius: Annotated[Span, _within(0.5, 1.5)] = Field(
        default=(0.9, 1.2), description="of the circle that stays bright, share of half the side"
    )
    softness: Annotated[Span, _within(0.005, 0.5)] = Field(
        default=(0.01, 0.1), description="width of the edge, share of half the side"
    )
    shift: float = Field(
        default=0.1, ge=0, le=0.5, description="the circle's centre is moved by up to this share of the side"
    )


class HairParameters(Parameters):
    """Of `hair`."""

    count: Annotated[WholeSpan, _within(1, 60)] = Field(default=(3, 12), description="number of hairs")
    width: Annotated[Span, _within(0.002, 0.05)] = Field(
        default=(0.005, 0.015), description="of a hair, share of the side"
    )
    opacity: Annotated[Span, _within(0.1, 1.0)] = Field(default=(0.5, 0.95), description="1 hides what is beneath")


class RulerParameters(Parameters):
    """Of `ruler`."""

    spacing: Annotated[Span, _within(0.02, 0.5)] = Field(
        default=(0.06, 0.12), description="between two marks, share of the side"
    )
    length: Annotated[Span, _within(0.02, 0.3)] = Field(
        default=(0.04, 0.1), description="of a mark, share of the side; every fifth is longer"
    )
    opacity: Annotated[Span, _within(0.1, 1.0)] = Field(default=(0.5, 0.95), description="1 hides what is beneath")
