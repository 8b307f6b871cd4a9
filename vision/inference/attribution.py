"""One image explained by any registered method, for a class or for a class against another.

In: a loaded model and the pixels of one image. Out: an `Attribution` with what is known of its error.
Nothing random is shared between calls, so equal calls give equal maps, also side by side.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from records.arrays import Float32Array, UInt8Array
from records.errors import ContractError
from vision.explanations.gradients import head_gradcam
from vision.explanations.methods import METHODS
from vision.explanations.paths import gradient_shap, integrated_gradients_within
from vision.inference.loaded import LoadedModel


@dataclass(frozen=True)
class Attribution:
    """A map and how it came about."""

    values: Float32Array
    """[h, w]; not negative for Grad-CAM, else signed"""
    exact: bool
    """computed in closed form, without differentiating"""
    layer: str | None
    """the layer whose map it is; None: the pixels"""
    steps: int | None = None
    """points of the path that was integrated, or samples drawn"""
    completeness_error: float | None = None
    """|sum of the map - change of the logit| as a share of that change"""


class ClassAgainst(nn.Module):
    """A network whose one output is the logit of a class, less that of another if there is one."""

    def __init__(self, network: nn.Module, target: int, versus: int | None) -> None:
        super().__init__()
        self._network, self._target, self._versus = network, target, versus

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [N, 1]."""
        logits: Tensor = self._network(inputs)
        wanted = logits[:, self._target]
        return (wanted if self._versus is None else wanted - logits[:, self._versus])[:, None]


def attribute(
    loaded: LoadedModel, pixels: UInt8Array, method: str, target: int, versus: int | None = None
) -> Attribution:
    """Explain one image.

    Args:
        loaded: the model; methods that differentiate through it need precision fp32.
        pixels: [S, S, 3].
        method: a name in `METHODS`.
        target: class index that the map is about.
        versus: class index that it is held against, or None.
    Returns:
        The map.
    Raises:
        ContractError: the method is unknown, the pixels do not fit, the classes are one, or the precision is bf16.
    """
    if method not in METHODS:
        raise ContractError(f"unknown explanation {method!r}; there are {', '.join(METHODS)}")
    if target == versus:
        raise ContractError("a class cannot be held against itself; name two classes")
    if METHODS[method].function is None:
        return _gradcam(loaded, pixels, target, versus)
    network = ClassAgainst(loaded.network, target, versus)
    inputs = loaded.inputs(pixels[None])
    only = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    if loaded.precision != "fp32":
        raise ContractError(f"{method} differentiates and needs a model loaded with precision fp32")
    if method == "integrated_gradients":
        found = integrated_gradients_within(network, inputs)
        return Attribution(_array(found.values[0]), False, None, found.steps, found.completeness_error)
    if method == "gradient_shap":
        found = gradient_shap(network, inputs)
        return Attribution(_array(found.values[0]), False, None, found.steps, found.completeness_error)
    maps = METHODS[method].function(network, inputs, only)  # type: ignore[misc]
    return Attribution(_array(maps[0]), False, None)


def _gradcam(loaded: LoadedModel, pixels: UInt8Array, target: int, versus: int | None) -> Attribution:
    if versus is None:
        values = loaded.explain(pixels[None], "gradcam", np.array([target]))[0]
        return Attribution(values, loaded.gradcam_is_exact, loaded.target_layer)
    features, head = loaded.feature_map(pixels[None])
    values = head_gradcam(ClassAgainst(head, target, versus), features, torch.zeros(1, dtype=torch.int64))[0]
    return Attribution(_array(values), False, loaded.target_layer)


def _array(values: Tensor) -> Float32Array:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float32)
