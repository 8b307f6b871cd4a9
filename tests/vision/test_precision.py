"""The one decision about number formats."""

import pytest
import torch
from torch import nn

from records.errors import ConfigError
from vision.networks import build_model
from vision.precision import autocast, has_native_bf16, resolve_precision, training_precision


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_hardware_has_it(native, expected, monkeypatch):
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: native)
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, "fp32") for name in ("efficientnet_lite0", "efficientnet_lite2", "efficientnet_b0", "mobilenet_v3")),
        *((name, "bf16") for name in ("custom_cnn", "resnet18", "densenet121", "efficientnet_v2_s", "convnext_tiny")),
    ],
)
def test_on_a_cpu_a_network_trains_in_the_format_that_is_faster_for_it(name, expected, monkeypatch):
    """As measured: bench/RESULTS.md, "Training speed"."""
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: True)
    with torch.device("meta"):
        network = build_model(name, 7)
    assert training_precision("auto", network) == expected
    assert training_precision("auto", network, "cuda") == "bf16"
    assert training_precision("bf16", network) == "bf16"


def test_without_bf16_every_network_trains_in_fp32(monkeypatch):
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: False)
    assert training_precision("auto", nn.Conv2d(3, 8, 3)) == "fp32"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False), ({}, False)],
)
def test_the_processor_says_whether_it_multiplies_bf16(capabilities, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert has_native_bf16("cpu") is expected


@pytest.mark.parametrize("choice", ["fp32", "bf16"])
def test_a_choice_is_kept(choice):
    assert resolve_precision(choice) == choice


def test_another_word_is_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match="'fp16'; it must be auto, fp32 or bf16"):
        resolve_precision("fp16")


def test_autocast_changes_matrix_products_in_bf16_only():
    square = torch.ones(2, 2)
    with autocast("bf16"):
        assert (square @ square).dtype == torch.bfloat16
    with autocast("fp32"):
        assert (square @ square).dtype == torch.float32
