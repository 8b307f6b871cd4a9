"""An incident as the API and the command return it, from rows of the ledger."""

from collections import Counter

from pydantic import AwareDatetime, Field

from records.incidents import find_incident, predictions_of
from records.ledger import Transaction
from records.store import Store
from records.types import Incident, IncidentPrediction, IncidentState, ModelAction, ReviewItem, ReviewState
from records.types.incidents import Criterion
from serving.incidents.report import report_file
from serving.schemas import Body, PredictionId

_OPEN = [ReviewState.NEW, ReviewState.PUSHED]


class IncidentInfo(Body):
    """An incident, and how far it has come."""

    id: str
    created_at: AwareDatetime
    state: IncidentState
    prediction_id: PredictionId
    image_id: str
    model_id: str
    truth: str = Field(description="class code; empty once the image is erased")
    action: ModelAction = Field(description="what was done to the model")
    affected: int = Field(ge=0, description="other predictions that were recalled, since they resemble it")
    cases: int = Field(ge=0, description="images of it in the regression set, its own included")
    waiting: int = Field(ge=0, description="its images that annotators have still to label")
    closed_at: AwareDatetime | None
    closed_by_model: str | None = Field(description="the champion that handles all its cases")


class IncidentList(Body):
    """All incidents, newest first."""

    items: list[IncidentInfo]
    has_report: bool = Field(description="whether `relook incident report` made one")


class AffectedPrediction(Body):
    """A prediction that resembles that of an incident."""

    prediction_id: PredictionId
    image_id: str
    criteria: list[Criterion] = Field(description="what it has in common")
    truth: str | None = Field(description="class that the model missed in it as well, once it is known")


class IncidentDetails(IncidentInfo):
    """An incident with the predictions that it concerns; its page shows what the model saw."""

    note: str | None
    why: str | None = Field(description="why it was closed without proof")
    predictions: list[AffectedPrediction] = Field(description="its own first, without criteria")


def list_incidents(store: Store) -> IncidentList:
    """Return all incidents, newest first."""
    with store.ledger.read() as tx:
        items = [_info(tx, one) for one in tx.find(Incident, order_by=("-created_at",))]
    return IncidentList(items=items, has_report=report_file(store).is_file())


def incident_details(store: Store, name: str) -> IncidentDetails:
    """Return an incident by its id or a prefix; UnknownIdError if there is none."""
    with store.ledger.read() as tx:
        incident = find_incident(tx, name)
        rows = predictions_of(tx, incident.id)
        predictions = [
            AffectedPrediction(**row.model_dump(include={"prediction_id", "image_id", "criteria", "truth"}))
            for row in rows
        ]
        info = _info(tx, incident).model_dump()
    return IncidentDetails(**info, note=incident.note, why=incident.why, predictions=predictions)


def in_common(rows: list[IncidentPrediction]) -> dict[str, int]:
    """Return how many of the affected predictions have each criterion in common with the incident."""
    found = Counter(criterion.value for row in rows for criterion in row.criteria)
    return {criterion.value: found[criterion.value] for criterion in Criterion if found[criterion.value]}


def _info(tx: Transaction, incident: Incident) -> IncidentInfo:
    rows = predictions_of(tx, incident.id)
    images = {row.image_id for row in rows}
    waiting = {item.image_id for item in tx.find(ReviewItem, {"image_id": images, "state": _OPEN})}
    named = {"id", "created_at", "state", "prediction_id", "image_id", "model_id", "truth", "action", "closed_at"}
    return IncidentInfo(
        **incident.model_dump(include=named),
        affected=sum(bool(row.criteria) for row in rows),
        cases=0 if incident.state is IncidentState.WITHDRAWN else sum(row.truth is not None for row in rows),
        waiting=len(waiting),
        closed_by_model=incident.proof.get("model_id"),
    )
