"""Figures as data URIs of a self-contained SVG, in one style for reports and page.

Figures are made without pyplot, so that no display is needed and no figure stays in memory.
"""

import base64
import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, ACCENT, SECOND, PALE = "#24303a", "#0b6e8a", "#c25a1b", "#c9d3da"
STYLE: Any = {
    "font.size": 9.0,
    "axes.edgecolor": "#8a98a3",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    # Ids in the SVG are random without a salt, and equal figures must give equal bytes.
    "svg.hashsalt": "relook",
}


def new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """Return an empty figure of so many inches, and its axes."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        return figure, figure.subplots()


def figure_uri(figure: Figure) -> str:
    """Return a figure as a `data:image/svg+xml` URI; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
