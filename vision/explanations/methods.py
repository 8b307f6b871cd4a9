"""The registry of explanation methods: what the command line, the service and the docs list."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vision.explanations.gradients import integrated_gradients, occlusion
from vision.explanations.paths import gradient_shap_maps

DifferentiatingMethod = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExplanationMethod:
    """One way to explain an answer."""

    name: str
    description: str
    function: DifferentiatingMethod | None
    """(network, inputs [N, 3, S, S], target [N]) -> maps [N, h, w]; None: computed in the forward batch"""
    signed: bool


METHODS: dict[str, ExplanationMethod] = {
    method.name: method
    for method in (
        ExplanationMethod(
            name="gradcam",
            description="where the last convolutional stage found evidence for the class; comes with the answer",
            function=None,
            signed=False,
        ),
        ExplanationMethod(
            name="integrated_gradients",
            description="how much each pixel moved the class's logit, on the way from an image of the mean colour",
            function=integrated_gradients,
            signed=True,
        ),
        ExplanationMethod(
            name="gradient_shap",
            description="the same from several baselines at seeded random points: less bound to one image of nothing",
            function=gradient_shap_maps,
            signed=True,
        ),
        ExplanationMethod(
            name="occlusion",
            description="how far the class's logit falls when a window of the image is covered",
            function=occlusion,
            signed=True,
        ),
    )
}
