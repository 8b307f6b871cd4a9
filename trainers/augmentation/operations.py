"""Which operations a policy may name, and the transform of each: one of albumentations, or one of `overlays`.

A transform is called as `transform(image=image)["image"]` and takes its random numbers from
`set_random_state`. Nothing here imports albumentations before a transform is built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from records.registry import Registered, Registry
from trainers.augmentation.parameters import (
    AffineParameters,
    BlurParameters,
    ColorJitterParameters,
    CropParameters,
    CutoutParameters,
    DownscaleParameters,
    HairParameters,
    JpegParameters,
    NoiseParameters,
    Parameters,
    RotateParameters,
    RulerParameters,
    VignetteParameters,
)


@dataclass(frozen=True)
class Canvas:
    """What a transform has to know of the images.

    Args:
        side_px: S.
        fill: the training images' mean colour, RGB in 0 to 255.
    """

    side_px: int
    fill: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class OperationRecipe(Registered):
    """An operation that a policy may name.

    Args:
        parameters: the model its parameters are checked against.
        build: (checked parameters, probability, canvas) -> transform; albumentations' arguments are strict.
        at_strength: strength from 0 (barely visible) to 1 -> parameters; None if there are none. A search turns it.
    """

    parameters: type[Parameters]
    at_strength: Callable[[float], dict[str, Any]] | None = field(default=None, repr=False)
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


def _affine(parameters: AffineParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A
    import cv2

    return A.Affine(
        scale=parameters.scale,
        translate_percent=(-parameters.shift, parameters.shift),
        rotate=(-parameters.rotate_deg, parameters.rotate_deg),
        shear=(-parameters.shear_deg, parameters.shear_deg),
        border_mode=cv2.BORDER_REFLECT_101,
        p=probability,
        strict=True,
    )


def _jpeg(parameters: JpegParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A

    return A.ImageCompression(compression_type="jpeg", quality_range=parameters.quality, p=probability, strict=True)


def _downscale(parameters: DownscaleParameters, probability: float, canvas: Canvas) -> Any:
    import albumentations as A
    import cv2

    return A.Downscale(
        scale_range=parameters.scale,
        interpolation_pair={"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR},
        p=probability,
        strict=True,
    )


def _vignette(parameters: VignetteParameters, probability: float, canvas: Canvas) -> Any:
    from trainers.augmentation.overlays import Painted, paint_vignette

    return Painted(paint_vignette, parameters, probability)


def _hair(parameters: HairParameters, probability: float, canvas: Canvas) -> Any:
    from trainers.augmentation.overlays import Painted, paint_hair

    return Painted(paint_hair, parameters, probability)


def _ruler(parameters: RulerParameters, probability: float, canvas: Canvas) -> Any:
    from trainers.augmentation.overlays import Painted, paint_ruler

    return Painted(paint_ruler, parameters, probability)


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
            at_strength=lambda strength: {"limit_deg": 5.0 + 175.0 * strength},
        ),
        OperationRecipe(
            name="gaussian_blur",
            description="softens",
            parameters=BlurParameters,
            build=_gaussian_blur,
            at_strength=lambda strength: {"sigma_px": (0.05, 0.2 + 1.8 * strength)},
        ),
        OperationRecipe(
            name="gaussian_noise",
            description="adds independent noise to every value",
            parameters=NoiseParameters,
            build=_gaussian_noise,
            at_strength=lambda strength: {"std": (0.0, 0.01 + 0.14 * strength)},
        ),
        OperationRecipe(
            name="crop",
            description="keeps a part and scales it back to the full side",
            parameters=CropParameters,
            build=_crop,
            at_strength=lambda strength: {"area": (0.95 - 0.6 * strength, 1.0)},
        ),
        OperationRecipe(
            name="cutout",
            description="covers one rectangle with the training images' mean colour",
            parameters=CutoutParameters,
            build=_cutout,
            at_strength=lambda strength: {"side": (0.05, 0.1 + 0.5 * strength)},
        ),
        OperationRecipe(
            name="color_jitter",
            description="changes brightness, contrast, saturation and hue",
            parameters=ColorJitterParameters,
            build=_color_jitter,
            at_strength=lambda strength: {
                "brightness": 0.4 * strength,
                "contrast": 0.4 * strength,
                "saturation": 0.4 * strength,
                "hue": 0.15 * strength,
            },
        ),
        OperationRecipe(
            name="affine",
            description="scales, moves, turns and slants at once; what comes in at the edge is mirrored",
            parameters=AffineParameters,
            build=_affine,
            at_strength=lambda strength: {
                "scale": (1.0 - 0.3 * strength, 1.0 + 0.3 * strength),
                "shift": 0.15 * strength,
                "rotate_deg": 90.0 * strength,
                "shear_deg": 15.0 * strength,
            },
        ),
        OperationRecipe(
            name="jpeg",
            description="compresses, with its blocks and rings",
            parameters=JpegParameters,
            build=_jpeg,
            at_strength=lambda strength: {"quality": (round(90 - 75 * strength), 95)},
        ),
        OperationRecipe(
            name="downscale",
            description="reduces and brings back to the full side: what a smaller sensor would have seen",
            parameters=DownscaleParameters,
            build=_downscale,
            at_strength=lambda strength: {"scale": (0.9 - 0.7 * strength, 0.95)},
        ),
        OperationRecipe(
            name="vignette",
            description="darkens what lies outside a circle, as the tube of a dermatoscope does",
            parameters=VignetteParameters,
            build=_vignette,
            at_strength=lambda strength: {"radius": (1.2 - 0.5 * strength, 1.3)},
        ),
        OperationRecipe(
            name="hair",
            description="paints hairs over it",
            parameters=HairParameters,
            build=_hair,
            at_strength=lambda strength: {"count": (1, round(3 + 27 * strength))},
        ),
        OperationRecipe(
            name="ruler",
            description="paints the marks of a ruler along one edge",
            parameters=RulerParameters,
            build=_ruler,
            at_strength=lambda strength: {"length": (0.03, 0.05 + 0.2 * strength)},
        ),
    ),
)
