"""Networks of timm, named `timm/NAME`, split into `features` and `head` as every network here is.

timm's networks give a feature map by `forward_features` and logits by `forward_head`. What the head does is found out
by probing it with random maps in float64, not by a list of names:

- pooling by the mean and a chain of layers whose derivatives are known: the chain becomes the head, and Grad-CAM has a
  closed form;
- anything else that does not depend on where in the map a value is: timm's own head, and Grad-CAM differentiates it;
- a class token: where timm lets the head take the mean of the patches' tokens in its place, it does, which is the
  first case; a map of patches would not explain the class token;
- the rest: refused.

Nothing is downloaded before `hub_file` is called, and timm's own loading of weights is not used.
"""

import copy
import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from records.errors import ConfigError, ContractError, UnavailableError
from vision.networks.registry import HEAD_DROPOUT, TIMM, ModelRecipe
from vision.networks.torchvision_nets import SplitNetwork, _without_inplace

SMALLEST_SIDE_PX = 32
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_PROBES = ((3, 2), (2, 4))
"""Heights and widths of the maps that a head is probed with; not square, so that rows and columns differ."""
_POSITIONS = "features.body.pos_embed"
_EXACT = 1e-9
"""Largest relative difference in float64 of two heads that compute the same."""


@lru_cache(maxsize=64)
def recipe_of(name: str) -> ModelRecipe:
    """Return the record of one network of timm.

    Args:
        name: `timm/NAME` or `timm/NAME.TAG`; the tag chooses among published weights.
    Returns:
        The record; whether the network can be used is known when it is built.
    Raises:
        ConfigError: timm is not installed, or has no network of that name.
    """
    published = _published(name)
    side_px = int(published.input_size[-1])
    smallest = published.min_input_size or (3, SMALLEST_SIDE_PX, SMALLEST_SIDE_PX)
    return ModelRecipe(
        name=name,
        description=f"{name.removeprefix(TIMM)} of timm",
        factory=_Factory(name),
        options=("head_dropout", "side_px"),
        parameters=None,
        receptive_field_px=None,
        input_side_px=side_px,
        minimum_side_px=min(side_px, int(smallest[-1])),
        gradcam="probed",
        target_layer="features.maps",
        batch_norm=None,
        own_pixels=(_rgb(published.mean), _rgb(published.std)),
        tunable={"head_dropout": HEAD_DROPOUT},
    )


def build(name: str, num_classes: int, *, head_dropout: float = 0.2, side_px: int | None = None) -> SplitNetwork:
    """Build a network of timm with fresh weights.

    Args:
        name: `timm/NAME`.
        num_classes: C.
        head_dropout: rate before the last layer.
        side_px: S; default: the side that the network was published for.
    Returns:
        The network, with `features` that end in a map [N, K, h, w].
    Raises:
        ConfigError: it cannot be built for this side, or its head does not pool a map.
    """
    import timm

    published = _published(name)
    side_px = side_px or int(published.input_size[-1])
    # Networks with embedded positions or windows have to know the side; the others do not take it.
    sized: dict[str, Any] = {"img_size": side_px} if published.fixed_input_size else {}
    try:
        model: Any = timm.create_model(
            name.removeprefix(TIMM), pretrained=False, num_classes=num_classes, **sized
        ).eval()
        _require_whole_patches(name, model, side_px)
        if getattr(model, "global_pool", None) == "token":
            # Some refuse, each in its own way; what their head reads is found out below.
            with suppress(Exception):
                model.reset_classifier(num_classes, "avg")
        return _split(name, _without_inplace(model), head_dropout, side_px)
    except ConfigError:
        raise
    except Exception as error:  # each of the thousand networks has its own ways to refuse a side
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{name} cannot be used at {side_px} px ({reason}); it was published for {published.input_size[-1]} px: "
            f"set trainers.model.side_px={published.input_size[-1]}, or choose another network"
        ) from error


def hub_file(name: str) -> Path:
    """Return where the published weights of a network of timm lie on this machine; they are fetched if they do not.

    Args:
        name: `timm/NAME` or `timm/NAME.TAG`.
    Returns:
        The file, in the cache of the hub's client.
    Raises:
        ConfigError: there are none on the hub.
        UnavailableError: they are not in the cache, and the hub does not respond.
    """
    published = _published(name)
    if not published.hf_hub_id:
        raise ConfigError(
            f"trainers.model.weights is 'hub', and timm's hub has no weights of {name}; set it to none or to a file"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repository = published.hf_hub_id
    for file in (published.hf_hub_filename,) if published.hf_hub_filename else WEIGHT_FILES:
        try:
            return Path(hf_hub_download(repository, file))
        # A subclass of the next one, which means that nobody was asked.
        except LocalEntryNotFoundError as error:
            raise _unreachable(name, repository, error) from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise _unreachable(name, repository, error) from error
    raise ConfigError(f"trainers.model.weights is 'hub', and {repository} holds none of {', '.join(WEIGHT_FILES)}")


def _unreachable(name: str, repository: str, error: Exception) -> UnavailableError:
    reason = " ".join(str(error).split())[:160]
    return UnavailableError(
        f"the weights of {name} are not on this machine, and {repository} cannot be fetched from the hub ({reason}); "
        "give a file by trainers.model.weights=FILE, or set it to none"
    )


class _Factory:
    """Builds one network by name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, num_classes: int, **options: Any) -> nn.Module:
        return build(self._name, num_classes, **options)


class TimmNetwork(SplitNetwork):
    """The network: [N, 3, S, S] -> logits [N, C].

    Args:
        features: [N, 3, S, S] -> feature map [N, K, h, w].
        head: feature map -> logits.
        renamed: timm's name of a part of the head, to its name here.
    """

    def __init__(self, features: nn.Module, head: nn.Module, renamed: Mapping[str, str]) -> None:
        super().__init__(features, head)
        self._renamed = dict(renamed)

    def published_name(self, name: str) -> str:
        """Return the name here of a tensor that timm calls `name`."""
        for theirs, ours in self._renamed.items():
            if name.startswith(f"{theirs}."):
                return ours + name.removeprefix(theirs)
        return f"features.body.{name}"

    def at_own_side(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by their names here, with embedded positions of another side brought to this one's."""
        found, own = dict(tensors), getattr(self.get_submodule("features.body"), "pos_embed", None)
        value = found.get(_POSITIONS)
        if value is None or own is None or value.ndim != 3 or value.shape[2] != own.shape[-1]:
            return found
        from timm.layers.pos_embed import resample_abs_pos_embed

        body: Any = self.get_submodule("features.body")
        prefix = 0 if getattr(body, "no_embed_class", False) else int(getattr(body, "num_prefix_tokens", 0))
        if math.isqrt(max(0, value.shape[1] - prefix)) ** 2 == value.shape[1] - prefix:
            size = list(body.patch_embed.grid_size)
            found[_POSITIONS] = resample_abs_pos_embed(value, size, num_prefix_tokens=prefix)
        return found


class _Features(nn.Module):
    """What timm computes before the head, and its output as a map."""

    def __init__(self, body: nn.Module, maps: "_Maps") -> None:
        super().__init__()
        self.body: Any = body
        self.maps = maps

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [N, K, h, w] for [N, 3, S, S]."""
        maps: Tensor = self.maps(self.body.forward_features(inputs))
        return maps


class _Maps(nn.Module):
    """Brings what `forward_features` returns into [N, K, h, w], and back.

    Args:
        order: of its axes: channels first, channels last, or tokens [N, L, K].
        prefix: tokens before those of positions.
        rows: h of the map of tokens.
    """

    def __init__(self, order: Literal["NCHW", "NHWC", "NLC"], prefix: int = 0, rows: int = 0) -> None:
        super().__init__()
        self.order, self.prefix, self.rows = order, prefix, rows

    def forward(self, values: Tensor) -> Tensor:
        """Return [N, K, h, w]."""
        if self.order == "NLC":
            return values[:, self.prefix :].transpose(1, 2).reshape(values.shape[0], values.shape[2], self.rows, -1)
        return values.permute(0, 3, 1, 2) if self.order == "NHWC" else values

    def back(self, maps: Tensor) -> Tensor:
        """Return what `forward` made a map of; tokens before those of positions are random."""
        if self.order == "NLC":
            tokens = maps.flatten(2).transpose(1, 2)
            if self.prefix == 0:
                return tokens
            size = (len(maps), self.prefix, maps.shape[1])
            before = torch.randn(size, generator=_generator(), dtype=torch.float64)
            return torch.cat([before.to(maps), tokens], dim=1)
        return maps.permute(0, 2, 3, 1) if self.order == "NHWC" else maps


class _OwnHead(nn.Module):
    """timm's own head, behind a map."""

    def __init__(self, body: nn.Module, maps: _Maps) -> None:
        super().__init__()
        self.body: Any = body
        # In a tuple, so that it is no part of the head: it belongs to the features.
        self._maps = (maps,)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [N, C] for [N, K, h, w]."""
        logits: Tensor = self.body.forward_head(self._maps[0].back(features))
        return logits


def _split(name: str, model: Any, head_dropout: float, side_px: int) -> SplitNetwork:
    inputs = torch.randn(1, 3, side_px, side_px, generator=_generator())
    # Not inference mode: a network may keep what it computes here and use it in training.
    with torch.no_grad():
        with _calls(model) as in_features:
            found = model.forward_features(inputs)
        with _calls(model) as in_head:
            expected = model.forward_head(found)
    maps = _maps_of(found, model)
    if maps is None:
        raise _refused(name, "its last features are no map of positions")
    own = _OwnHead(_with_children(model, in_head, keep_values=False), maps)
    chain = _chain_of(model, in_head, head_dropout)
    width = int(maps(found).shape[1])
    with torch.no_grad():
        if chain is not None and _agree(own, chain[0], width):
            head: nn.Module = chain[0]
            renamed = chain[1]
        elif maps.prefix == 0 and _pools(own, width):
            head, renamed = _with_dropout(own, head_dropout), _own_names(own)
        else:
            raise _refused(name, "its head does not pool the last feature map")
        body = _with_children(model, in_features, keep_values=True)
        network = TimmNetwork(_Features(body, maps), head, renamed).eval()
        if {id(one) for one in body.parameters()} & {id(one) for one in head.parameters()}:
            raise _refused(name, "its head shares layers with its features")
        if not any(isinstance(one, nn.Conv2d) and one.in_channels == 3 for one in body.modules()):
            raise _refused(name, "it has no convolution over the image")
        if not torch.allclose(network(inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            raise _refused(name, "it does not compute the same when it is split into features and head")
    return network.train()


def _require_whole_patches(name: str, model: Any, side_px: int) -> None:
    """Refuse a side of which patches would leave a rim that the network does not see."""
    filters = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(filters, nn.Conv2d) or isinstance(filters.padding, str):
        return
    patch_px, step_px, rim_px = filters.kernel_size[0], filters.stride[0], int(filters.padding[0])
    # Patches that overlap, or reach over the rim, see pixels beyond the last whole step.
    if (side_px + 2 * rim_px - patch_px) % step_px > rim_px:
        below = side_px // step_px * step_px
        raise ConfigError(
            f"{name} reads patches of {patch_px} px, and trainers.model.side_px is {side_px}; take a multiple of "
            f"{step_px}, such as {max(below, patch_px)} or {max(below, patch_px) + step_px}"
        )


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name} cannot be used: {why}, and its predictions could not be explained by heat maps; choose a network of "
        "timm that pools its last feature map, such as timm/resnet50 or timm/convnext_nano"
    )


def _maps_of(found: Any, model: Any) -> _Maps | None:
    """Return how the output of `forward_features` becomes a map, or None if it does not."""
    if not isinstance(found, Tensor):
        return None
    if found.ndim == 4:
        widths = {int(getattr(model, "num_features", 0)), int(getattr(model, "head_hidden_size", 0) or 0)}
        # Convolutional networks put channels first; where both axes fit, so does this.
        return _Maps("NHWC" if found.shape[1] not in widths and found.shape[3] in widths else "NCHW")
    if found.ndim != 3:
        return None
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    positions = found.shape[1] - prefix
    rows = math.isqrt(max(0, positions))
    return _Maps("NLC", prefix, rows) if rows > 0 and rows * rows == positions else None


def _chain_of(model: nn.Module, called: list[str], head_dropout: float) -> tuple[nn.Sequential, dict[str, str]] | None:
    """Return the layers with weights, and hard swishes, that a head applies after pooling, as a sequence of its own.

    Whether the sequence computes the same as the head is for the caller to find out.
    """
    leaves = [name for name in called if not list(model.get_submodule(name).children())]
    layers = [(name, model.get_submodule(name)) for name in leaves]
    kept = [(name, layer) for name, layer in layers if isinstance(layer, nn.Hardswish) or list(layer.parameters())]
    known = (nn.Linear, nn.LayerNorm, nn.Hardswish, nn.Conv2d)
    if not kept or not all(isinstance(layer, known) for _, layer in kept):
        return None
    parts: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.AdaptiveAvgPool2d(1))
    renamed: dict[str, str] = {}
    for number, (name, layer) in enumerate(kept):
        is_image = isinstance(layer, nn.Conv2d) or type(layer).__name__.endswith("2d")
        if "flatten" not in parts and not (is_image or isinstance(layer, nn.Hardswish)):
            parts["flatten"] = nn.Flatten()
        is_last = number == len(kept) - 1
        if is_last:
            parts["dropout"] = nn.Dropout(head_dropout)
        ours = "linear" if is_last else name.replace(".", "_")
        parts[ours] = layer
        renamed[name] = f"head.{ours}"
    if "flatten" not in parts:
        parts["flatten"] = nn.Flatten()
    return nn.Sequential(parts), renamed


def _agree(own: nn.Module, other: nn.Module, width: int) -> bool:
    """Tell whether two heads compute the same from every kind of map."""
    # Copied at once: both keep sharing their layers.
    exact, candidate = (_with_random_weights(head) for head in copy.deepcopy((own, other)))
    try:
        return all(_close(exact(values), candidate(values)) for values in _random_maps(width))
    except (RuntimeError, ValueError, TypeError):
        # A head that takes no map of another size is none that pools.
        return False


def _pools(own: nn.Module, width: int) -> bool:
    """Tell whether a head gives the same logits when the positions of a map are permuted."""
    exact = _with_random_weights(copy.deepcopy(own))
    try:
        for values in _random_maps(width):
            order = torch.randperm(values[0, 0].numel(), generator=_generator())
            moved = values.flatten(2)[:, :, order].reshape(values.shape)
            if not _close(exact(values), exact(moved)):
                return False
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def _with_random_weights(head: nn.Module) -> nn.Module:
    """Give a copy of a head weights in float64 that show what it computes; fresh ones may be zero."""
    generator = _generator()
    for parameter in head.double().parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head.eval()


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.ndim != 2:
        return False
    scale = float(one.abs().max())
    # Logits that do not depend on the map agree with everything.
    return scale > 0 and float((one - other).abs().max()) <= _EXACT * scale


def _random_maps(width: int) -> Iterator[Tensor]:
    """Give maps of other sizes, and of other scales and means, on which layers that bend show that they do."""
    generator = _generator()
    for scale, (height, columns) in zip((3.0, 0.3), _PROBES, strict=True):
        values = torch.randn(4, width, height, columns, generator=generator, dtype=torch.float64)
        yield scale * (values + torch.randn(4, width, 1, 1, generator=generator, dtype=torch.float64))


def _with_children(model: nn.Module, called: list[str], *, keep_values: bool) -> nn.Module:
    """Return a copy of a network that shares its layers, without the children that were not called.

    Args:
        model: the network.
        called: names of the modules that were.
        keep_values: whether it keeps the parameters and buffers that belong to no child.
    """
    used = {name.partition(".")[0] for name in called}
    part = copy.copy(model)
    # Children without weights stay: a network may ask for them without calling them.
    children = {
        name: child
        for name, child in model._modules.items()
        if name in used or (child is not None and not list(child.parameters()))
    }
    part._modules = dict(children)
    if not keep_values:
        part._parameters, part._buffers = {}, {}
    return part


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[str]]:
    """List the names of the modules that are called in a block, in order; the network itself is none of them."""
    called: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name) if name not in called else None

    handles = [module.register_forward_pre_hook(noting(name)) for name, module in model.named_modules() if name]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _with_dropout(own: _OwnHead, rate: float) -> _OwnHead:
    """Set the rate that timm's head drops with, which some keep as a number and others as a layer."""
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        if isinstance(getattr(module, "drop_rate", None), float | int):
            module.drop_rate = rate  # type: ignore[assignment]
    return own


def _own_names(own: _OwnHead) -> dict[str, str]:
    return {name: f"head.body.{name}" for name, child in own.body.named_children() if list(child.parameters())}


def _generator() -> torch.Generator:
    # Its own: building a network draws its weights from the global one, and nothing else.
    return torch.Generator().manual_seed(0)


def _published(name: str) -> Any:
    """Return what timm knows of a network: sides, mean and deviation, where its weights are."""
    if find_spec("timm") is None:
        raise ConfigError(f"{name} is a network of timm, which is not installed; pip install 'relook[timm]' brings it")
    import timm
    from timm.models import get_deprecated_models, get_pretrained_cfg, is_model

    bare = name.removeprefix(TIMM)
    if not _NAME.fullmatch(bare) or not is_model(bare):
        close = difflib.get_close_matches(bare.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
        near = f"; close to it are {', '.join(TIMM + one for one in close)}" if close else ""
        raise ConfigError(f"timm {version('timm')} has no network {bare!r}{near}")
    renamed = get_deprecated_models()
    if bare in renamed:
        now = f"calls it {TIMM}{renamed[bare]} now" if renamed[bare] else "does not have it any more"
        raise ConfigError(f"{name} is an old name: timm {now}")
    try:
        found = get_pretrained_cfg(bare)
    except RuntimeError:
        architecture = bare.partition(".")[0]
        tags = timm.list_models(f"{architecture}.*", include_tags=True)
        raise ConfigError(
            f"timm has no weights {bare.partition('.')[2]!r} for {architecture}; it has {', '.join(tags) or 'none'}"
        ) from None
    if found is None:
        raise ContractError(f"timm has no sides for {name}")
    return found


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
