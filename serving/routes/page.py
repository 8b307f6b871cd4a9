"""The Gradio page as an ASGI app, for every path that is not the API's."""

from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from records.store import Store
from serving.page.layout import build_page, page_theme
from serving.settings import ServingSettings


def page_app(settings: ServingSettings, store: Store) -> FastAPI:
    """Return the page as an ASGI app that needs lifespan events."""
    mounted: FastAPI = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build_page(settings, store),
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        max_file_size=settings.max_upload_bytes,
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
    return mounted
