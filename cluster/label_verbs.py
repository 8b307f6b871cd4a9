"""The verb `relook labels value`: what the labels bought."""

from typing import TYPE_CHECKING, Annotated

import typer

from records.command import Call, verb
from records.progress import say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cluster.label_value import Figure, LabelValue, RoundValue

labels_app = typer.Typer(help="What the labels bought.", no_args_is_help=True)


@verb(labels_app, "value")
def value_command(
    call: Call,
    model: Annotated[str, typer.Option("--model", help="Id prefix, bundle path, champion or candidate.")] = "champion",
    data: Annotated[str | None, typer.Option("--data", help="Dataset id; default: the newest version.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the parts of the labels that are drawn.")] = 0,
) -> None:
    """Show the learning curve so far, what 100 more labels would add, and what the last round's annotations changed.

    The service shows the newest result on its page, under Rounds.
    """
    from dataclasses import asdict

    from cluster.label_value import keep_value, value_of_labels
    from images.importer import open_dataset
    from records.models import find_bundle

    with call.store() as store:
        found = value_of_labels(store, find_bundle(store, model), open_dataset(store, data), seed=seed, say=say)
        keep_value(store, found)
    call.emit(asdict(found), shown(found))


def shown(found: "LabelValue") -> "RenderableType":
    """Return the figures as sentences and tables."""
    from rich.console import Group
    from rich.table import Table

    curve = Table("labels", "balanced accuracy", title=f"val, dataset {found.dataset_id[:12]}")
    for size, figure in found.curve:
        curve.add_row(str(size), _text(figure))
    classes = Table("class", "labels", "lesions on val", "recall", "by 100 more of the class", "lacks labels")
    for one in found.classes:
        gain = "too few labels to tell" if one.gain_of_next is None else _text(one.gain_of_next, signed=True)
        lacks = "yes" if one.lacks_labels else ""
        classes.add_row(one.code, str(one.labels), str(one.lesions_on_val), _text(one.recall), gain, lacks)
    lines = [f"The next 100 labels: balanced accuracy {_text(found.gain_of_next, signed=True)}."]
    if found.checked is not None:
        predicted, reached = found.checked
        lines.append(f"From half of the labels the curve predicted {_text(predicted)} for all; found: {reached:.3f}.")
    lines.append(
        f"Heads over the features of model {found.model_id[:12]}; a network that is trained again may gain more."
    )
    return Group(curve, *lines, classes, *_of_round(found.last_round))


def _of_round(found: "RoundValue | None") -> "list[RenderableType]":
    from rich.table import Table

    if found is None:
        return ["No label of this version came from a round of annotations."]
    flips = ", ".join(f"{number} x {what}" for what, number in found.changed.items()) or "none"
    table = Table("class", "recall, against without", title=f"annotations of round {found.number}")
    for code, figure in found.recall_gain.items():
        table.add_row(code, _text(figure, signed=True))
    return [
        f"Round {found.number}: {found.new} images got their first label; changed labels: {flips}.",
        f"With them balanced accuracy is {_text(found.gain, signed=True)}; {found.set_right} images of val are decided "
        f"right only with them, {found.set_wrong} only without.",
        table,
    ]


def _text(figure: "Figure", *, signed: bool = False) -> str:
    if figure.value is None:
        return "no image on val"
    form = "+.3f" if signed else ".3f"
    return f"{figure.value:{form}} ({figure.low:{form}} to {figure.high:{form}})"
