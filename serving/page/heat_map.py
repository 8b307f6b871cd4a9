"""The heat map of a prediction: image and map as two layers, and a caption that says how the map was computed.

In: the image's bytes and an `Explanation` of the API. Out: HTML with data URIs. The opacity of the upper layer is the
CSS variable `--rl-opacity`, which the slider of the Predict tab sets in the browser.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from images.decode import decode_frame
from images.overlay import COLOUR_MAP, resized_strength
from records.frames import Frame
from serving.page.render import render
from serving.schemas import Explanation
from vision.explanations.methods import METHODS


@dataclass(frozen=True)
class Layers:
    """Image and map as data URIs of equal size.

    Args:
        image: the part of the image that the model sees, in its proportions.
        heat: the map, transparent where nothing counted for the class.
        width_px: of both.
        height_px: of both.
    """

    image: str
    heat: str
    width_px: int
    height_px: int


def draw_layers(image: bytes, explanation: Explanation, side_px: int) -> Layers:
    """Draw image and map separately.

    Args:
        image: a JPEG, PNG or WebP file.
        explanation: its positive values are drawn; negative ones count as zero.
        side_px: longer side of both layers.
    Returns:
        The layers.
    Raises:
        ImageError: the image cannot be decoded.
    """
    from matplotlib import colormaps

    shown = Image.fromarray(decode_frame(image, Frame(side_px, explanation.crop).shown(side_px)))
    strength = resized_strength(np.array(explanation.values, dtype=np.float32), shown.height, shown.width)
    levels = np.rint(strength * 255).astype(np.uint8)
    # Colour and opacity both encode the strength, as in the overlay that the API draws.
    heat = colormaps[COLOUR_MAP](levels, bytes=True)
    heat[..., 3] = levels
    # Compression level 1: the URI is sent once to one browser, and higher levels take longer than they save.
    drawn = _uri(Image.fromarray(heat), "PNG", compress_level=1)
    return Layers(_uri(shown, "JPEG", quality=90), drawn, shown.width, shown.height)


def heat_map_html(explanation: Explanation, names: dict[str, str], layers: Layers | None) -> str:
    """Show a heat map with its caption.

    Args:
        explanation: map, method and how far such maps can be believed.
        names: class code to display name.
        layers: image and map as two layers; None shows the overlay that the API drew.
    Returns:
        HTML.
    """
    title = f"Heat map for {names[explanation.target]}"
    if explanation.versus:
        title += f" compared with {names[explanation.versus]}"
    return render("heat_map", explanation=explanation, title=title, layers=layers, method=method_text(explanation))


def _uri(drawn: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    drawn.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def method_text(explanation: Explanation) -> str:
    """Say how a heat map was computed, and how far such maps of its model can be believed."""
    rows, columns = explanation.shape
    method = METHODS[explanation.method]
    computed = "by differentiation" if method.needs_gradients else "by occlusion"
    parts = [
        f"Method: {method.title}, {rows} x {columns} grid",
        "in closed form" if explanation.exact else computed,
    ]
    if explanation.steps is not None:
        parts.append(f"{explanation.steps} steps")
    if explanation.completeness_error is not None:
        parts.append(f"completeness error {100 * explanation.completeness_error:.1f} %")
    text = ", ".join(parts) + "."
    facts = explanation.faithfulness or {}
    masked, shuffled = facts.get("deletion_auc"), facts.get("deletion_shuffled_auc")
    if isinstance(masked, float) and isinstance(shuffled, float):
        # Lower is better: masking what a faithful map marks lowers the class's probability sooner.
        more = "more" if masked < shuffled else "no more"
        text += (
            f" On {facts.get('images')} validation images, masking the regions that this model's Grad-CAM maps mark "
            f"changed the prediction {more} than masking other regions."
        )
    return text
