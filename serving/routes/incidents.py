"""Routes of incidents: the list, one of them, and the pages for those who are responsible for a model in use."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response
from fastapi.responses import HTMLResponse

from records.types import Scope
from serving.access.keys import Caller
from serving.incidents.bodies import IncidentDetails, IncidentList, incident_details, list_incidents
from serving.incidents.page import incident_html, incident_report_html
from serving.routes.authenticator import Authenticator
from serving.routes.models import HTML_PAGE, SANDBOX
from serving.service import Service

WHO = (Scope.REVIEW, Scope.AUDIT)
"""Scopes that see every organisation, whose images incidents show; one of them is enough."""
IncidentId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="id of an incident, 32 hex characters")]


def incidents_router(service: Service, authenticator: Authenticator) -> APIRouter:
    """Return the router of /v1/incidents."""
    router = APIRouter(prefix="/v1/incidents", tags=["incidents"])

    @router.get("", response_model=IncidentList)
    def list_all(caller: Annotated[Caller, Depends(authenticator.requires(*WHO))]) -> IncidentList:
        """List all incidents, newest first."""
        return list_incidents(service.store)

    @router.get("/report", response_class=Response, responses=HTML_PAGE)
    def read_incident_report(caller: Annotated[Caller, Depends(authenticator.requires(*WHO))]) -> Response:
        """Return the newest report of live figures and incidents, a page; `relook incident report` makes it."""
        return _page(incident_report_html(service.store))

    @router.get("/{incident_id}", response_model=IncidentDetails)
    def read_incident(
        incident_id: IncidentId, caller: Annotated[Caller, Depends(authenticator.requires(*WHO))]
    ) -> IncidentDetails:
        """Return an incident with the predictions that it concerns."""
        return incident_details(service.store, incident_id)

    @router.get("/{incident_id}/page", response_class=Response, responses=HTML_PAGE)
    def read_incident_page(
        incident_id: IncidentId, caller: Annotated[Caller, Depends(authenticator.requires(*WHO))]
    ) -> Response:
        """Return the page of an incident: what the model saw, what else is affected, and the proof."""
        return _page(incident_html(service.store, incident_id))

    return router


def _page(html: str) -> Response:
    return HTMLResponse(html, headers={"Content-Security-Policy": SANDBOX})
