"""Routes of models and of health: what answers, what is registered, and whether predictions can be made."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from records.errors import UnavailableError
from records.types import ModelRecord, Scope
from serving.access.keys import Caller
from serving.metrics import Metrics
from serving.registry import model_details, report_html, rounds_body
from serving.responses import model_body
from serving.routes.door import Door
from serving.schemas import Health, ModelList, ModelRef, Readiness, ServedModelInfo
from serving.schemas_registry import CallerInfo, ModelDetails, RoundList
from serving.service import Service

ModelId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="id of a model, 64 hex characters")]
_PAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
_SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A report shows and does nothing: no script, no request."""


def models_router(service: Service, door: Door, metrics: Metrics) -> APIRouter:
    """Make the routes of models and health.

    Args:
        service: that answers.
        door: that knows callers.
        metrics: that were counted.
    Returns:
        The router.
    """
    router = APIRouter(tags=["models"])
    _add_models(router, service, door)
    _add_health(router, service, door, metrics)
    return router


def _add_models(router: APIRouter, service: Service, door: Door) -> None:
    @router.get("/v1/model", response_model=ServedModelInfo)
    async def read_model(caller: Annotated[Caller, Depends(door.requires(None))]) -> ServedModelInfo:
        """Say which model answers now, and what its status means."""
        state = await service.state()
        if state.model is None:
            raise UnavailableError(state.detail)
        return state.model

    @router.get("/v1/models", response_model=ModelList)
    def list_models(caller: Annotated[Caller, Depends(door.requires(None))]) -> ModelList:
        """List all registered models, newest first."""
        with service.store.ledger.read() as tx:
            return ModelList(items=[model_body(record) for record in tx.find(ModelRecord, order_by=("-created_at",))])

    @router.get("/v1/models/{model_id}", response_model=ModelDetails)
    def read_model_details(model_id: ModelId, caller: Annotated[Caller, Depends(door.requires(None))]) -> ModelDetails:
        """Say what was measured of a model: figures, how often its scores were right, what its sets promise."""
        return model_details(service.store, model_id)

    @router.get("/v1/models/{model_id}/report", response_class=Response, responses=_PAGE)
    def read_report(model_id: ModelId, caller: Annotated[Caller, Depends(door.requires(None))]) -> Response:
        """Return the report that was written beside a model, as a page that needs nothing else."""
        return HTMLResponse(report_html(service.store, model_id), headers={"Content-Security-Policy": _SANDBOX})

    @router.get("/v1/rounds", response_model=RoundList)
    def list_rounds(caller: Annotated[Caller, Depends(door.requires(None))]) -> RoundList:
        """List the rounds: labels, verdict, and each model's figures on the test split, by which nothing is decided."""
        return rounds_body(service.store)

    @router.get("/v1/caller", response_model=CallerInfo)
    async def read_caller(caller: Annotated[Caller, Depends(door.requires(None))]) -> CallerInfo:
        """Say who asks, and what they may do."""
        return CallerInfo(
            id=caller.id, organisation=caller.organisation, scopes=sorted(caller.scopes), sandbox=caller.sandbox
        )


def _add_health(router: APIRouter, service: Service, door: Door, metrics: Metrics) -> None:
    @router.get("/healthz", response_model=Health, tags=["health"])
    async def healthz() -> Health:
        """Say that this process answers."""
        return Health()

    @router.get("/readyz", response_model=Readiness, tags=["health"], responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """Say whether predictions can be made: a model is loaded and answered its golden images."""
        state = await service.state()
        if state.model is None:
            response.status_code = 503
            return Readiness(ready=False, model=None, detail=state.detail)
        model = ModelRef(id=state.model.id, status=state.model.status)
        return Readiness(ready=True, model=model, detail=state.detail)

    @router.get("/metrics", response_class=PlainTextResponse, tags=["health"])
    def read_metrics(caller: Annotated[Caller, Depends(door.requires(Scope.AUDIT))]) -> Response:
        """Return figures for Prometheus, in its text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")
