"""Grad-CAM without a backward pass, for heads whose gradient has a closed form.

Grad-CAM (Selvaraju et al. 2017) multiplies each channel A_k of a feature map A [K, h, w] by a weight, the mean over
positions of d logit_c / d A_k, sums over the channels and keeps the positive part of the sum. For three kinds of heads
the weight has a closed form:

- **Pooling, then a linear layer.** logit_c = sum_k w_ck mean(A_k) + b_c, so the gradient is w_ck / (h*w) at every
  position, and the map is relu(sum_k w_ck A_k) / (h*w).
- **One map per class, then ReLU, batch norm and pooling.** A is the output of the last 1x1 convolution, with K = C.
  logit_c = s_c * (mean(relu(A_c)) - mu_c) + beta_c with s_c = gamma_c / sqrt(var_c + eps), so logit_c depends on the
  map of class c only. The gradient is s_c / (h*w) where A_c > 0 and 0 elsewhere. Its mean over positions is
  s_c * share_c / (h*w), where share_c is the share of positions with A_c > 0.
- **Pooling, then a chain of layers** (linear, hard swish, layer norm over the channels). The pooled vector z has one
  gradient per class, g_c = d logit_c / d z, that is the product of the layers' Jacobians. The gradient with respect to
  A_k is g_ck / (h*w) at every position, and the map is relu(sum_k g_ck A_k) / (h*w).

- **An ensemble's head.** Its logit is a weighted sum of the members' logits, each of channels of its own, so the sum
  over all channels is the weighted sum of the members' sums, before the positive part is taken.

In: a feature map [N, K, h, w] and the head that follows it. Out: maps [N, C, h, w]. Other heads have no closed form;
for them, `vision.explanations.gradients.head_gradcam` runs a backward pass through the head.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from records.errors import ContractError
from vision.networks.ensemble import EnsembleHead


class ClosedForm:
    """A head whose Grad-CAM needs no backward pass."""

    pools_first: ClassVar[bool] = True
    """whether the logits depend on the mean of each channel over the positions and on nothing else"""

    def signed(self, features: Tensor) -> Tensor:
        """Return the weighted sum over the channels for each class, [N, C, h, w], from the map [N, K, h, w]."""
        raise NotImplementedError

    def maps(self, features: Tensor) -> Tensor:
        """Return one map per class, [N, C, h, w], from the feature map [N, K, h, w]."""
        # relu(-0.0) is -0.0, which JSON would show; adding 0.0 makes it 0.0.
        return torch.relu(self.signed(features)).float() + 0.0


@dataclass(frozen=True)
class PooledLinear(ClosedForm):
    """Global average pooling followed by a linear layer."""

    weight: Tensor
    """[K, C] in float64: where a map is faint, hundreds of channels nearly cancel, and fp32 would leave noise"""

    def signed(self, features: Tensor) -> Tensor:
        """Return the weighted sum over the channels for each class, [N, C, h, w], from the map [N, K, h, w]."""
        # With channels last, the weighted sum over channels is one matrix product.
        num_positions = features.shape[-2] * features.shape[-1]
        weighted = features.permute(0, 2, 3, 1).double() @ self.weight
        return (weighted / num_positions).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PooledClassMaps(ClosedForm):
    """One feature map per class, then ReLU, an affine step per class, and global average pooling."""

    scale: Tensor
    """[C]: gamma / sqrt(var + eps); 1 without batch norm"""
    pools_first: ClassVar[bool] = False

    def signed(self, features: Tensor) -> Tensor:
        """Return the weighted map of each class, [N, C, h, w], from the class maps before their ReLU [N, C, h, w]."""
        features = features.float()
        num_positions = features.shape[-2] * features.shape[-1]
        share_active = (features > 0).float().mean(dim=(2, 3), keepdim=True)
        return self.scale[:, None, None] * share_active / num_positions * features


@dataclass(frozen=True)
class PooledChain(ClosedForm):
    """Global average pooling followed by several layers whose derivatives are known."""

    layers: tuple[nn.Module, ...]
    """of the kinds in `_KNOWN`, the last one linear; in float64: after a layer norm the terms of a map nearly cancel"""

    def signed(self, features: Tensor) -> Tensor:
        """Return the weighted sum over the channels for each class, [N, C, h, w], from the map [N, K, h, w]."""
        flat = features.flatten(2).double()
        inputs = [flat.mean(dim=2)]
        for layer in self.layers[:-1]:
            inputs.append(_through(layer, inputs[-1]))
        # From the logits back to the pooled vector, for all classes at once: [N or 1, C, width of the layer's input].
        weights = self.layers[-1].get_parameter("weight")[None]
        for layer, before in zip(reversed(self.layers[:-1]), reversed(inputs[:-1]), strict=True):
            weights = _back_through(layer, before, weights)
        return ((weights @ flat) / flat.shape[2]).reshape(-1, weights.shape[1], *features.shape[-2:])


@dataclass(frozen=True)
class WeightedForms(ClosedForm):
    """The closed forms of an ensemble's members, side by side."""

    forms: tuple[ClosedForm, ...]
    channels: list[int]
    """of each member"""
    weights: tuple[float, ...]
    """of each member's logits"""

    def signed(self, features: Tensor) -> Tensor:
        """Return the weighted sum over the channels for each class, [N, C, h, w], from the map [N, K, h, w]."""
        parts = zip(self.weights, self.forms, torch.split(features, self.channels, dim=1), strict=True)
        return torch.stack([weight * form.signed(part).double() for weight, form, part in parts]).sum(dim=0)


_KNOWN = (nn.Linear, nn.Hardswish, nn.LayerNorm)


def _through(layer: nn.Module, inputs: Tensor) -> Tensor:
    # torchvision's layer norm for images expects [N, K, 1, 1]; the function normalises vectors as well.
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    outputs: Tensor = layer(inputs)
    return outputs


def _back_through(layer: nn.Module, before: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient [N, C, K] at the input `before` [N, K] of a layer, from that at its output."""
    if isinstance(layer, nn.Linear):
        return gradient @ layer.weight
    if isinstance(layer, nn.Hardswish):
        # x * clamp(x + 3, 0, 6) / 6: the slope is 0 below -3, 1 above 3, and (2 x + 3) / 6 between.
        slope = torch.where(before < -3, 0.0, torch.where(before <= 3, (2 * before + 3) / 6, 1.0))
        return gradient * slope[:, None]
    if not isinstance(layer, nn.LayerNorm):
        raise ContractError(f"the derivative of {type(layer).__name__} is not known here")
    centred = before - before.mean(dim=1, keepdim=True)
    scale = torch.rsqrt((centred**2).mean(dim=1, keepdim=True) + layer.eps)
    normed, scaled = (centred * scale)[:, None], gradient * layer.weight
    # The mean and the deviation depend on every channel, too.
    along = (scaled * normed).mean(dim=2, keepdim=True) * normed
    return (scaled - scaled.mean(dim=2, keepdim=True) - along) * scale[:, None]


def closed_form_of(head: nn.Module) -> ClosedForm | None:
    """Return the closed form of `head`, the layers after the target layer of Grad-CAM, or None if it has none."""
    if isinstance(head, EnsembleHead):
        forms = [form for member in head.members if (form := closed_form_of(member)) is not None]
        return WeightedForms(tuple(forms), head.channels, head.weights) if len(forms) == len(head.members) else None
    # Dropout is the identity in evaluation mode, and flattening does not change values.
    layers = [
        _as_linear(layer) for layer in head.children() if not isinstance(layer, nn.Dropout | nn.Identity | nn.Flatten)
    ]
    match layers:
        case [nn.AdaptiveAvgPool2d(output_size=1), nn.Linear() as linear]:
            return PooledLinear(linear.weight.detach().double().t().contiguous())
        case [nn.ReLU(), nn.AdaptiveAvgPool2d(output_size=1)]:
            return PooledClassMaps(torch.ones(()).expand(1))
        case [nn.ReLU(), nn.BatchNorm2d() as norm, nn.AdaptiveAvgPool2d(output_size=1)]:
            return PooledClassMaps(batch_norm_scale(norm).float())
        case [nn.AdaptiveAvgPool2d(output_size=1), *chain, nn.Linear() as last] if all(map(_is_known, chain)):
            return PooledChain(tuple(copy.deepcopy(layer).double().requires_grad_(False) for layer in (*chain, last)))
        case _:
            return None


def _is_known(layer: nn.Module) -> bool:
    is_plain = not isinstance(layer, nn.LayerNorm) or (layer.elementwise_affine and len(layer.normalized_shape) == 1)
    return isinstance(layer, _KNOWN) and is_plain


def _as_linear(layer: nn.Module) -> nn.Module:
    """Return the linear layer that a 1x1 convolution is after pooling; other layers as they are."""
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.groups != 1:
        return layer
    linear = nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta")
    # The same memory, so that a head that is still on the meta device, or sharded, stays where it is.
    linear.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def batch_norm_scale(norm: nn.BatchNorm2d) -> Tensor:
    """Return gamma / sqrt(var + eps), the factor of each channel in evaluation, [K] in float64, detached."""
    if norm.running_var is None:
        raise ContractError("batch norm without running statistics has no fixed scale")
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    return gamma.double() / torch.sqrt(norm.running_var.double() + norm.eps)
