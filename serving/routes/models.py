"""Routes of models and of health: what answers, what is registered, and whether predictions can be made."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse

from records.errors import UnavailableError
from records.types import ModelRecord, Scope
from serving.access.keys import Caller
from serving.answers import model_body
from serving.metrics import Metrics
from serving.routes.door import Door
from serving.schemas import Health, ModelList, ModelRef, Readiness, ServedModelInfo
from serving.service import Service


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

    @router.get("/healthz", response_model=Health, tags=["health"])
    async def healthz() -> Health:
        """Say that this process answers."""
        return Health()

    @router.get("/readyz", response_model=Readiness, tags=["health"], responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """Say whether predictions can be made: a model is loaded and answered its golden pictures."""
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

    return router
