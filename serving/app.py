"""The HTTP app: the API with its documentation and the page, behind one ASGI middleware.

In: a `Service`. Out: an ASGI app. It does not use Ray and starts nothing: the caller starts the service first.
"""

import logging
from http import HTTPStatus
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from records.errors import RelookError
from serving.access.limits import Limits
from serving.health import HealthProbe
from serving.metrics import Metrics
from serving.middleware import RequestMiddleware
from serving.openapi import allowed_verbs, completed
from serving.problems import problem, problem_of, problem_response
from serving.routes.admission import Admission
from serving.routes.authenticator import Authenticator
from serving.routes.docs_page import docs_router
from serving.routes.explanations import explanations_router
from serving.routes.feedback import feedback_router
from serving.routes.health import health_router
from serving.routes.images import images_router
from serving.routes.incidents import incidents_router
from serving.routes.models import models_router
from serving.routes.open_inference import open_inference_router
from serving.routes.predictions import predictions_router
from serving.routes.session import session_router
from serving.routes.webhooks import webhooks_router
from serving.schemas import Problem
from serving.service import Service

logger = logging.getLogger(__name__)


def create_app(
    service: Service, page: ASGIApp | None = None, limits: Limits | None = None, metrics: Metrics | None = None
) -> RequestMiddleware:
    """Return the whole app.

    Args:
        service: that predicts and explains.
        page: serves every path that is not the API's, and gets the lifespan events.
        limits: what callers may use; by default of this app alone.
        metrics: by default those of this app alone.
    Returns:
        An ASGI app.
    """
    metrics = metrics or Metrics(service.store)
    authenticator = Authenticator(service.store, service.settings, limits)
    api = create_api(service, metrics, authenticator)
    return RequestMiddleware(api, service.settings, metrics.responded, authenticator=authenticator, page=page)


def create_api(service: Service, metrics: Metrics, authenticator: Authenticator) -> FastAPI:
    """Return the API alone, without the middleware, which finds the caller of each request."""
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": HTTPStatus(status).phrase}
        for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 503)
    }
    api = FastAPI(
        title="Relook",
        version=metadata.version("relook"),
        summary="Predictions about images, with reasons. Decision support, not a diagnosis.",
        docs_url=None,
        redoc_url=None,
        responses=errors,
    )
    api.state.max_body_bytes = service.settings.max_body_bytes
    admission = Admission(service, authenticator, metrics)
    probe = HealthProbe(service)
    metrics.hooks = service.settings.hooks
    routers = [
        predictions_router(service, authenticator, admission),
        explanations_router(service, authenticator, admission),
        feedback_router(service, authenticator, admission),
        images_router(service, authenticator),
        models_router(service, authenticator),
        incidents_router(service, authenticator),
        health_router(authenticator, metrics, probe),
        open_inference_router(authenticator, admission, probe),
        webhooks_router(service),
        session_router(service, authenticator),
    ]
    authenticator.cover(routers)
    for router in routers:
        api.include_router(router)
    _add_problem_handlers(api, service.settings.retry_after_s)

    api.include_router(docs_router())
    keyed = authenticator.keyed_operations()
    document = completed(api.openapi(), service.store.taxonomy.codes, keyed, service.settings.root_path)
    api.openapi = lambda: document  # type: ignore[method-assign]
    return api


def _add_problem_handlers(api: FastAPI, retry_after_s: int) -> None:
    def respond(request: Request, found: Problem) -> Response:
        wait_s = retry_after_s if found.status in (429, 503) else None
        return problem_response(found, _request_id(request), wait_s, path=request.scope["path"])

    @api.exception_handler(RelookError)
    async def on_relook_error(request: Request, error: RelookError) -> Response:
        found = problem_of(error)
        if found.status >= 500:
            logger.error("request %s failed", _request_id(request), exc_info=error)
        return respond(request, found)

    @api.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this response, and the middleware logs it.
        return respond(request, problem_of(error))

    @api.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        # Without the rejected input, which pydantic reports, too: it may be personal data.
        fields = [{"field": ".".join(str(p) for p in e["loc"]), "message": str(e["msg"])} for e in error.errors()]
        detail = "; ".join(f"{e['field']}: {e['message']}" for e in fields[:3])
        return respond(request, problem(422, "invalid", detail, errors=fields))

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        details = {
            404: f"nothing is at {request.url.path}; /docs lists what there is",
            405: f"{request.method} is not possible at {request.url.path}; /docs lists what is",
        }
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid")
        found = problem(error.status_code, code, details.get(error.status_code, str(error.detail)))
        response = respond(request, found)
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(allowed_verbs(api.openapi(), request.url.path))
        return response


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)
