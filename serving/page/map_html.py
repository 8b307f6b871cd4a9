"""The heat map as HTML: two layers and what the map means, in words.

In: an explanation of the API. Out: HTML. The strength of the upper layer is the style variable `--rl-opacity`, which
the page's slider sets.
"""

from html import escape

from serving.page.layers import Layers
from serving.schemas import Explanation

METHOD_NAMES = {
    "gradcam": "Grad-CAM",
    "integrated_gradients": "Integrated Gradients",
    "gradient_shap": "Gradient SHAP",
    "occlusion": "Occlusion",
}


def map_html(explanation: Explanation, names: dict[str, str], layers: Layers | None) -> str:
    """Show where the model looked.

    Args:
        explanation: the map.
        names: class code to name.
        layers: image and map apart; None shows the API's own drawing.
    Returns:
        HTML.
    """
    name = escape(names[explanation.target])
    against = f" rather than {escape(names[explanation.versus])}" if explanation.versus else ""
    alt = f"Heat map over the image: where the model found evidence for {name}{against}"
    if layers is None:
        drawn = f"<img alt='{alt}' src='data:image/png;base64,{explanation.png_base64}'>"
    else:
        drawn = (
            f"<div class='rl-layers' style='background-image:url({layers.image})'>"
            f"<img class='heat' alt='{alt}' src='{layers.heat}'></div>"
        )
    return (
        f"<div class='rl-card' id='rl-map'><h3>Where the model looked for {name}{against}</h3><div class='rl-map'>"
        f"{drawn}<div><p>The more yellow, the more that place counted for this class. Where nothing counted, the "
        "image is left as it is.</p><div class='rl-scale'></div><div class='rl-ends rl-small'><span>little</span>"
        "<span>most</span></div><p class='rl-small'>A map shows what counted for the model, not whether it is right. "
        f"{escape(_method_text(explanation))}</p></div></div></div>"
    )


def _method_text(explanation: Explanation) -> str:
    rows, columns = explanation.shape
    parts = [f"Method {METHOD_NAMES[explanation.method]}, {rows} x {columns} positions"]
    parts.append("exact" if explanation.exact else "differentiated" if explanation.method != "occlusion" else "tried")
    if explanation.steps is not None:
        parts.append(f"{explanation.steps} steps")
    if explanation.completeness_error is not None:
        parts.append(f"its sum is {100 * explanation.completeness_error:.1f} % off")
    sentence = ", ".join(parts) + "."
    facts = explanation.faithfulness or {}
    hidden, shuffled = facts.get("deletion_auc"), facts.get("deletion_shuffled_auc")
    if isinstance(hidden, float) and isinstance(shuffled, float):
        more = "more" if hidden < shuffled else "no more"
        sentence += (
            f" On {facts.get('images')} validation images, hiding what its maps mark changed the answer {more} than "
            "hiding other places."
        )
    return sentence
