"""Routes of the interactive documentation; see `serving.docs_page`."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

from records.errors import UnknownIdError
from serving.docs_page import VERSION, assets, policy_of

_PARAMETERS: dict[str, Any] = {
    "tryItOutEnabled": True,
    # By default a badge of a foreign host would check the document.
    "validatorUrl": None,
    "persistAuthorization": False,
    "displayRequestDuration": True,
    "docExpansion": "list",
    "defaultModelsExpandDepth": 0,
}


def docs_router() -> APIRouter:
    """Return the router of /docs and its files, which are for everybody and not part of the OpenAPI document."""
    router = APIRouter(include_in_schema=False)
    # Relative addresses, so that the page works below the path of a reverse proxy.
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Relook API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters=_PARAMETERS,
    )
    page.headers["Content-Security-Policy"] = policy_of(bytes(page.body).decode())

    @router.get("/docs")
    async def docs() -> Response:
        return page

    @router.get("/docs/{name}")
    async def docs_file(name: str, request: Request) -> Response:
        asset = assets().get(name)
        if asset is None:
            raise UnknownIdError(f"no file of the documentation is called {name[:40]!r}")
        headers = {"Cache-Control": "max-age=86400", "ETag": f'"{VERSION}"', "Vary": "Accept-Encoding"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(asset.content, media_type=asset.media_type, headers=headers)
        headers["Content-Encoding"] = "gzip"
        return Response(asset.packed, media_type=asset.media_type, headers=headers)

    return router
