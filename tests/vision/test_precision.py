"""The one decision about number formats."""

import pytest
import torch

from records.errors import ConfigError
from vision.precision import autocast, has_native_bf16, resolve_precision


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_hardware_has_it(native, expected, monkeypatch):
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: native)
    assert resolve_precision("auto") == expected


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
