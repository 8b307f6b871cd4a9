"""Grad-CAM without a backward pass, for heads whose gradient has a closed form.

Grad-CAM (Selvaraju et al. 2017) multiplies each channel A_k of a feature map A [K, h, w] by a weight, the mean over
positions of d logit_c / d A_k, sums over the channels and keeps the positive part of the sum. For two kinds of heads
the weight has a closed form:

- **Pooling, then a linear layer.** logit_c = sum_k w_ck mean(A_k) + b_c, so the gradient is w_ck / (h*w) at every
  position, and the map is relu(sum_k w_ck A_k) / (h*w).
- **One map per class, then ReLU, batch norm and pooling.** A is the output of the last 1x1 convolution, with K = C.
  logit_c = s_c * (mean(relu(A_c)) - mu_c) + beta_c with s_c = gamma_c / sqrt(var_c + eps), so logit_c depends on the
  map of class c only. The gradient is s_c / (h*w) where A_c > 0 and 0 elsewhere. Its mean over positions is
  s_c * share_c / (h*w), where share_c is the share of positions with A_c > 0.

In: a feature map [N, K, h, w] and the head that follows it. Out: maps [N, C, h, w]. Other heads have no closed form;
for them, `vision.explanations.gradients.head_gradcam` runs a backward pass through the head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from records.errors import ContractError


class ClosedForm(Protocol):
    """A head whose Grad-CAM needs no backward pass."""

    def maps(self, features: Tensor) -> Tensor:
        """Return one map per class, [N, C, h, w], from the feature map [N, K, h, w]."""
        ...


@dataclass(frozen=True)
class PooledLinear:
    """Global average pooling followed by a linear layer."""

    weight: Tensor
    """[K, C] in float64: where a map is faint, hundreds of channels nearly cancel, and fp32 would leave noise"""

    def maps(self, features: Tensor) -> Tensor:
        """Return one map per class, [N, C, h, w], from the feature map [N, K, h, w]."""
        # With channels last, the weighted sum over channels is one matrix product.
        num_positions = features.shape[-2] * features.shape[-1]
        weighted = features.permute(0, 2, 3, 1).double() @ self.weight
        return (torch.relu(weighted) / num_positions).float().permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PooledClassMaps:
    """One feature map per class, then ReLU, an affine step per class, and global average pooling."""

    scale: Tensor
    """[C]: gamma / sqrt(var + eps); 1 without batch norm"""

    def maps(self, features: Tensor) -> Tensor:
        """Return one map per class, [N, C, h, w], from the class maps before their ReLU [N, C, h, w]."""
        features = features.float()
        num_positions = features.shape[-2] * features.shape[-1]
        share_active = (features > 0).float().mean(dim=(2, 3), keepdim=True)
        weighted = self.scale[:, None, None] * share_active / num_positions * features
        # relu(-0.0) is -0.0, which JSON would show; adding 0.0 makes it 0.0.
        return torch.relu(weighted) + 0.0


def closed_form_of(head: nn.Module) -> ClosedForm | None:
    """Return the closed form of `head`, the layers after the target layer of Grad-CAM, or None if it has none."""
    # Dropout is the identity in evaluation mode, and flattening does not change values.
    layers = [layer for layer in head.children() if not isinstance(layer, nn.Dropout | nn.Identity | nn.Flatten)]
    match layers:
        case [nn.AdaptiveAvgPool2d(output_size=1), nn.Linear() as linear]:
            return PooledLinear(linear.weight.detach().double().t().contiguous())
        case [nn.ReLU(), nn.AdaptiveAvgPool2d(output_size=1)]:
            return PooledClassMaps(torch.ones(()).expand(1))
        case [nn.ReLU(), nn.BatchNorm2d() as norm, nn.AdaptiveAvgPool2d(output_size=1)]:
            return PooledClassMaps(batch_norm_scale(norm).float())
        case _:
            return None


def batch_norm_scale(norm: nn.BatchNorm2d) -> Tensor:
    """Return gamma / sqrt(var + eps), the factor of each channel in evaluation, [K] in float64, detached."""
    if norm.running_var is None:
        raise ContractError("batch norm without running statistics has no fixed scale")
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    return gamma.double() / torch.sqrt(norm.running_var.double() + norm.eps)
