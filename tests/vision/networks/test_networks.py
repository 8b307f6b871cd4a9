"""Every registered network passes the same suite; its declared numbers are measured on the built network."""

import copy
import subprocess
import sys

import pytest
import torch
from captum.attr import LayerGradCam
from torch import fx, nn
from torchvision.ops.misc import SqueezeExcitation

from records.errors import ConfigError
from tests.models import NETWORKS
from trainers.settings import ModelSettings, TrainersSettings
from vision.explanations.closed_form import closed_form_of
from vision.explanations.gradients import head_gradcam
from vision.inference.fold import fold_batch_norm
from vision.networks import MODELS, build_model
from vision.networks.custom_cnn import LARGEST_RATE, SparseDropout
from vision.networks.registry import check_side

NUM_MODELS = 14


def test_the_suite_below_runs_all_registered_models() -> None:
    assert len(MODELS) == NUM_MODELS
    assert set(MODELS) >= {"custom_cnn", "resnet18", "resnet34", "densenet121", "inception_v3", "efficientnet_lite0"}


@pytest.mark.parametrize(
    ("name", "parameters"), [("custom_cnn", 51_221), ("resnet18", 11_172_423), ("resnet34", 21_280_583)]
)
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
    recipe = MODELS[name]
    with torch.device("meta"):
        network = build_model(name, 7).eval()
    assert sum(p.numel() for p in network.parameters()) == recipe.parameters
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == recipe.batch_norm
    assert (closed_form_of(network.head) is not None) == (recipe.gradcam == "closed_form")
    assert computed_receptive_field_px(network) == recipe.receptive_field_px
    assert network.get_submodule(recipe.target_layer) is last_module(network.features)
    assert [m.p for m in network.modules() if type(m) is nn.Dropout] == [0.2] * ("head_dropout" in recipe.options)


@pytest.mark.parametrize("name", ["custom_cnn", "squeezenet"])
def test_the_computed_receptive_field_is_what_gradients_reach(name: str) -> None:
    expected = MODELS[name].receptive_field_px
    assert receptive_field_px(build_model(name, 7).eval(), expected + 64) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_works_at_its_smallest_side(name: str) -> None:
    """One build, all of it: shapes, folding, Grad-CAM in closed form against captum, and a step."""
    torch.manual_seed(0)
    recipe = MODELS[name]
    network = build_model(name, 3).eval()
    inputs = torch.randn(2, 3, recipe.minimum_side_px, recipe.minimum_side_px)
    with torch.inference_mode():
        features = network.features(inputs)
        logits = network(inputs)
        folded = fold_batch_norm(network.features)(inputs)
    assert logits.shape == (2, 3)
    assert torch.allclose(folded, features, rtol=1e-4, atol=1e-5 * float(features.abs().max().clamp(min=1e-3)))
    maps = head_maps(network, features)
    # A gradient through a layer norm is orthogonal to its input: at one position only rounding is left of it in fp32.
    differentiated, images = (
        (copy.deepcopy(network).double(), inputs.double()) if name == "convnext_tiny" else (network, inputs)
    )
    layer = differentiated.get_submodule(recipe.target_layer)
    expected = (
        torch.cat(
            [LayerGradCam(differentiated, layer).attribute(images, c, relu_attributions=True) for c in range(3)], 1
        )
        .detach()
        .float()
    )
    assert torch.allclose(maps, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max().clamp(min=1e-9)))
    before = [p.detach().clone() for p in network.parameters()]
    loss = nn.functional.cross_entropy(network.train()(inputs), torch.tensor([0, 2]))
    torch.optim.SGD(network.parameters(), lr=0.1).zero_grad()
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert all(p.grad is not None for p in network.parameters())
    assert sum(not torch.equal(o, n) for o, n in zip(before, network.parameters(), strict=True)) > len(before) // 2
    with pytest.raises(ConfigError, match=f"at least {recipe.minimum_side_px}"):
        check_side(name, recipe.minimum_side_px - 1)


def head_maps(network: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Grad-CAM of every class as inference computes it: in closed form, or by differentiating the head."""
    closed = closed_form_of(network.head)
    if closed is not None:
        return closed.maps(features)
    classes = [torch.full((len(features),), c) for c in range(3)]
    return torch.stack([head_gradcam(network.head, features, target) for target in classes], dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_options_are_settings_and_unknown_ones_are_refused(name: str) -> None:
    settings = TrainersSettings(model=ModelSettings(name=name, side_px=96))
    options = settings.model.options
    assert set(options) == set(MODELS[name].options)
    with pytest.raises(ConfigError, match=r"takes no option 'width'; it takes "):
        build_model(name, 7, width=2)


def test_head_dropout_reaches_the_head() -> None:
    head = build_model("resnet18", 7, head_dropout=0.4).head
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.4]


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'resnet'; there are custom_cnn, custom_cnn_base, resnet18, "):
        build_model("resnet", 7)


def test_looking_up_needs_no_torch() -> None:
    code = "import sys, trainers.settings, trainers.cli.catalog as c; c.catalogue(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SqueezeExcitation) or super().is_leaf_module(module, name)


def computed_receptive_field_px(network: nn.Module) -> int:
    """Compute it from kernels and strides along the widest path: r += (k - 1) * jump, jump *= stride."""
    modules = dict(network.features.named_modules())
    reach: dict[fx.Node, tuple[int, int]] = {}
    for node in _Tracer().trace(network.features).nodes:
        before = [reach[source] for source in node.all_input_nodes if source in reach]
        size, jump = max((s for s, _ in before), default=1), max((j for _, j in before), default=1)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        kernel_px, stride = 1, 1
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            kernel_px, stride = (v if isinstance(v, int) else max(v) for v in (module.kernel_size, module.stride))
        elif node.op == "call_function" and "pool2d" in str(node.target):
            kernel_px, stride = node.kwargs["kernel_size"], node.kwargs["stride"]
        reach[node] = (size + (kernel_px - 1) * jump, jump * stride)
    return reach[node][0]


def last_module(features: nn.Module) -> nn.Module:
    """Return the direct child that a sequence ends with."""
    return list(features.children())[-1]


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
