"""What the labels bought, on the Rounds tab: learning curve, classes, and what the last annotations changed.

In: a body of the API. Out: HTML with an inline SVG.
"""

from collections.abc import Mapping

from matplotlib.ticker import MaxNLocator

from serving.label_value import LabelValueInfo, MeasuredFigure
from serving.page.render import render
from vision.metrics.svg import ACCENT, PALE, figure_uri, new_figure

NEXT = 100


def value_html(value: LabelValueInfo | None, names: Mapping[str, str]) -> str:
    """Show what the labels bought.

    Args:
        value: as the API returned it; None if it was not measured yet.
        names: of the classes, by their codes.
    Returns:
        A card, or one that says how to measure it.
    """
    if value is None:
        return render("label_value", value=None)
    known = [(labels, figure) for labels, figure in value.curve if figure.value is not None]
    # The points as text, for screen readers.
    points = "; ".join(f"{labels} labels: {text(figure)}" for labels, figure in known)
    plot = curve_plot(value) if known else None
    return render("label_value", value=value, names=names, text=text, plot=plot, points=points, next=NEXT)


def curve_plot(value: LabelValueInfo) -> str:
    """Plot balanced accuracy on val over the number of labels, with the next labels as a dashed line, as a data URI."""
    points = [
        (labels, figure.value, figure.low, figure.high)
        for labels, figure in value.curve
        if figure.value is not None and figure.low is not None and figure.high is not None
    ]
    labels, accuracy, low, high = (list(column) for column in zip(*points, strict=True))
    figure, axes = new_figure(6.4, 3.4)
    axes.fill_between(labels, low, high, color=PALE, alpha=0.5, linewidth=0)
    axes.plot(labels, accuracy, color=ACCENT, marker="o", linewidth=1.2)
    gain = value.gain_of_next
    if gain.value is not None and gain.low is not None and gain.high is not None:
        ends = [labels[-1], labels[-1] + NEXT]
        below, above = ([accuracy[-1], accuracy[-1] + end] for end in (gain.low, gain.high))
        axes.fill_between(ends, below, above, color=PALE, alpha=0.5, linewidth=0)
        axes.plot(ends, [accuracy[-1], accuracy[-1] + gain.value], color=ACCENT, linestyle="--", linewidth=1.2)
    axes.set(xlabel="training labels", ylabel="balanced accuracy, val", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_uri(figure)


def text(figure: MeasuredFigure | None, *, signed: bool = False) -> str:
    """Return a figure in percent, or in points where it is a difference, with its interval."""
    if figure is None or figure.value is None or figure.low is None or figure.high is None:
        return "not measurable"
    form, unit = ("+.1f", "points") if signed else (".1f", "%")
    value, low, high = (100 * end for end in (figure.value, figure.low, figure.high))
    return f"{value:{form}} {unit} ({low:{form}} to {high:{form}})"
