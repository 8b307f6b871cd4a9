"""One image explained by any registered method, for a class or for a class against another.

In: a loaded model and the pixels of one image. Out: an `Attribution`: the map and the facts of its computation.
Calls share no random state, so equal calls give equal maps, concurrent ones included.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from records.arrays import Float32Array, UInt8Array
from records.errors import ConfigError, ContractError, RefusedError
from vision.calibration.decision import labels_of
from vision.explanations.gradients import ClassAgainst, head_gradcam
from vision.explanations.methods import METHODS
from vision.inference.loaded import LoadedModel


@dataclass(frozen=True)
class Attribution:
    """A map and the facts of its computation."""

    values: Float32Array
    """[h, w]; not negative for Grad-CAM, else signed"""
    exact: bool
    """computed in closed form, without differentiating"""
    layer: str | None
    """the layer whose map it is; None: the pixels"""
    steps: int | None = None
    completeness_error: float | None = None
    """this and `steps`: see `PixelMap`"""


@dataclass(frozen=True)
class Explained:
    """An attribution of an image, and the prediction that it explains."""

    target: str
    """code of the class that the map is about"""
    versus: str | None
    """code of the class that it is compared with"""
    probabilities: dict[str, float]
    """by class code, calibrated"""
    attribution: Attribution


def explain(
    loaded: LoadedModel, pixels: UInt8Array, method: str, target: str | None = None, versus: str | None = None
) -> Explained:
    """Predict an image and explain one of its classes.

    Args:
        loaded: the model; every method but Grad-CAM needs precision fp32.
        pixels: [S, S, 3].
        method: a name in `METHODS`.
        target: code of the class to explain; None is the label.
        versus: code of a class to compare it with, or None.
    Returns:
        The map, and what was predicted.
    Raises:
        ConfigError: the class would be compared with itself.
        TaxonomyError: there is no such class.
        RefusedError: the prediction is not finite.
    """
    output = loaded.predict(pixels[None])
    if not output.finite[0]:
        raise RefusedError("the model's prediction for this image is not finite, so there is nothing to explain")
    codes = loaded.taxonomy.codes
    index = loaded.taxonomy.index_of(target) if target else int(labels_of(output.probabilities, loaded.decision)[0])
    other = loaded.taxonomy.index_of(versus) if versus else None
    if other == index:
        raise ConfigError(f"--versus {versus} is the class that is explained; name another one")
    found = attribute(loaded, pixels, method, index, other)
    return Explained(codes[index], versus, dict(zip(codes, output.probabilities[0].tolist(), strict=True)), found)


def attribute(
    loaded: LoadedModel, pixels: UInt8Array, method: str, target: int, versus: int | None = None
) -> Attribution:
    """Explain one image.

    Args:
        loaded: the model; every method but Grad-CAM needs precision fp32.
        pixels: [S, S, 3].
        method: a name in `METHODS`.
        target: class index that the map is about.
        versus: class index whose logit is subtracted from the target's, or None.
    Returns:
        The map.
    Raises:
        ContractError: the method is unknown, the pixels do not fit, the classes are equal, or the precision is bf16.
    """
    if method not in METHODS:
        raise ContractError(f"unknown explanation {method!r}; there are {', '.join(METHODS)}")
    if target == versus:
        raise ContractError("a class cannot be compared with itself; name two classes")
    function = METHODS[method].function
    if function is None:
        return _gradcam(loaded, pixels, target, versus)
    if loaded.precision != "fp32":
        raise ContractError(f"{method} needs a model loaded with precision fp32")
    found = function(ClassAgainst(loaded.network, target, versus), loaded.inputs(pixels[None]))
    return Attribution(_array(found.values[0]), False, None, found.steps, found.completeness_error)


def _gradcam(loaded: LoadedModel, pixels: UInt8Array, target: int, versus: int | None) -> Attribution:
    if versus is None:
        values = loaded.gradcam(pixels[None], np.array([target]))[0]
        return Attribution(values, loaded.gradcam_is_exact, loaded.target_layer)
    # The closed forms end in a ReLU per class, so the map of a difference is not the difference of two maps.
    features, head = loaded.feature_map(pixels[None])
    values = head_gradcam(ClassAgainst(head, target, versus), features, _only_output(features))[0]
    return Attribution(_array(values), False, loaded.target_layer)


def _only_output(features: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=features.device)


def _array(values: Tensor) -> Float32Array:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float32)
