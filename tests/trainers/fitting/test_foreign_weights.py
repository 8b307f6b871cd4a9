"""Weights that other programs wrote: wrapped names and nested tables are found, and what does not fit is named."""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torchvision import models

from records.errors import ConfigError, IntegrityError
from trainers.fitting.starting import starting_weights
from trainers.settings import ModelSettings
from vision.networks import build_model

STEM = "features.conv1.weight"


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(5)
    return build_model("custom_cnn", 7).state_dict()


def started(path, name="custom_cnn"):
    found = starting_weights(ModelSettings(name=name, weights=str(path)), 7, seed=0)
    assert found is not None
    return found


def saved(folder: Path, content: object, name: str = "start.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def prefixed(table, prefix):
    return {prefix + name: value for name, value in table.items()}


def assert_all(found, own):
    assert (found.drawn, found.unused, found.taken) == ((), (), len(own))
    assert all(np.array_equal(found.values[name], value.numpy()) for name, value in own.items())


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "backbone.", "_orig_mod.", "module.model.", "net.encoder.", "a.b.c."]
)
def test_what_wrappers_put_before_names_is_taken_off(prefix, own, tmp_path):
    assert_all(started(saved(tmp_path, prefixed(own, prefix))), own)
    save_file(prefixed(own, prefix), tmp_path / "start.safetensors")
    assert_all(started(tmp_path / "start.safetensors"), own)


@pytest.mark.parametrize(
    "place", ["state_dict", "model_state_dict", "model", "ema", "weights", "net", "ema.module", "trainer.best"]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_table_is_found_beside_optimizer_and_epoch(place, prefix, own, tmp_path):
    content = prefixed(own, prefix)
    for key in reversed(place.split(".")):
        content = {key: content}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}
    content |= {"epoch": 3, "best": torch.tensor(0.5), "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]}}
    assert_all(started(saved(tmp_path, content)), own)


def test_of_a_network_and_its_average_the_network_is_taken(own, tmp_path):
    average = {name: value * 0 for name, value in own.items()}
    assert_all(started(saved(tmp_path, {"ema": average, "model": own})), own)
    assert_all(started(saved(tmp_path, {"average": average, "state_dict": own})), own)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.backbone."])
def test_published_names_behind_a_prefix_with_a_head_outside_of_it(prefix, tmp_path):
    theirs = models.resnet18(num_classes=3).state_dict()
    table = {name if name.startswith("fc.") else prefix + name: value for name, value in theirs.items()}
    found = started(saved(tmp_path, {"state_dict": table, "epoch": 1}), "resnet18")
    # Another stem and another class count than theirs; all else fits.
    assert found.drawn == (STEM, "head.linear.bias", "head.linear.weight")
    assert found.unused == found.drawn
    assert np.array_equal(found.values["features.layer1.0.conv1.weight"], theirs["layer1.0.conv1.weight"].numpy())


def test_the_sentence_names_what_is_there_and_what_is_missing(own, tmp_path):
    other = {"model": {f"stages.{number}.weight": torch.zeros(2) for number in range(5)}}
    sentence = (
        r"has 0 of the \d+ tensors of custom_cnn: there are stages.0.weight, stages.1.weight, stages.2.weight and 2 "
        r"more, and missing are features.block1.conv.weight, .* and \d+ more; give a file"
    )
    with pytest.raises(ConfigError, match=sentence):
        started(saved(tmp_path, other))
    narrow = {name: value[:1] if value.ndim else value for name, value in own.items()}
    with pytest.raises(ConfigError, match=r"features.block1.conv.weight \(there with shape \(1, .*\), not \(8, "):
        started(saved(tmp_path, prefixed(narrow, "module.")))


@pytest.mark.parametrize(
    ("content", "there"), [({"epoch": 3, "lr": 0.1}, "epoch, lr"), ([1, 2], "list"), ({}, "no others"), (3, "int")]
)
def test_a_file_without_tensors_is_refused_with_what_it_has(content, there, tmp_path):
    with pytest.raises(IntegrityError, match=f"does not hold a table of tensors by name: there is {there}"):
        started(saved(tmp_path, content))


class Evil:
    """Its pickle would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(own, tmp_path):
    with pytest.raises(IntegrityError, match=r"more than tensors \(an object argparse.Namespace\).*state_dict\(\)"):
        started(saved(tmp_path, {"state_dict": own, "args": argparse.Namespace(lr=1)}))
    mark = tmp_path / "ran"
    with pytest.raises(IntegrityError, match="holds more than tensors"):
        started(saved(tmp_path, {"state_dict": own, "hook": Evil(mark)}))
    assert not mark.exists()
    with pytest.raises(IntegrityError, match="holds more than tensors"):
        started(saved(tmp_path, build_model("custom_cnn", 7)))


@pytest.mark.parametrize("name", ["last.ckpt", "pytorch_model.bin", "model_best.pth.tar", "UPPER.PTH", "w.pt"])
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "safetensors"])
def test_content_decides_how_a_file_is_read_and_not_its_suffix(name, form, own, tmp_path):
    if form == "safetensors":
        save_file(own, tmp_path / name)
    else:
        lightning = {"state_dict": prefixed(own, "model."), "epoch": 3, "global_step": 7, "lr_schedulers": []}
        torch.save(lightning, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    assert_all(started(tmp_path / name), own)


@pytest.mark.parametrize("name", ["weights.npz", "weights.onnx", "weights", "weights.tar.gz"])
def test_other_names_are_refused_with_those_that_are_read(name):
    with pytest.raises(ValidationError, match=r"\(\.safetensors, \.pt, \.pth, \.ckpt, \.bin, \.pth\.tar\)"):
        ModelSettings(weights=name)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02}q\x00", b"<html>not found</html>", b"\x08\0\0\0\0\0\0\0{}", bytes(600), b"PK" * 40],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pth.tar", ".safetensors"])
def test_what_is_no_file_of_weights_is_one_sentence(content, suffix, tmp_path):
    (tmp_path / f"start{suffix}").write_bytes(content)
    with pytest.raises((IntegrityError, ConfigError)) as refused:
        started(tmp_path / f"start{suffix}")
    assert "trainers.model.weights" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_above_the_budget_is_not_read(own, tmp_path, monkeypatch):
    path = saved(tmp_path, own, "start.ckpt")
    with zipfile.ZipFile(path) as there, zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in there.namelist():
            packed.writestr(part, there.read(part))
        packed.writestr("archive/more", bytes(5_000_000))
    monkeypatch.setattr("trainers.fitting.starting.MAX_BYTES", 3_000_000)
    assert started(path).taken == len(own)
    with pytest.raises(IntegrityError, match="would unpack to"):
        started(tmp_path / "bomb.ckpt")
    monkeypatch.setattr("trainers.fitting.starting.MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="save the weights alone"):
        started(path)
