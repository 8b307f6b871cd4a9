"""One image explained by any registered method, for a class or for a class against another.

In: a loaded model and the pixels of one image. Out: an `Attribution`: the map and the facts of its computation.
Calls share no random state, so equal calls give equal maps, concurrent ones included.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from records.arrays import Float32Array, UInt8Array
from records.errors import ContractError
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
