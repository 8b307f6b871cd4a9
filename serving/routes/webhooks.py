"""The webhook that Label Studio calls when an annotation was made."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Header, Response

from records.errors import AccessError
from records.keys import key_of
from records.notifications import SECRET_FILE, SECRET_HEADER, WEBHOOK_PATH, notify
from serving.service import Service


def webhooks_router(service: Service) -> APIRouter:
    """Return the router of webhooks."""
    router = APIRouter(tags=["labeling"])
    store = service.store
    expected = key_of(store.home, SECRET_FILE).encode()

    @router.post(WEBHOOK_PATH, status_code=204, response_class=Response)
    def label_studio_changed(secret: Annotated[str, Header(alias=SECRET_HEADER, max_length=128)]) -> None:
        """Notify `relook label sync --watch` to pull now; the body is not read, the pull asks Label Studio itself."""
        # As bytes: compare_digest refuses strings that are not ASCII.
        if not hmac.compare_digest(expected, secret.encode()):
            raise AccessError("the webhook's secret is wrong; `relook label push` sets it again", "forbidden")
        notify(store.ledger)

    return router
