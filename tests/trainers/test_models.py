"""Every registered network passes the same suite; its declared numbers are measured on the built network."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from records.errors import ConfigError
from trainers.explanations.closed_form import closed_form_of
from trainers.models import MODELS, architecture_options, build_model
from trainers.models.dropout import LARGEST_RATE, SparseDropout
from trainers.models.registry import check_side
from trainers.settings import TrainersSettings

NUM_MODELS = 3


def test_the_suite_below_runs_all_registered_models() -> None:
    assert len(MODELS) == NUM_MODELS
    assert MODELS.names == ("custom_cnn", "custom_cnn_base", "resnet18")


@pytest.mark.parametrize(("name", "parameters"), [("custom_cnn", 51_221), ("resnet18", 11_172_423)])
def test_the_dissertations_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = build_model(name, 7)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_the_dissertations_parameters_by_convolution() -> None:
    convolutions = [m for m in build_model("custom_cnn", 7).modules() if isinstance(m, nn.Conv2d)]
    counts = [sum(p.numel() for p in conv.parameters()) for conv in convolutions]
    assert counts == [
        224, 1168, 136, 1168, 2320, 4640, 264, 584, 1168, 4640, 264, 1168, 4640, 9248, 18496, 455,
    ]  # fmt: skip


def test_the_dissertations_order_within_a_block() -> None:
    kinds = [type(layer) for layer in build_model("custom_cnn", 7).get_submodule("features.block1")]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d, SparseDropout]
    assert not any(isinstance(m, nn.Linear) for m in build_model("custom_cnn", 7).modules())


@pytest.mark.parametrize("name", MODELS)
def test_declared_numbers_are_true(name: str) -> None:
    recipe, network = MODELS[name], build_model(name, 7).eval()
    assert sum(p.numel() for p in network.parameters()) == recipe.parameters
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == recipe.batch_norm
    assert (closed_form_of(network.head) is not None) == (recipe.gradcam == "closed_form")
    assert receptive_field_px(network, recipe.receptive_field_px + 64) == recipe.receptive_field_px


@pytest.mark.parametrize("name", MODELS)
def test_the_target_layer_is_the_end_of_the_features(name: str) -> None:
    network = build_model(name, 7).eval()
    seen: list[torch.Tensor] = []
    hook = network.get_submodule(MODELS[name].target_layer).register_forward_hook(lambda _m, _i, out: seen.append(out))
    features = network.features(torch.randn(1, 3, 64, 64))
    hook.remove()
    assert torch.equal(seen[0], features)


@pytest.mark.parametrize("name", MODELS)
def test_any_side_down_to_the_smallest(name: str) -> None:
    network = build_model(name, 9).eval()
    for side_px in {MODELS[name].minimum_side_px, 64, 112}:
        assert network(torch.zeros(2, 3, side_px, side_px)).shape == (2, 9)
    with pytest.raises(ConfigError, match=f"at least {MODELS[name].minimum_side_px}"):
        check_side(name, MODELS[name].minimum_side_px - 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_changes_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = build_model(name, 3)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_options_are_settings_and_unknown_ones_are_refused(name: str) -> None:
    settings = TrainersSettings(model=name)
    options = architecture_options(settings)
    assert set(options) == set(MODELS[name].options)
    build_model(name, 7, **options)
    with pytest.raises(ConfigError, match=r"takes no option 'width'; it takes "):
        build_model(name, 7, width=2)


def test_head_dropout_reaches_the_head() -> None:
    head = build_model("resnet18", 7, head_dropout=0.4).head
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.4]


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'resnet'; there are custom_cnn, custom_cnn_base, resnet18"):
        build_model("resnet", 7)


def test_looking_up_needs_no_torch() -> None:
    code = "import sys, trainers.settings, trainers.catalog as c; c.catalogue(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_zeroes_the_right_share_forward_and_backward(rate: float, memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    layer = SparseDropout(rate).train()
    values = torch.ones(16, 8, 32, 32).contiguous(memory_format=memory_format).requires_grad_()
    out = layer(values)
    out.backward(torch.ones(16, 8, 32, 32))
    kept = out != 0
    assert (~kept).float().mean().item() == pytest.approx(rate, rel=0.1)
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - rate)))
    assert values.grad is not None
    assert torch.equal(values.grad, out.detach())


def test_dropout_differs_per_call_and_is_off_in_evaluation() -> None:
    layer, values = SparseDropout(LARGEST_RATE), torch.rand(4, 8, 16, 16)
    assert not torch.equal(layer(values), layer(values))
    assert layer.eval()(values) is values


def receptive_field_px(network: nn.Module, side_px: int) -> int:
    """Measure it: with positive linear layers, the gradient of one position is nonzero exactly where it looks."""
    features = network.features
    _make_linear(features)
    inputs = torch.ones(1, 3, side_px, side_px, requires_grad=True)
    out = features(inputs)
    row, column = out.shape[2] // 2, out.shape[3] // 2
    out[0, 0, row, column].backward()
    assert inputs.grad is not None
    touched = inputs.grad[0].abs().sum(dim=(0, 1)).nonzero()
    return int(touched.max() - touched.min()) + 1


def _make_linear(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU | nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride))
        elif isinstance(child, nn.Conv2d):
            nn.init.constant_(child.weight, 1 / child.weight[0].numel())
        else:
            _make_linear(child)
