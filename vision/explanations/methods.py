"""The registry of explanation methods; API, page, command line and catalogue list the methods from it.

A method maps a network with one output and one image to a `PixelMap`. The registry imports no torch: each
function loads its implementation from `vision.explanations.gradients` on its first call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from records.registry import Registered, Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vision.explanations.gradients import PixelMap

MethodFunction = Callable[["nn.Module", "Tensor"], "PixelMap"]
"""(network [N, 3, S, S] -> [N, 1], normalised image [1, 3, S, S]) -> map of the network's output"""


@dataclass(frozen=True, kw_only=True)
class ExplanationMethod(Registered):
    """A way to attribute a logit to parts of the image.

    Args:
        title: its name in the page.
        needs_gradients: whether it differentiates the network, or the head where that has no closed form.
        evaluations: about how many times as much as one evaluation of the network it computes.
        function: computes the map of one image; None for Grad-CAM, which the forward pass yields for all classes.
    """

    title: str
    needs_gradients: bool
    evaluations: int
    function: MethodFunction | None = field(default=None, repr=False)

    @property
    def needs_fp32(self) -> bool:
        """Whether the model must be loaded with precision fp32: convolutions stored in bf16 run under autocast only."""
        return self.function is not None

    def facts(self) -> dict[str, Any]:
        """Return what the method demands of a model."""
        return {"needs_gradients": self.needs_gradients, "needs_fp32": self.needs_fp32}


def _integrated_gradients(network: "nn.Module", image: "Tensor") -> "PixelMap":
    from vision.explanations.gradients import integrated_gradients_within

    return integrated_gradients_within(network, image)


def _gradient_shap(network: "nn.Module", image: "Tensor") -> "PixelMap":
    from vision.explanations.gradients import gradient_shap

    return gradient_shap(network, image)


def _occlusion(network: "nn.Module", image: "Tensor") -> "PixelMap":
    from vision.explanations.gradients import occlusion_map

    return occlusion_map(network, image)


METHODS: Registry[ExplanationMethod] = Registry(
    "explanation",
    (
        ExplanationMethod(
            name="gradcam",
            title="Grad-CAM",
            description="evidence for a class in the last convolutional stage; computed with the prediction",
            needs_gradients=True,
            evaluations=1,
        ),
        ExplanationMethod(
            name="integrated_gradients",
            title="Integrated Gradients",
            description="share of each pixel in the change of the logit from an image of the mean colour to this one",
            needs_gradients=True,
            evaluations=150,
            function=_integrated_gradients,
        ),
        ExplanationMethod(
            name="gradient_shap",
            title="Gradient SHAP",
            description="the same from three baselines at seeded random points; depends less on one baseline",
            needs_gradients=True,
            evaluations=130,
            function=_gradient_shap,
        ),
        ExplanationMethod(
            name="occlusion",
            title="Occlusion",
            description="drop of the class's logit when a window of the image is covered",
            needs_gradients=False,
            evaluations=225,
            function=_occlusion,
        ),
    ),
)
