"""Whole tensors from sharded ones and back, so that a checkpoint does not depend on who shared the work.

A sharded tensor is a DTensor, as `fully_shard` leaves parameters, gradients and optimizer state. For a
plain tensor every function here is the identity, and no collective is run.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether other processes hold parts of the tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds; it shares memory with the tensor."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(value: Any) -> Any:
    """Gather every sharded tensor in nested dicts and lists; all processes call it together.

    Args:
        value: a tensor, a dict, a list, or anything else.
    Returns:
        The same with whole tensors, detached.
    """
    if isinstance(value, Tensor):
        return (value.full_tensor() if is_sharded(value) else value).detach()  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


def split_like(value: Tensor, pattern: Tensor) -> Tensor:
    """Shard a whole tensor as another one is; all processes call it together.

    Args:
        value: whole.
        pattern: a parameter.
    Returns:
        The value, sharded if the pattern is.
    """
    if not is_sharded(pattern):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(
        value.to(pattern.device),
        pattern.device_mesh,  # type: ignore[attr-defined]
        pattern.placements,  # type: ignore[attr-defined]
    )
    return placed


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer the state that a checkpoint holds whole.

    Args:
        optimizer: over parameters that may be sharded.
        state: as `whole(optimizer.state_dict())` returned it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        index: {name: _split_if_alike(item, parameters[index]) for name, item in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": split})


def _split_if_alike(item: Any, parameter: Tensor) -> Any:
    if isinstance(item, torch.Tensor) and item.shape == parameter.shape:
        return split_like(item, parameter)
    return item
