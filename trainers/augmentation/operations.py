"""Which operations a policy may name, the parameters each takes, and the albumentations transform it becomes.

Parameters are ranges from which every picture draws its own value. Each is a documented field with
bounds, so a policy that parses is a policy that runs. Nothing here imports albumentations before a
transform is built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from trainers.registry import Registered, Registry


@dataclass(frozen=True)
class Canvas:
    """What a transform has to know of the pictures.

    Args:
        side_px: S.
        fill: the training pictures' mean colour, RGB in 0 to 255.
    """

    side_px: int
    fill: tuple[float, float, float]


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


class Parameters(BaseModel):
    """Base of an operation's parameters; an operation without any uses it as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
        default=(0.7, 1.0), description="share of the picture's area that is kept"
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


@dataclass(frozen=True, kw_only=True)
class OperationRecipe(Registered):
    """An operation that a policy may name.

    Args:
        parameters: the model its parameters are checked against.
        build: (checked parameters, probability, canvas) -> albumentations transform, arguments strict.
    """

    parameters: type[Parameters]
    build: Callable[[Any, float, Canvas], Any] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """Return the parameters with their defaults and meanings."""
        fields = self.parameters.model_fields
        return {"parameters": {n: {"default": f.default, "description": f.description} for n, f in fields.items()}}


def _horizontal_flip(parameters: Parameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.HorizontalFlip(p=probability, strict=True)


def _vertical_flip(parameters: Parameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.VerticalFlip(p=probability, strict=True)


def _d4(parameters: Parameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.D4(p=probability, strict=True)


def _rotate(parameters: RotateParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A
    import cv2

    limits = (-parameters.limit_deg, parameters.limit_deg)
    # Mirrored corners look like skin; black ones would be learned as a frame.
    return A.Rotate(limit=limits, border_mode=cv2.BORDER_REFLECT_101, p=probability, strict=True)


def _gaussian_blur(parameters: BlurParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.GaussianBlur(blur_limit=0, sigma_limit=parameters.sigma_px, p=probability, strict=True)


def _gaussian_noise(parameters: NoiseParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.GaussNoise(std_range=parameters.std, p=probability, strict=True)


def _crop(parameters: CropParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.RandomResizedCrop(
        size=(canvas.side_px, canvas.side_px),
        scale=parameters.area,
        ratio=parameters.aspect,
        p=probability,
        strict=True,
    )


def _cutout(parameters: CutoutParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.CoarseDropout(
        num_holes_range=(1, 1),
        hole_height_range=parameters.side,
        hole_width_range=parameters.side,
        fill=canvas.fill,
        p=probability,
        strict=True,
    )


def _color_jitter(parameters: ColorJitterParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    def around_one(change: float) -> tuple[float, float]:
        return (1.0 - change, 1.0 + change)

    return A.ColorJitter(
        brightness=around_one(parameters.brightness),
        contrast=around_one(parameters.contrast),
        saturation=around_one(parameters.saturation),
        hue=(-parameters.hue, parameters.hue),
        p=probability,
        strict=True,
    )


OPERATIONS: Registry[OperationRecipe] = Registry(
    "augmentation operation",
    (
        OperationRecipe(
            name="horizontal_flip", description="left to right", parameters=Parameters, build=_horizontal_flip
        ),
        OperationRecipe(name="vertical_flip", description="top to bottom", parameters=Parameters, build=_vertical_flip),
        OperationRecipe(
            name="d4", description="one of the eight symmetries of the square", parameters=Parameters, build=_d4
        ),
        OperationRecipe(
            name="rotate",
            description="turns by any angle; corners are mirrored",
            parameters=RotateParameters,
            build=_rotate,
        ),
        OperationRecipe(name="gaussian_blur", description="softens", parameters=BlurParameters, build=_gaussian_blur),
        OperationRecipe(
            name="gaussian_noise",
            description="adds independent noise to every value",
            parameters=NoiseParameters,
            build=_gaussian_noise,
        ),
        OperationRecipe(
            name="crop",
            description="keeps a part and scales it back to the full side",
            parameters=CropParameters,
            build=_crop,
        ),
        OperationRecipe(
            name="cutout",
            description="covers one rectangle with the training pictures' mean colour",
            parameters=CutoutParameters,
            build=_cutout,
        ),
        OperationRecipe(
            name="color_jitter",
            description="changes brightness, contrast, saturation and hue",
            parameters=ColorJitterParameters,
            build=_color_jitter,
        ),
    ),
)
