"""The Rounds tab: each round's data, balanced accuracy and gate verdict, accuracy over labels, what the labels bought.

In: rounds and value of labels, of the API. Out: HTML with an inline SVG.
"""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from records.errors import RelookError, UnknownIdError
from serving.client import Client
from serving.label_value import LabelValueInfo
from serving.page.api import PageApi
from serving.page.label_value import value_html
from serving.page.render import problem_html, render
from serving.page.toolkit import gr
from serving.schemas import RoundInfo
from vision.metrics.svg import ACCENT, PALE, figure_uri, new_figure


class RoundHandlers:
    """Event handlers of the tab. Gradio may call them from several threads.

    Args:
        api: access to the API.
    """

    def __init__(self, api: PageApi) -> None:
        self._api = api

    def load(self, visitor: gr.Request) -> str:
        """Return all rounds, and what the labels bought, as HTML."""
        try:
            with self._api.client(visitor) as client:
                return rounds_html(client.rounds().items) + value_html(_value(client), self._api.names)
        except RelookError as error:
            return problem_html(str(error), "Rounds could not be loaded")


def _value(client: Client) -> LabelValueInfo | None:
    try:
        return client.label_value()
    except UnknownIdError:
        return None


def rounds_tab(handlers: RoundHandlers) -> None:
    """Lay the tab out; selecting it loads the rounds.

    Args:
        handlers: of the events.
    """
    with gr.Tab("Rounds") as tab:
        shown = gr.HTML("", elem_id="rl-rounds", padding=False)
    tab.select(handlers.load, None, shown, api_visibility="private")


def rounds_html(rounds: Sequence[RoundInfo]) -> str:
    """Show rounds, oldest first, as a plot and a table."""
    # A round has no labels, accuracy or interval until its steps have run; only complete points are plotted.
    done = [
        (r.number, r.labels_from_annotators, r.balanced_accuracy, r.balanced_accuracy_ci)
        for r in rounds
        if r.labels_from_annotators is not None
        and r.balanced_accuracy is not None
        and r.balanced_accuracy_ci is not None
    ]
    plot = learning_plot(*(list(column) for column in zip(*done, strict=True))) if done else None
    # The points as text, for screen readers.
    points = "; ".join(f"round {n}: {labels} labels, {100 * accuracy:.0f} %" for n, labels, accuracy, _ in done)
    return render("rounds", rounds=list(rounds), plot=plot, points=points)


def learning_plot(
    rounds: Sequence[int], labels: Sequence[int], accuracy: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> str:
    """Plot balanced accuracy over the number of labels, one point per round, as a data URI."""
    figure, axes = new_figure(6.4, 3.4)
    # Matplotlib expects distances from the point, not the ends of the interval.
    below = [value - ends[0] for value, ends in zip(accuracy, intervals, strict=True)]
    above = [ends[1] - value for value, ends in zip(accuracy, intervals, strict=True)]
    axes.errorbar(
        labels, accuracy, yerr=[below, above], color=ACCENT, ecolor=PALE, marker="o", capsize=3, linewidth=1.2
    )
    for number, x, y in zip(rounds, labels, accuracy, strict=True):
        axes.annotate(f"round {number}", (x, y), xytext=(5, 6), textcoords="offset points", fontsize=7)
    axes.set(xlabel="training labels from annotators", ylabel="balanced accuracy, test split", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_uri(figure)
