"""The image and its map as two layers, so that whoever looks can fade the map in and out.

In: the bytes that were asked about, and an explanation of the API. Out: data URIs.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image

from images.decode import decode_square
from serving.schemas import Explanation
from vision.explanations.overlay import COLOUR_MAP, resized_strength


@dataclass(frozen=True)
class Layers:
    """Two drawings of one size.

    Args:
        image: data URI of the centre square that the model sees.
        heat: data URI of the map, see-through where nothing counted.
    """

    image: str
    heat: str


def draw_layers(image: bytes, explanation: Explanation, side_px: int) -> Layers:
    """Draw image and map apart.

    Args:
        image: as it was sent.
        explanation: with raw values; what speaks against the class is not drawn.
        side_px: of both.
    Returns:
        The layers.
    Raises:
        ImageError: the image cannot be read.
    """
    square = Image.fromarray(decode_square(image, side_px))
    strength = resized_strength(np.array(explanation.values, dtype=np.float32), side_px, side_px)
    levels = np.rint(strength * 255).astype(np.uint8)
    # Strength is shown twice, by colour and by opacity, as in the API's own drawing.
    heat = colormaps[COLOUR_MAP](levels, bytes=True)
    heat[..., 3] = levels
    return Layers(_uri(square, "JPEG", quality=90), _uri(Image.fromarray(heat), "PNG", compress_level=1))


def _uri(drawn: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    drawn.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
