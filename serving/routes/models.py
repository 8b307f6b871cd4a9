"""Routes of models, rounds, the value of labels, the rollout and the caller."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import HTMLResponse

from records.erasure import without_images
from records.errors import UnavailableError, UnknownIdError
from records.models import current_rollout, find_model
from records.types import ModelRecord, Scope
from serving.access.keys import Caller
from serving.label_value import LabelValueInfo, label_value
from serving.registry import model_details, report_html, rounds_body
from serving.responses import EVERY_ORGANISATION, model_body, rollout_body
from serving.rollout.control import roll_back, roll_out, undo_promotion
from serving.routes.authenticator import Authenticator
from serving.schemas import (
    CallerInfo,
    ModelDetails,
    ModelInfo,
    ModelList,
    RolloutId,
    RolloutInfo,
    RolloutRequest,
    RoundList,
    ServedModelInfo,
    UndoRequest,
    Why,
)
from serving.service import Service

ModelId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="id of a model, 64 hex characters")]
HTML_PAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""A report runs no script and sends no request."""


def models_router(service: Service, authenticator: Authenticator) -> APIRouter:
    """Return the router of models, rounds, the rollout and the caller."""
    router = APIRouter(tags=["models"])
    _add_models(router, service, authenticator)
    _add_rollout(router, service, authenticator)
    return router


def _add_models(router: APIRouter, service: Service, authenticator: Authenticator) -> None:
    @router.get("/v1/model", response_model=ServedModelInfo)
    async def read_model(caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> ServedModelInfo:
        """Return the model that serves now, and what its status means."""
        state = await service.state()
        if state.model is None:
            raise UnavailableError(state.detail)
        return state.model

    @router.get("/v1/models", response_model=ModelList)
    def list_models(caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> ModelList:
        """List all registered models, newest first."""
        with service.store.ledger.read() as tx:
            return ModelList(items=[model_body(record) for record in tx.find(ModelRecord, order_by=("-created_at",))])

    @router.get("/v1/models/{model_id}", response_model=ModelDetails)
    def read_model_details(
        model_id: ModelId, caller: Annotated[Caller, Depends(authenticator.requires(None))]
    ) -> ModelDetails:
        """Return the measured figures of a model: metrics, reliability of scores, coverage of prediction sets."""
        return model_details(service.store, model_id)

    @router.get("/v1/models/{model_id}/report", response_class=Response, responses=HTML_PAGE)
    def read_report(model_id: ModelId, caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> Response:
        """Return the evaluation report of a model, a self-contained HTML page."""
        html = report_html(service.store, model_id)
        # Whose images an operator has put into it cannot be told, so only who may see all of them gets any.
        shown = html if caller.may_see(EVERY_ORGANISATION) else without_images(html)
        return HTMLResponse(shown, headers={"Content-Security-Policy": SANDBOX})

    @router.get("/v1/rounds", response_model=RoundList)
    def list_rounds(caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> RoundList:
        """List the rounds: labels, verdict, and test figures of each model, which no decision uses."""
        return rounds_body(service.store)

    @router.get("/v1/labels/value", response_model=LabelValueInfo)
    def read_label_value(caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> LabelValueInfo:
        """Return the newest learning curve, what 100 more labels would add, and what the last round changed.

        404 until `relook labels value` has measured it.
        """
        return label_value(service.store)

    @router.get("/v1/caller", response_model=CallerInfo)
    async def read_caller(caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> CallerInfo:
        """Return the caller and their scopes."""
        return CallerInfo(
            id=caller.id, organisation=caller.organisation, scopes=sorted(caller.scopes), sandbox=caller.sandbox
        )


def _add_rollout(router: APIRouter, service: Service, authenticator: Authenticator) -> None:
    store = service.store

    @router.get("/v1/rollout", response_model=RolloutInfo)
    def read_rollout(caller: Annotated[Caller, Depends(authenticator.requires(None))]) -> RolloutInfo:
        """Return the current rollout: stage, traffic share and guardrails."""
        with store.ledger.read() as tx:
            running = current_rollout(tx)
        if running is None:
            raise UnknownIdError("no rollout is in progress")
        return rollout_body(running)

    @router.post("/v1/rollout", response_model=RolloutInfo)
    def move_rollout(
        body: RolloutRequest, caller: Annotated[Caller, Depends(authenticator.requires(Scope.ADMIN))]
    ) -> RolloutInfo:
        """Start a rollout, in shadow or as a canary; or change the one that is named, and with 100 promote its model.

        409 if that rollout has ended or is of another model, or if one is in progress and none is named.
        """
        moved = roll_out(
            store,
            find_model(store, body.model).id,
            body.percent,
            actor=caller.id,
            rollout_id=body.rollout,
            champion_id=body.champion,
            reason=body.reason,
        )
        return rollout_body(moved)

    @router.delete("/v1/rollout", response_model=RolloutInfo)
    def end_rollout(
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.ADMIN))],
        rollout: Annotated[RolloutId, Query(description="id of the rollout")],
        reason: Annotated[Why, Query()] = "rolled back by hand",
    ) -> RolloutInfo:
        """Roll a rollout back; one that was rolled back before stays as it is, and 409 if it was promoted."""
        return rollout_body(roll_back(store, rollout, actor=caller.id, why=reason))

    @router.post("/v1/models/{model_id}/undo-promotion", response_model=ModelInfo)
    def undo(
        model_id: ModelId, body: UndoRequest, caller: Annotated[Caller, Depends(authenticator.requires(Scope.ADMIN))]
    ) -> ModelInfo:
        """Take the serving model away and let the model that it replaced serve again; 409 unless it serves now."""
        back_to = find_model(store, body.back_to).id
        return model_body(undo_promotion(store, model_id, back_to, actor=caller.id, why=body.reason))
