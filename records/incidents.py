"""Incidents as rows: look-up, the regression set that every gate reads, and the models that may not serve.

How an incident is opened and closed is in `cluster.incidents`.
"""

from records.errors import RefusedError, UnknownIdError
from records.ledger import Transaction
from records.types import Incident, IncidentPrediction, IncidentState, ModelAction


def find_incident(tx: Transaction, name: str) -> Incident:
    """Return the incident that a user named by its id or a prefix of 8 or more characters; else UnknownIdError."""
    found = [one for one in tx.find(Incident) if len(name) >= 8 and one.id.startswith(name)]
    if len(found) != 1:
        problem = "no incident has" if not found else f"{len(found)} incidents share"
        raise UnknownIdError(
            f"{problem} the id {name!r}; `relook incident list` lists them (8 characters are enough if they are unique)"
        )
    return found[0]


def predictions_of(tx: Transaction, incident_id: str) -> list[IncidentPrediction]:
    """Return the predictions that an incident concerns, its own first."""
    return tx.find(IncidentPrediction, where={"incident_id": incident_id}, order_by=("id",))


def regression_cases(tx: Transaction) -> list[IncidentPrediction]:
    """Return the cases that every later champion has to classify or refer, oldest first, one per image and class."""
    withdrawn = {one.id for one in tx.find(Incident, where={"state": IncidentState.WITHDRAWN})}
    cases: dict[tuple[str, str | None], IncidentPrediction] = {}
    for row in tx.find(IncidentPrediction, order_by=("id",)):
        if row.truth and row.incident_id not in withdrawn:
            cases.setdefault((row.image_id, row.truth), row)
    return list(cases.values())


def require_not_blocked(tx: Transaction, model_id: str) -> None:
    """Raise RefusedError if an open incident keeps a model from serving."""
    where = {"model_id": model_id, "state": IncidentState.OPEN}
    blocking = [one for one in tx.find(Incident, where=where, order_by=("id",)) if one.action is not ModelAction.NONE]
    if blocking:
        raise RefusedError(
            f"model {model_id[:12]} is kept from serving by incident {blocking[0].id} until that is closed "
            f"(`relook incident show {blocking[0].id}`)"
        )
