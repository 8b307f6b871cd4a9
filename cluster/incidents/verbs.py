"""The verbs of `relook incident`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from records.command import Call, verb

if TYPE_CHECKING:
    from records.store import Store
    from records.types.incidents import Evidence
    from serving.access.keys import Caller

incident_app = typer.Typer(
    help="Predictions that missed the true class: what happened, what else is affected, proof that it is mended.",
    no_args_is_help=True,
)
IncidentArgument = Annotated[str, typer.Argument(metavar="INCIDENT", help="Id of the incident, or a prefix of it.")]


@verb(incident_app, "open")
def open_command(
    call: Call,
    truth: Annotated[str, typer.Option("--truth", help="Class code that was missed.")],
    prediction: Annotated[str | None, typer.Option("--prediction", help="Full id of the prediction.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Full id of an image: its newest prediction.")] = None,
    then: Annotated[
        Literal["keep", "block", "roll-back"],
        typer.Option("--then", help="What happens to its model: nothing, may not serve again, is taken away."),
    ] = "keep",
    note: Annotated[str | None, typer.Option("--note", help="What is known, for those who read it.")] = None,
) -> None:
    """Open an incident: replay the prediction, find others like it, recall them and ask annotators at once."""
    from cluster.incidents.register import open_incident
    from cluster.promotion import name_of, track_aliases
    from records.types import Scope
    from records.types.incidents import Evidence
    from serving.incidents.bodies import incident_details

    with call.store() as store:
        caller = _caller(store)
        if caller is not None and then != "keep":
            caller.require(Scope.ADMIN)
        opened = open_incident(
            store, call.settings, prediction=prediction, image=image, truth=truth, then=then, note=note,
            actor=name_of(caller),
        )  # fmt: skip
        if then == "roll-back":
            track_aliases(store, call.settings, opened.model_id)
        details = incident_details(store, opened.id)
    evidence = Evidence.model_validate(opened.evidence)
    text = (
        f"incident {opened.id} is open: {details.affected} other predictions resemble it and are recalled, "
        f"{details.waiting} images wait for annotators\n{_seen(evidence, truth)}"
    )
    call.emit({**details.model_dump(mode="json"), "evidence": opened.evidence}, text)


@verb(incident_app, "list")
def list_command(call: Call) -> None:
    """List the incidents, newest first."""
    from serving.incidents.bodies import list_incidents

    with call.store() as store:
        found = list_incidents(store)
    table = Table("incident", "state", "opened", "model", "missed", "affected", "cases", "waiting")
    for one in found.items:
        opened, model = f"{one.created_at:%Y-%m-%d %H:%M}", one.model_id[:12]
        counts = (str(number) for number in (one.affected, one.cases, one.waiting))
        table.add_row(one.id, one.state, opened, model, one.truth or "erased", *counts)
    call.emit(found, table if found.items else "there is no incident")


@verb(incident_app, "show")
def show_command(
    call: Call,
    incident: IncidentArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Write the page of the incident to this file.")] = None,
) -> None:
    """Show what the model saw, what else is affected, and the proof; the service shows it as a page."""
    from records.durable import write_file
    from records.incidents import find_incident
    from records.types.incidents import Evidence
    from serving.incidents.bodies import incident_details
    from serving.incidents.page import incident_html

    with call.store() as store:
        details = incident_details(store, incident)
        with store.ledger.read() as tx:
            stored = find_incident(tx, incident)
        if out is not None:
            write_file(out, incident_html(store, incident))
    lines = [
        f"incident {stored.id} is {stored.state}: prediction {stored.prediction_id} of model {stored.model_id[:12]}",
        f"{details.affected} other predictions resemble it; {details.cases} cases in the regression set; "
        f"{details.waiting} images wait for annotators",
    ]
    if stored.evidence:
        lines.append(_seen(Evidence.model_validate(stored.evidence), stored.truth))
    if stored.proof:
        lines.append(f"champion {stored.proof['model_id'][:12]} classifies or refers every case")
    lines += [stored.why] if stored.why else []
    lines += [f"its page is {out}"] if out is not None else []
    body = {**details.model_dump(mode="json"), "evidence": stored.evidence, "proof": stored.proof}
    call.emit(body, "\n".join(lines))


@verb(incident_app, "close")
def close_command(
    call: Call,
    incident: IncidentArgument,
    without_proof: Annotated[
        str | None,
        typer.Option("--without-proof", help="Reason to close it all the same; needs an admin's key in RELOOK_KEY."),
    ] = None,
) -> None:
    """Close an incident, which takes a later champion that classifies or refers every case of it."""
    from cluster.incidents.register import close_incident
    from cluster.promotion import name_of

    with call.store() as store:
        caller = _caller(store)
        closed = close_incident(
            store, call.settings, incident, actor=name_of(caller), caller=caller, because=without_proof
        )
    proof = closed.proof
    text = (
        f"incident {closed.id} is closed: champion {proof['model_id'][:12]} classifies or refers all "
        f"{len(proof['cases'])} cases"
        if proof
        else f"incident {closed.id} is withdrawn; its cases are in no regression set"
    )
    call.emit(closed, text)


@verb(incident_app, "report")
def report_command(call: Call) -> None:
    """Report live sensitivity by model, institution and device with intervals, incidents and time to close."""
    from cluster.incidents.figures import incident_report, table_of

    with call.store() as store:
        report = incident_report(store, call.settings.serving.audit_share)
    call.emit(report, table_of(report))


def _caller(store: "Store") -> "Caller | None":
    from cluster.promotion import KEY_VARIABLE, caller_of

    return caller_of(store, os.environ.get(KEY_VARIABLE))


def _seen(evidence: "Evidence", truth: str) -> str:
    """Say in a few lines what the model saw."""
    replay = evidence.replay
    same = "the same bits" if replay.is_same else f"a difference of {replay.largest_difference}"
    lines = [
        f"replayed with {replay.engine} in {replay.precision} on {replay.num_threads} threads: {same}",
        f"it said {evidence.label} ({evidence.decision}); p({truth}) is {evidence.probabilities.get(truth, 0):.3f}",
    ]
    for limit in evidence.limits:
        short = f"{limit.short_by:.3f} short of a referral" if limit.short_by > 0 else "referred"
        lines.append(f"  {limit.name}: {limit.value:.3f}, limit {limit.limit:.3f}: {short}")
    near = ", ".join(f"{one.label} ({one.distance:.2f})" for one in evidence.neighbours)
    lines.append(f"nearest training images: {near or 'not here'}")
    return "\n".join(lines)
