"""Verbs about Label Studio projects that people made: `data import --label-studio`, `label link`, `label unlink`."""

from typing import TYPE_CHECKING, Annotated

import typer

from images.pairs import parse_labels
from labeling.cli import label_app
from records.command import Call, verb
from records.progress import progress, say
from trainers.cli.data import ChoicesOption, import_table, print_refusals

if TYPE_CHECKING:
    from trainers.cli.data import ProjectOptions

_SHOWN = 10


def import_from_project(call: Call, url: str, project_id: int, about: "ProjectOptions") -> None:
    """Do what `relook data import --label-studio URL --project N` asks for."""
    from labeling.connection import connect_to
    from labeling.existing.project_import import import_project

    with (
        call.store() as store,
        connect_to(store.home, call.settings.labeling, url, about.token_file) as client,
        progress() as bar,
    ):
        found = import_project(
            store,
            client,
            project_id,
            choices=about.choices,
            labels=about.labels,
            columns=about.columns,
            allowed_hosts=about.allowed_hosts,
            correct=about.correct,
            method=call.settings.labeling.consensus,
            frames=(call.settings.trainers.model.frame,),
            progress=bar,
        )
    print_refusals(found.report)
    kept = [f"kept, not trained on: {sentence}" for sentence in found.not_understood]
    hidden = [f"... and {len(kept) - _SHOWN} more; --json lists them all"] if len(kept) > _SHOWN else []
    for sentence in [*kept[:_SHOWN], *hidden, *(f"note: {note}" for note in found.notes)]:
        say(sentence)
    table = import_table(found.report)
    table.add_row("annotations", f"{found.annotations} new, {found.withdrawn} withdrawn")
    table.add_row("annotators", ", ".join(found.annotators))
    rest = {name: getattr(found, name) for name in ("annotations", "withdrawn", "annotators", "not_understood")}
    both = {**found.report.as_dict(), **rest}
    call.emit({**both, "notes": [*both["notes"], *found.notes]}, table)


@verb(label_app, "link")
def link_command(
    call: Call,
    project: Annotated[int, typer.Option("--project", min=1, help="Number of a project that people made themselves.")],
    choices: ChoicesOption = None,
    labels: Annotated[
        str | None, typer.Option(help="Choices of its page and the classes that they mean: Naevus=nv.")
    ] = None,
) -> None:
    """Send new review items to an existing Label Studio project instead of one of Relook's own."""
    from labeling.connection import require
    from labeling.existing.link import link

    said = parse_labels(labels, "choice=class, for example Naevus=nv")
    with call.store() as store, require(store.home, call.settings.labeling) as client:
        found = link(store, client, call.settings.labeling, project, choices=choices, labels=said)
    for choice in found.no_class:
        say(f"note: {choice!r} is no class; annotations with it are kept and not trained on")
    if not found.shows_model:
        say("note: its page does not show the model's prediction, so that all its annotations are blind reads")
    if found.unlinked is not None:
        say(f"note: project {found.unlinked} is no longer linked")
    for number, count in found.open_elsewhere.items():
        say(f"note: {count} review items are open in project {number}; they stay there and are read there")
    call.emit(found.__dict__, f"new review items go to project {project}; `relook label unlink` ends that")


@verb(label_app, "unlink")
def unlink_command(call: Call) -> None:
    """Send new review items to a project of Relook's own again; the linked one is still read."""
    from labeling.connection import require
    from labeling.existing.link import unlink

    with call.store() as store, require(store.home, call.settings.labeling) as client:
        found = unlink(store, client)
    said = f"project {found.project_id} is no longer linked"
    if found.still_open:
        said += f"; {found.still_open} review items are open there and are still read"
    if found.requeued:
        said += f"; it is gone, and {found.requeued} of its review items wait again"
    call.emit(found.__dict__, "no project is linked" if found.project_id is None else said)
