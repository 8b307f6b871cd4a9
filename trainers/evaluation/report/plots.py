"""The plots of the report, each as a data URI of a self-contained SVG."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from records.arrays import BoolArray, FloatArray, IntArray
from trainers.evaluation.figures import (
    MAX_CLASSES,
    ClassReport,
    Evaluation,
    ExplanationQuality,
    Interval,
    ReferralCurve,
    RobustnessReport,
    SliceReport,
    drawn_classes,
)
from vision.metrics.svg import ACCENT, INK, PALE, SECOND, STYLE, figure_uri, new_figure

MAX_CURVES = 10
NARROW = 9
"""A matrix of more classes takes the whole width of the report."""
OTHERS = "others"
_MAX_NAME = 18


def confusion_plot(evaluation: Evaluation) -> str:
    """Draw the confusion matrix: colour and first line are the share of the true class, then the count."""
    counts = np.array(evaluation.confusion_matrix, dtype=np.float64)
    codes = [_short(code) for code in evaluation.per_class]
    if len(codes) > MAX_CLASSES:
        drawn = drawn_classes(evaluation, MAX_CLASSES)
        counts, codes = _summed(counts, drawn), [*(codes[at] for at in drawn), OTHERS]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    is_wide = len(codes) > NARROW
    figure, axes = new_figure(10.4, 1.6 + 0.36 * len(codes)) if is_wide else new_figure(5.2, 4.6)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto" if is_wide else "equal")
    for row, column in np.ndindex(*counts.shape):
        # Empty cells stay blank, so that the confusions stand out.
        if counts[row, column] > 0:
            colour = "white" if shares[row, column] > 0.55 else INK
            text = f"{100 * shares[row, column]:.0f} %\n{counts[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(codes)), codes, rotation=90 if is_wide or max(map(len, codes)) > 7 else 0)
    axes.set_yticks(range(len(codes)), codes)
    axes.set(xlabel="the model's label", ylabel="true class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure_uri(figure)


def roc_plot(labels: IntArray, probabilities: FloatArray, evaluation: Evaluation) -> str:
    """Draw one ROC curve per class, one against the rest."""
    figure, axes = new_figure(4.8, 4.2)
    for place, (index, code, report) in enumerate(_curves(evaluation)):
        if report.auc is not None:
            _, hits, false_alarms, _ = _swept(labels == index, probabilities[:, index])
            axes.plot(false_alarms, hits, label=f"{_short(code)} {report.auc:.2f}", **_line(place, code, evaluation))
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=1, zorder=0)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(title="area under the curve", loc="lower right", fontsize=7, title_fontsize=7, frameon=False)
    return figure_uri(figure)


def precision_recall_plot(labels: IntArray, probabilities: FloatArray, evaluation: Evaluation) -> str:
    """Draw precision over sensitivity per class; the number is the average precision."""
    figure, axes = new_figure(4.8, 4.2)
    for place, (index, code, report) in enumerate(_curves(evaluation)):
        if report.support > 0:
            is_case = labels == index
            counts, hits, _, precision = _swept(is_case, probabilities[:, index])
            average = float((np.diff(hits) * precision[1:]).sum()) if len(counts) else 0.0
            label = f"{_short(code)} {average:.2f}"
            axes.plot(hits[1:], precision[1:], label=label, **_line(place, code, evaluation))
    axes.set(xlabel="sensitivity (recall)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(title="average precision", loc="lower left", fontsize=7, title_fontsize=7, frameon=False)
    return figure_uri(figure)


def reliability_plot(evaluation: Evaluation) -> str:
    """Draw accuracy over confidence."""
    figure, axes = new_figure(4.8, 4.2)
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=1, zorder=0)
    points = evaluation.reliability
    size = 12 + 280 * np.array([point.images for point in points]) / evaluation.images
    confidence, accuracy = [p.confidence for p in points], [p.accuracy for p in points]
    axes.plot(confidence, accuracy, color=ACCENT, linewidth=1.2)
    axes.scatter(confidence, accuracy, s=size, color=ACCENT, alpha=0.6)
    axes.set(xlabel="how sure the model was", ylabel="how often it was right", xlim=(0, 1), ylim=(0, 1.02))
    axes.text(0.04, 0.94, "dot size: share of images\ngrey line: exactly as sure as right", fontsize=7, va="top")
    return figure_uri(figure)


def referral_plot(evaluation: Evaluation, curve: ReferralCurve) -> str:
    """Draw specificity, and the share of images that go to an annotator, over sensitivity; dots: operating points."""
    figure, axes = new_figure(5.2, 3.6)
    axes.plot(curve.sensitivity, curve.specificity, color=ACCENT, label="specificity, per lesion")
    axes.plot(curve.sensitivity, curve.abstained, color=SECOND, linestyle="--", label="sent to an annotator, of images")
    for name, point in evaluation.points.items():
        if point.sensitivity is not None and point.specificity is not None:
            edge = INK if point.in_force else "white"
            axes.plot([point.sensitivity], [point.specificity], "o", color=ACCENT, markeredgecolor=edge)
            axes.plot([point.sensitivity], [1.0 - point.answered_share], "o", color=SECOND, markeredgecolor=edge)
            axes.annotate(name, (point.sensitivity, point.specificity), xytext=(-4, 6), textcoords="offset points",
                          ha="right", fontsize=7)  # fmt: skip
    axes.set(xlabel="sensitivity, per lesion", ylabel="share", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.legend(loc="lower left", fontsize=7, frameon=False)
    return figure_uri(figure)


def training_plot(curves: Sequence[dict[str, float]]) -> str:
    """Draw loss and validation balanced accuracy over the epochs of a training."""
    figure, axes = new_figure(5.2, 3.2)
    epochs = [point["epoch"] for point in curves]
    axes.plot(epochs, [point["train_loss"] for point in curves], color=PALE, label="loss, train")
    axes.plot(epochs, [point["val_loss"] for point in curves], color=SECOND, label="loss, val")
    axes.set(xlabel="epoch", ylabel="loss")
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.plot(epochs, [p["val_balanced_accuracy"] for p in curves], color=ACCENT, label="balanced accuracy, val")
    right.set(ylabel="balanced accuracy", ylim=(0, 1))
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=7, loc="center right", frameon=False)
    return figure_uri(figure)


def slices_plot(reports: dict[str, SliceReport], evaluation: Evaluation) -> str:
    """Draw balanced accuracy, and the key class's sensitivity, of the values of one slice, with intervals."""
    names = list(reports)
    figure, axes = new_figure(5.2, 0.62 * len(names) + 0.9)
    for row, name in enumerate(names):
        report = reports[name]
        _interval(axes, row - 0.13, report.balanced_accuracy, report.balanced_accuracy_ci, ACCENT)
        if report.key_class_sensitivity is not None and report.key_class_sensitivity_ci is not None:
            _interval(axes, row + 0.13, report.key_class_sensitivity, report.key_class_sensitivity_ci, SECOND)
    axes.axvline(evaluation.balanced_accuracy, color=PALE, zorder=0)
    axes.set_yticks(range(len(names)), [f"{name} ({reports[name].images})" for name in names])
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", color="#eef2f4", zorder=-1)
    return figure_uri(figure)


def robustness_plot(report: RobustnessReport) -> str:
    """Draw balanced accuracy under attack."""
    figure, axes = new_figure(4.8, 3.4)
    for (name, points), colour in zip(report.attacks.items(), (ACCENT, SECOND), strict=False):
        epsilons = [point.epsilon for point in points]
        axes.plot(epsilons, [point.balanced_accuracy for point in points], "o-", color=colour, label=name, markersize=3)
        low, high = (np.array([point.balanced_accuracy_ci[end] for point in points]) for end in (0, 1))
        axes.fill_between(epsilons, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="largest change of a colour value, in 1/255", ylabel="balanced accuracy", ylim=(0, 1))
    axes.legend(fontsize=8, frameon=False)
    return figure_uri(figure)


def replacement_plot(quality: ExplanationQuality) -> str:
    """Draw the class's probability while pixels are removed or restored in the order of the map."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, curve in ((left, "deletion", quality.deletion), (right, "insertion", quality.insertion)):
        share = np.linspace(0, 1, len(curve.curve))
        axes.plot(share, curve.curve, color=ACCENT, label="by the map")
        axes.plot(share, curve.random_curve, color=PALE, label="by a shuffled map")
        axes.set(title=title, xlabel="share of pixels", ylim=(0, 1))
    left.set(ylabel="probability of the class")
    left.legend(fontsize=7, frameon=False)
    return figure_uri(figure)


def _curves(evaluation: Evaluation) -> Iterator[tuple[int, str, ClassReport]]:
    reports = list(evaluation.per_class.items())
    # No curve is left out that has a colour of its own.
    count = len(reports) if len(reports) <= MAX_CLASSES else MAX_CURVES
    yield from ((at, *reports[at]) for at in drawn_classes(evaluation, count))


def _summed(counts: FloatArray, drawn: Sequence[int]) -> FloatArray:
    """Return the rows and columns of some classes, and last the sums of all others."""
    place = np.full(len(counts), len(drawn))
    place[list(drawn)] = np.arange(len(drawn))
    summed = np.zeros((len(drawn) + 1, len(drawn) + 1))
    np.add.at(summed, (place[:, None], place[None, :]), counts)
    return summed


def _short(code: str) -> str:
    # The end stays: long codes often differ there only.
    return code if len(code) <= _MAX_NAME else f"{code[: _MAX_NAME // 2]}…{code[1 - _MAX_NAME // 2 :]}"


def _swept(is_case: BoolArray, scores: FloatArray) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
    """Sweep a threshold down: counts at or above it, sensitivity, 1 - specificity, precision; equal scores together."""
    order = np.argsort(-scores, kind="stable")
    # Equal scores share one threshold, so only the last of a run is a point of the curve.
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits = np.append(0, np.cumsum(is_case[order])[last])
    counts = np.append(0, last + 1)
    cases, others = max(1, int(is_case.sum())), max(1, int((~is_case).sum()))
    return counts, hits / cases, (counts - hits) / others, hits / np.maximum(counts, 1)


def _interval(axes: Axes, row: float, value: float, interval: Interval, colour: str) -> None:
    axes.plot(interval, (row, row), color=colour, linewidth=2, alpha=0.5, solid_capstyle="round")
    axes.plot([value], [row], "o", color=colour, markersize=4)


def _line(index: int, code: str, evaluation: Evaluation) -> dict[str, Any]:
    """The key class stands out; the others have a colour of their own."""
    is_key = evaluation.key_class is not None and evaluation.key_class.name == code
    # tab20 alternates dark and light shades: the ten dark ones first, then the light ones.
    colour = SECOND if is_key else colormaps["tab20"]((2 * index + index // 10) % 20)
    return {"color": colour, "linewidth": 2.2 if is_key else 1.0, "zorder": 3 if is_key else 2}
