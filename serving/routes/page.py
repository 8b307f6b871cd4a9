"""The Gradio page as an ASGI app, for every path that is not the API's."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI
from starlette.types import ASGIApp

from records.store import Store
from serving.access.keys import KeyRing
from serving.page.access import PageAccess
from serving.page.layout import build_page, page_theme
from serving.page.toolkit import gr
from serving.page.uploads import PageFiles
from serving.settings import ServingSettings


def page_app(settings: ServingSettings, store: Store) -> ASGIApp:
    """Return the page as an ASGI app that needs lifespan events."""
    files = PageFiles(settings, store.home.root)

    @contextlib.asynccontextmanager
    async def sweeping(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(files.sweep_forever())
        yield
        task.cancel()

    page = build_page(settings, store, files)
    mounted: FastAPI = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=sweeping),
        page,
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        root_path=settings.root_path or None,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        theme=page_theme(),
        css_paths=Path(__file__).parent.parent / "page" / "page.css",
    )
    return PageAccess(
        mounted,
        {index: len(event.inputs) for index, event in page.fns.items()},
        files,
        KeyRing(store),
        max_upload_bytes=settings.max_upload_bytes,
        max_json_bytes=settings.max_json_bytes,
    )
