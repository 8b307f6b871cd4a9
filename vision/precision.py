"""Number format of a network's computation, for training and inference.

`auto` means bf16 where the hardware multiplies it natively (AVX512-BF16 or AMX on a CPU, a GPU
that supports it) and fp32 everywhere else: emulated bf16 is slower and less exact. On a CPU, networks of depthwise
convolutions train in fp32 all the same (decision 065).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from records.errors import ConfigError

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]
DENSE_PER_DEPTHWISE = 50
"""Weights of other layers per weight of a depthwise convolution, below which a CPU trains a network faster in fp32."""


def has_native_bf16(device: str = "cpu") -> bool:
    """Return whether a device multiplies bf16 in hardware."""
    # torch emulates bf16 on older GPUs and reports it as supported unless asked for native support.
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(choice: str, device: str = "cpu") -> Precision:
    """Resolve `auto`, `fp32` or `bf16` to the format used on a device; ConfigError for another word."""
    if choice == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    if choice == "fp32":
        return "fp32"
    if choice == "bf16":
        return "bf16"
    raise ConfigError(f"precision is {choice!r}; it must be auto, fp32 or bf16")


def training_precision(choice: str, network: nn.Module, device: str = "cpu") -> Precision:
    """Resolve a choice as `resolve_precision` does, for the training of a network: `auto` takes the faster format."""
    if choice == "auto" and torch.device(device).type == "cpu" and _is_depthwise(network):
        return "fp32"
    return resolve_precision(choice, device)


def _is_depthwise(network: nn.Module) -> bool:
    weights = {True: 0, False: 0}
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
            weights[depthwise] += layer.weight.numel()
    return weights[False] < DENSE_PER_DEPTHWISE * weights[True]


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[object]:
    """Return the context in which a forward pass runs.

    Args:
        precision: `bf16` casts matrix products and convolutions; `fp32` changes nothing.
        device: a torch device name, such as `cpu` or `cuda:0`.
    Returns:
        A context manager, to be entered once; it is local to the thread.
    """
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()
