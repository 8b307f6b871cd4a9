"""The tab of rounds: what each was made of and what came of it, and labels against quality.

In: rounds as the API tells them. Out: HTML with a drawing that needs nothing else.
"""

from collections.abc import Sequence
from html import escape

import gradio as gr
from matplotlib.ticker import MaxNLocator

from records.errors import RelookError
from serving.page.answer_html import problem_html
from serving.page.models_html import table_html
from serving.page.visitor import Visitors
from serving.schemas_registry import RoundInfo
from vision.metrics.svg import ACCENT, PALE, figure_uri, new_figure


class RoundHandlers:
    """What the tab does. Every method may run in several threads.

    Args:
        visitors: that ask.
    """

    def __init__(self, visitors: Visitors) -> None:
        self._visitors = visitors

    def load(self, key: str | None) -> str:
        """Show all rounds; `key` is the visitor's."""
        try:
            with self._visitors.asking(key) as client:
                return rounds_html(client.rounds().items)
        except RelookError as error:
            return problem_html(str(error), "The rounds cannot be shown")


def rounds_tab(handlers: RoundHandlers, key: gr.Textbox) -> None:
    """Lay the tab out; choosing it loads the rounds.

    Args:
        handlers: what it does.
        key: field of the visitor's key.
    """
    with gr.Tab("Rounds") as tab:
        shown = gr.HTML("", elem_id="rl-rounds", padding=False)
    tab.select(handlers.load, key, shown, api_visibility="private")


def rounds_html(rounds: Sequence[RoundInfo]) -> str:
    """Show rounds as a drawing and a table.

    Args:
        rounds: oldest first.
    Returns:
        HTML.
    """
    if not rounds:
        return "<div class='rl-card'><h2>No rounds yet</h2><p><code>relook round</code> runs the first one.</p></div>"
    heads = (
        "Round",
        "Began, UTC",
        "Images",
        "Labels from annotators",
        "Balanced accuracy, test split",
        "Gate",
        "Because",
    )
    return (
        f"<div class='rl-card'><h3>Labels against quality</h3>{_drawing(rounds)}"
        "<p class='rl-small'>Balanced accuracy on the test split with its 95 % interval; nothing is decided by it. "
        "Rounds of few lesions differ by chance.</p></div>"
        f"<div class='rl-card'><h3>All rounds</h3>{table_html(heads, [_row(r) for r in reversed(rounds)])}</div>"
    )


def _drawing(rounds: Sequence[RoundInfo]) -> str:
    done = [
        (r.number, r.labels_from_annotators, r.balanced_accuracy, r.balanced_accuracy_ci)
        for r in rounds
        if r.labels_from_annotators is not None
        and r.balanced_accuracy is not None
        and r.balanced_accuracy_ci is not None
    ]
    if not done:
        return "<p>No round has come as far as its figures yet.</p>"
    told = "; ".join(f"round {n}: {labels} labels, {100 * quality:.0f} %" for n, labels, quality, _ in done)
    drawn = learning_plot(*(list(column) for column in zip(*done, strict=True)))
    return f"<img class='rl-plot' src='{drawn}' alt='Balanced accuracy over labels from annotators. {escape(told)}'>"


def _row(r: RoundInfo) -> tuple[str, ...]:
    quality = ""
    if r.balanced_accuracy is not None:
        quality = f"{100 * r.balanced_accuracy:.1f} %"
        if r.balanced_accuracy_ci is not None:
            quality += f" ({100 * r.balanced_accuracy_ci[0]:.0f} to {100 * r.balanced_accuracy_ci[1]:.0f} %)"
    return (
        str(r.number),
        f"{r.started_at:%Y-%m-%d %H:%M}",
        "" if r.images is None else str(r.images),
        "" if r.labels_from_annotators is None else str(r.labels_from_annotators),
        quality,
        escape(r.verdict or ("unfinished" if r.finished_at is None else "")),
        f"<span class='rl-long'>{escape(r.why or '')}</span>",
    )


def learning_plot(
    rounds: Sequence[int], labels: Sequence[int], quality: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> str:
    """Draw what rounds of learning were worth over the labels that annotators had given; one number per round."""
    figure, axes = new_figure(6.4, 3.4)
    low = [value - interval[0] for value, interval in zip(quality, intervals, strict=True)]
    high = [interval[1] - value for value, interval in zip(quality, intervals, strict=True)]
    axes.errorbar(labels, quality, yerr=[low, high], color=ACCENT, ecolor=PALE, marker="o", capsize=3, linewidth=1.2)
    for number, x, y in zip(rounds, labels, quality, strict=True):
        axes.annotate(f"round {number}", (x, y), xytext=(5, 6), textcoords="offset points", fontsize=7)
    axes.set(xlabel="training labels from annotators", ylabel="balanced accuracy, test split", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_uri(figure)
