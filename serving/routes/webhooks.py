"""The bell that Label Studio rings when an answer came in."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Header, Response

from records.errors import AccessError
from records.keys import key_of
from records.notifications import SECRET_FILE, SECRET_HEADER, WEBHOOK_PATH, notify
from serving.service import Service


def webhooks_router(service: Service) -> APIRouter:
    """Make the route of webhooks.

    Args:
        service: with ledger and home.
    Returns:
        The router.
    """
    router = APIRouter(tags=["labeling"])
    store = service.store
    expected = key_of(store.home, SECRET_FILE).encode()

    @router.post(WEBHOOK_PATH, status_code=204, response_class=Response)
    def label_studio_rang(secret: Annotated[str, Header(alias=SECRET_HEADER, max_length=128)]) -> None:
        """Tell whoever runs `relook label sync --watch` to look now; the body is not read, a poll finds the truth."""
        # As bytes: of strings it compares only those that are ASCII.
        if not hmac.compare_digest(expected, secret.encode()):
            raise AccessError("the webhook's secret does not fit; `relook label push` sets it anew", "forbidden")
        notify(store.ledger)

    return router
