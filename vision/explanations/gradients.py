"""Explanations that differentiate: Grad-CAM through any head, Integrated Gradients, occlusion.

In: a network (or its head), normalised images [N, 3, S, S] and the class that each map is about.
Out: one map per image. The gradients are taken with respect to a copy of the input, so that the
network's parameters, and other threads that use it, are untouched. captum draws, too, and takes a second to import:
only what needs it loads it.
"""

import torch
from torch import Tensor, nn

IG_STEPS = 50
BATCH_SIZE = 32
MAX_PIXELS_IN_FLIGHT = BATCH_SIZE * 112 * 112


def in_flight(side_px: int) -> int:
    """Return how many images of a side may be computed with at once: at most 32, fewer above 112 px, at least 1."""
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
        leaf = features.detach().clone().requires_grad_()
        logits = head(leaf)
        (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), leaf)
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
    from captum.attr import IntegratedGradients

    chunk = in_flight(inputs.shape[-1])
    with torch.inference_mode(False), torch.enable_grad():
        method = IntegratedGradients(network)
        # Captum keeps at least one step of every image in memory, so that images come in chunks, too.
        parts = [
            method.attribute(
                inputs[start : start + chunk].detach().clone(),
                target=target[start : start + chunk],
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
            for row in range(len(inputs))
        ]
    return torch.cat(parts)[:, 0]
