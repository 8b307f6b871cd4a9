"""Routes of health and metrics, for supervisors, load balancers and Prometheus.

`/healthz` looks at this process alone: a restart does not bring a database back. `/readyz` also looks at what a
prediction needs. Anybody may read both, so they name the part that is missing and nothing about it; an admin's key
gets the errors, too.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse

from records.types import Scope
from serving.access.keys import Caller
from serving.health import HealthProbe
from serving.metrics import Metrics
from serving.routes.authenticator import Authenticator
from serving.schemas import Health, ModelRef, Readiness


def health_router(authenticator: Authenticator, metrics: Metrics, probe: HealthProbe) -> APIRouter:
    """Return the router of health and metrics."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Return 200 while this process responds."""
        return Health()

    @router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz(request: Request, response: Response) -> Readiness:
        """Return whether predictions can be made: a verified model, ledger and image store respond, disk is left."""
        found = await probe.check()
        if await authenticator.is_admin(request.scope):
            told = [*found.details, *found.troubles, *found.hooks]
        else:
            told = found.missing + ["some predictors do not serve"] * bool(found.troubles)
            told += ["a hook is not delivered"] * bool(found.hooks)
        if found.missing:
            # A load balancer reads the status only, a person the detail.
            response.status_code = 503
        model = None if found.model is None else ModelRef(id=found.model.id, status=found.model.status)
        return Readiness(ready=not found.missing, model=model, detail="; ".join(told) or "ready")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics(
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.METRICS, Scope.AUDIT))],
    ) -> Response:
        """Return metrics in Prometheus' text format."""
        text = await run_in_threadpool(metrics.text, await metrics.parts())
        return Response(text, media_type="text/plain; version=0.0.4")

    return router
