"""Output of a layer of a network, and its channels drawn as small images.

In: a network that no other thread uses (a hook is set on it), normalised images, a layer's name. Out: the layer's
output [N, K, h, w], and a PNG of its most varied channels.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from records.arrays import Float32Array, IntArray, UInt8Array
from records.errors import ConfigError

CHANNELS = 24
COLUMNS = 6
TILE_PX = 128
GAP_PX = 4


def layer_names(network: nn.Module) -> list[str]:
    """Return the names of all layers inside `features`, at any depth, in order."""
    return [name for name, _ in network.named_modules() if name.startswith("features.")]


def layer_output(network: nn.Module, inputs: Tensor, layer: str) -> Float32Array:
    """Run images through a network and return the output of one layer.

    Args:
        network: in evaluation mode; no other thread may use it, since a hook is set on it.
        inputs: [N, 3, S, S], normalised.
        layer: a name of `layer_names`, for example `features.layer1`; the leading `features.` may be left out.
    Returns:
        [N, K, h, w].
    Raises:
        ConfigError: there is no such layer, or its output is not [N, K, h, w].
    """
    names = layer_names(network)
    name = layer if layer in names else f"features.{layer}"
    if name not in names:
        shallow = [one.removeprefix("features.") for one in names if one.count(".") == 1]
        raise ConfigError(f"the network has no layer {layer!r}; there are {', '.join(shallow)} and their sublayers")
    kept: list[Tensor] = []
    # Removed even if the forward pass fails: a hook that stays would run in every later pass.
    handle = network.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        with torch.inference_mode():
            network(inputs)
    finally:
        handle.remove()
    if not kept or not isinstance(kept[0], Tensor) or kept[0].ndim != 4:
        raise ConfigError(f"layer {layer!r} gives no maps; choose one of the stages")
    return np.asarray(kept[0].float().numpy(), dtype=np.float32)


def strongest_channels(output: Float32Array, count: int = CHANNELS) -> IntArray:
    """Return the channels of one image [K, h, w] whose maps vary most, at most `count`, the strongest first."""
    return np.argsort(-output.std(axis=(1, 2)), kind="stable")[:count]


def channel_grid_png(image: UInt8Array, output: Float32Array, channels: IntArray) -> bytes:
    """Draw an image and, after it, channels of a layer, each scaled to its own range.

    Args:
        image: [H, H, 3].
        output: [K, h, w] of one image.
        channels: which to draw, in order.
    Returns:
        PNG bytes.
    """
    from matplotlib import colormaps

    tiles = [np.asarray(Image.fromarray(image).resize((TILE_PX, TILE_PX)), dtype=np.uint8)]
    for channel in channels:
        values = output[channel]
        spread = float(np.ptp(values))
        # A constant channel has no range to scale by.
        unit = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
        small = Image.fromarray((colormaps["viridis"](unit)[:, :, :3] * 255).astype(np.uint8))
        tiles.append(np.asarray(small.resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST), dtype=np.uint8))
    rows = -(-len(tiles) // COLUMNS)
    step = TILE_PX + GAP_PX
    grid = np.full((rows * step - GAP_PX, min(COLUMNS, len(tiles)) * step - GAP_PX, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // COLUMNS * step, index % COLUMNS * step
        grid[top : top + TILE_PX, left : left + TILE_PX] = tile
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, format="PNG")
    return buffer.getvalue()
