"""Batch norm folded into convolutions, for inference, where the result is exactly the same function.

Two patterns are rewritten, in evaluation mode:

- **conv, batch norm**: W' = s * W, b' = s * (b - mean) + beta, with s = gamma / sqrt(var + eps).
- **conv, ReLU, batch norm**: s * relu(a) + t with t = beta - s * mean equals max(s*a + t, t) where s >= 0 and
  min(s*a + t, t) where s < 0. So batch norm goes into the convolution *before* it, and the ReLU becomes a
  clamp per channel. Folding it into the *next* convolution, as is often done, is wrong under zero
  padding: the border is padded with 0, not with t.

Anything else stays as it is. The input network is not changed.
"""

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from records.errors import ContractError
from vision.explanations.closed_form import batch_norm_scale


class ChannelClamp(nn.Module):
    """A clamp with bounds per channel; replaces ReLU where batch norm is folded through it."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low[None, :, None, None])
        self.register_buffer("high", high[None, :, None, None])

    def forward(self, inputs: Tensor) -> Tensor:
        """Clamp [N, K, h, w] channel by channel; NaN stays NaN."""
        return torch.clamp(inputs, min=self.low, max=self.high)


_TRACING = threading.Lock()


class _OwnThreadTracer(fx.Tracer):
    """Traces only the calls of its own thread.

    While torch.fx traces, it patches `nn.Module.__call__` and `__getattr__` for the whole process. Without this class,
    a network that runs in another thread at that moment would be traced as a part of this one, and fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return an equal network with batch norm folded where that is exact.

    Args:
        network: in evaluation mode.
    Returns:
        A new network that computes the same function with fewer passes over memory, or a copy if torch.fx cannot trace
        it: a network may branch on the size of its input.
    """
    copied = copy.deepcopy(network)
    try:
        with _TRACING:
            traced = fx.GraphModule(copied, _OwnThreadTracer().trace(copied))
    except Exception:  # noqa: BLE001 - tracing runs the network's own code with symbols, which fails in any way
        return copied.eval()
    modules = dict(traced.named_modules())
    uses = _count_uses(traced)
    for node in list(traced.graph.nodes):
        norm = _module(node, modules)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        before, active = _skip_relu(node.args[0], modules)
        conv = _module(before, modules)
        chain = [before] if active is None else [before, active]
        # A value with a second user still needs its unscaled form, and a module called twice would be scaled twice.
        if not isinstance(conv, nn.Conv2d) or any(len(link.users) != 1 for link in chain):
            continue
        if uses[str(before.target)] != 1 or uses[str(node.target)] != 1:
            continue
        replacement = _fold_pair(conv, norm, through_relu=active is not None)
        _set_module(traced, str(node.target), replacement)
        if active is not None:
            node.args = (before,)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced.eval()


def _fold_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d, *, through_relu: bool) -> nn.Module:
    """Scale `conv` in place; return the module that replaces `norm`."""
    if norm.running_mean is None:
        raise ContractError("batch norm without running statistics cannot be folded")
    scale = batch_norm_scale(norm)
    beta = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().double()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.detach().double()
    shift = beta - scale * norm.running_mean.double()
    # Folded in float64 and rounded once, so that the error stays at that of storing fp32 weights.
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.detach().double() * scale[:, None, None, None]).to(dtype))
    conv.bias = nn.Parameter((bias * scale + shift).to(dtype))
    if not through_relu:
        return nn.Identity()
    unbounded = torch.full_like(shift, torch.inf)
    rising = scale >= 0
    low = torch.where(rising, shift, -unbounded)
    high = torch.where(rising, unbounded, shift)
    return ChannelClamp(low.to(dtype), high.to(dtype))


def _skip_relu(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node | None]:
    """Return the node before an optional ReLU, and the ReLU's node if there is one."""
    is_call = node.op == "call_function" and node.target in (torch.relu, nn.functional.relu)
    is_relu = is_call or isinstance(_module(node, modules), nn.ReLU)
    before = node.args[0] if is_relu else None
    return (before, node) if isinstance(before, fx.Node) else (node, None)


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _count_uses(traced: fx.GraphModule) -> dict[str, int]:
    uses: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    return uses


def _set_module(root: nn.Module, target: str, replacement: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    setattr(operator.attrgetter(parent)(root) if parent else root, name, replacement)
