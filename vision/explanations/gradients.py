"""Explanations that differentiate a network or cover parts of its input.

`head_gradcam` differentiates only the head. Integrated Gradients, Gradient SHAP and occlusion attribute the output
of a whole network to pixels; their `PixelMap` says how far the sum of a signed map is from the change of the output
that it should explain. Inputs are normalised images [N, 3, S, S]. Gradients are taken with respect to a copy of the
input, so parameters are untouched and threads may share a network.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IG_STEPS, MAX_IG_STEPS = 50, 400
ALLOWED_ERROR = 0.02
SHAP_SAMPLES = 64
BATCH_SIZE = 32
MAX_PIXELS_IN_FLIGHT = BATCH_SIZE * 112 * 112


@dataclass(frozen=True)
class PixelMap:
    """A signed map of one image and the facts of its computation."""

    values: Tensor
    """[1, S, S]"""
    steps: int | None = None
    """points of the path that was integrated, or samples drawn; None for occlusion"""
    completeness_error: float | None = None
    """|sum of the map - change of the output| / |that change|; None if the output did not change, or for occlusion"""


class ClassAgainst(nn.Module):
    """A network whose one output is the logit of a class, minus that of another class if one is given."""

    def __init__(self, network: nn.Module, target: int, versus: int | None) -> None:
        super().__init__()
        self._network, self._target, self._versus = network, target, versus

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [N, 1]."""
        logits: Tensor = self._network(inputs)
        wanted = logits[:, self._target]
        return (wanted if self._versus is None else wanted - logits[:, self._versus])[:, None]


def in_flight(side_px: int) -> int:
    """Return the largest batch of images [S, S] to hold in memory: 32 up to 112 px, fewer above, at least 1."""
    return max(1, min(BATCH_SIZE, MAX_PIXELS_IN_FLIGHT // side_px**2))


def head_gradcam(head: nn.Module, features: Tensor, target: Tensor) -> Tensor:
    """Compute Grad-CAM by differentiating only what follows the feature map.

    Args:
        head: what follows the target layer: [N, K, h, w] -> logits [N, C].
        features: [N, K, h, w], the target layer's output.
        target: [N] class indices.
    Returns:
        [N, h, w], not negative.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode cannot require gradients, nor be saved for a backward pass as an index is;
        # clones made outside of it can.
        leaf = features.detach().clone().requires_grad_()
        logits = head(leaf)
        # Images are independent, so the gradient of the sum holds each image's own gradient.
        (gradient,) = torch.autograd.grad(logits.gather(1, target.clone()[:, None]).sum(), leaf)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return torch.relu((weights * features).sum(dim=1))


def integrated_gradients(network: nn.Module, inputs: Tensor, target: Tensor, steps: int = IG_STEPS) -> Tensor:
    """Integrate the gradient from an image of the mean colour to the image (Sundararajan et al. 2017).

    Args:
        network: [N, 3, S, S] -> logits [N, C], in evaluation mode.
        inputs: [N, 3, S, S], normalised; zero is the baseline.
        target: [N] class indices.
        steps: points of the integral.
    Returns:
        [N, S, S], signed, summed over colours; a map sums to about logit(image) - logit(baseline).
    """
    # captum imports matplotlib, which takes a second; nothing else here needs it.
    from captum.attr import IntegratedGradients

    chunk = in_flight(inputs.shape[-1])
    with torch.inference_mode(False), torch.enable_grad():
        method = IntegratedGradients(network)
        # internal_batch_size bounds the steps only: captum holds at least one step of every image, so images are
        # chunked as well.
        parts = [
            method.attribute(
                inputs[start : start + chunk].detach().clone(),
                target=target[start : start + chunk].clone(),
                n_steps=steps,
                internal_batch_size=chunk,
            )
            for start in range(0, len(inputs), chunk)
        ]
    return torch.cat(parts).detach().sum(dim=1)


def occlusion(network: nn.Module, inputs: Tensor, target: Tensor, window_px: int | None = None) -> Tensor:
    """Measure how far the class's logit falls when a window of the image is covered with the mean colour.

    Args:
        network: [N, 3, S, S] -> logits [N, C], in evaluation mode.
        inputs: [N, 3, S, S], normalised.
        target: [N] class indices.
        window_px: side of the window, moved by half its side; default S / 8.
    Returns:
        [N, S, S], signed: the mean fall over the windows that cover a pixel.
    """
    from captum.attr import Occlusion

    side_px = window_px or max(2, inputs.shape[-1] // 8)
    stride_px = max(1, side_px // 2)
    with torch.inference_mode():
        method = Occlusion(network)
        parts = [
            method.attribute(
                inputs[row : row + 1],
                sliding_window_shapes=(inputs.shape[1], side_px, side_px),
                strides=(inputs.shape[1], stride_px, stride_px),
                target=target[row : row + 1],
                perturbations_per_eval=in_flight(inputs.shape[-1]),
            )
            # One image per call: captum multiplies the batch by perturbations_per_eval, beyond the bound on memory.
            for row in range(len(inputs))
        ]
    return torch.cat(parts)[:, 0]


def integrated_gradients_within(network: nn.Module, inputs: Tensor, allowed: float = ALLOWED_ERROR) -> PixelMap:
    """Integrate gradients with 50 steps, doubled until the map adds up or there are 400.

    Args:
        network: [N, 3, S, S] -> [N, 1], in evaluation mode.
        inputs: [1, 3, S, S], normalised; zero, the mean colour, is the baseline.
        allowed: completeness error that is small enough.
    Returns:
        The map.
    """
    change = _change(network, inputs, torch.zeros_like(inputs))
    steps = IG_STEPS
    while True:
        values = integrated_gradients(network, inputs, _only_output(inputs), steps)
        error = _relative_error(float(values.sum()), change)
        if steps >= MAX_IG_STEPS or error is None or error <= allowed:
            return PixelMap(values, steps, error)
        # Doubling costs at most twice as much as knowing the number of steps in advance.
        steps *= 2


def gradient_shap(network: nn.Module, inputs: Tensor, num_samples: int = SHAP_SAMPLES, seed: int = 0) -> PixelMap:
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
    # captum's GradientShap draws from torch's global generator, which concurrent requests share; a generator of its
    # own makes equal calls give equal maps.
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
            # Summing the outputs yields the gradient of every point at once: no point depends on another.
            points = (base + shares[some].clone() * (image - base)).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(network(points).sum(), points)
            total = total + (gradient * (image - base)).sum(dim=0, keepdim=True)
    values = (total / num_samples).sum(dim=1).detach()
    with torch.inference_mode():
        change = float(network(inputs).sum() - network(baselines)[drawn].mean())
    return PixelMap(values, num_samples, _relative_error(float(values.sum()), change))


def occlusion_map(network: nn.Module, inputs: Tensor) -> PixelMap:
    """Run `occlusion` on one image [1, 3, S, S] and a network with one output, [N, 3, S, S] -> [N, 1]."""
    return PixelMap(occlusion(network, inputs, _only_output(inputs)))


def _only_output(inputs: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=inputs.device)


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
