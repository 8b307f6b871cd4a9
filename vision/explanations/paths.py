"""Explanations that integrate gradients along paths, and how complete they are.

In: a network with one output per image, [1, 3, S, S] -> [1, 1], and one normalised image. Out: a signed map
whose sum should be the change of the output between baseline and image; how far it is off is returned.
Captum's GradientShap draws from torch's global generator, which requests at the same time would share, so that
one is written out here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.explanations.gradients import in_flight, integrated_gradients

FIRST_STEPS, MOST_STEPS = 50, 400
ALLOWED_ERROR = 0.02
SHAP_SAMPLES = 64


@dataclass(frozen=True)
class PathMap:
    """A map [1, S, S], how many points it took, and its completeness error (None if the output did not change)."""

    values: Tensor
    steps: int
    completeness_error: float | None


def integrated_gradients_within(network: nn.Module, inputs: Tensor, allowed: float = ALLOWED_ERROR) -> PathMap:
    """Integrate gradients with 50 steps, doubled until the map adds up or there are 400.

    Args:
        network: [N, 3, S, S] -> [N, 1], in evaluation mode.
        inputs: [1, 3, S, S], normalised; zero, the mean colour, is the baseline.
        allowed: completeness error that is small enough.
    Returns:
        The map.
    """
    change = _change(network, inputs, torch.zeros_like(inputs))
    only = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    steps = FIRST_STEPS
    while True:
        values = integrated_gradients(network, inputs, only, steps)
        error = _relative_error(float(values.sum()), change)
        if steps >= MOST_STEPS or error is None or error <= allowed:
            return PathMap(values, steps, error)
        steps *= 2


def gradient_shap(network: nn.Module, inputs: Tensor, num_samples: int = SHAP_SAMPLES, seed: int = 0) -> PathMap:
    """Average gradients at random points between baselines and the image (Lundberg and Lee 2017; Erion et al. 2021).

    Args:
        network: [N, 3, S, S] -> [N, 1], in evaluation mode.
        inputs: [1, 3, S, S], normalised. Baselines are the mean colour of the training images, that of this
            image, and this image blurred.
        num_samples: points.
        seed: of the draw; equal seeds give equal maps.
    Returns:
        The map; its completeness error is against the mean output of the drawn baselines.
    """
    generator = torch.Generator().manual_seed(seed)
    baselines = torch.cat([torch.zeros_like(inputs), _even(inputs), _blurred(inputs)])
    drawn = torch.randint(len(baselines), (num_samples,), generator=generator)
    shares = torch.rand(num_samples, generator=generator).to(inputs.device)[:, None, None, None]
    total = torch.zeros_like(inputs)
    with torch.inference_mode(False), torch.enable_grad():
        image = inputs.detach().clone()
        chunk = in_flight(inputs.shape[-1])
        for start in range(0, num_samples, chunk):
            some = slice(start, start + chunk)
            base = baselines[drawn[some]].detach().clone()
            points = (base + shares[some].clone() * (image - base)).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(network(points).sum(), points)
            total = total + (gradient * (image - base)).sum(dim=0, keepdim=True)
    values = (total / num_samples).sum(dim=1).detach()
    with torch.inference_mode():
        change = float(network(inputs).sum() - network(baselines)[drawn].mean())
    return PathMap(values, num_samples, _relative_error(float(values.sum()), change))


def gradient_shap_maps(network: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    """Return Gradient SHAP maps [N, S, S] of images [N, 3, S, S] for the classes [N]; see `gradient_shap`."""
    return torch.cat(
        [gradient_shap(_OneLogit(network, int(c)), inputs[i : i + 1]).values for i, c in enumerate(target)]
    )


class _OneLogit(nn.Module):
    def __init__(self, network: nn.Module, class_index: int) -> None:
        super().__init__()
        self._network, self._class_index = network, class_index

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._network(inputs)
        return logits[:, self._class_index, None]


def _change(network: nn.Module, inputs: Tensor, baseline: Tensor) -> float:
    with torch.inference_mode():
        return float((network(inputs) - network(baseline)).sum())


def _relative_error(total: float, change: float) -> float | None:
    return abs(total - change) / abs(change) if abs(change) > 1e-6 else None


def _even(inputs: Tensor) -> Tensor:
    return inputs.mean(dim=(2, 3), keepdim=True).expand_as(inputs)


def _blurred(inputs: Tensor) -> Tensor:
    side_px = inputs.shape[-1]
    small = F.interpolate(inputs, size=max(2, side_px // 16), mode="area")
    return F.interpolate(small, size=side_px, mode="bilinear", align_corners=False)
