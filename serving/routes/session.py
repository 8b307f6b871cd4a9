"""Routes that sign a browser in and out; see `serving.session`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from records.errors import AccessError
from serving.access.keys import Caller
from serving.routes.authenticator import Authenticator
from serving.schemas import SessionInfo
from serving.service import Service
from serving.session import COOKIE, SESSION_S, split_key


def session_router(service: Service, authenticator: Authenticator) -> APIRouter:
    """Return the router of the page's session."""
    router = APIRouter(tags=["session"])
    path = service.settings.root_path or "/"

    @router.post("/v1/session", response_model=SessionInfo)
    async def sign_in(
        request: Request, response: Response, caller: Annotated[Caller, Depends(authenticator.requires(None))]
    ) -> SessionInfo:
        """Sign a browser in: set a cookie, and return the proof that the page sends with it."""
        _, _, key = request.headers.get("authorization", "").partition(" ")
        if not key.strip():
            raise AccessError("send the key to sign in with as `Authorization: Bearer rlk_...`", "unauthenticated")
        cookie, proof = split_key(key.strip())
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, cookie, max_age=SESSION_S, path=path, secure=secure, httponly=True, samesite="strict"
        )
        response.headers["Cache-Control"] = "no-store"
        return SessionInfo(proof=proof)

    @router.delete("/v1/session", status_code=204, response_class=Response)
    async def sign_out(response: Response) -> None:
        """Sign a browser out: clear its cookie. It needs no key, and does nothing to the key itself."""
        response.delete_cookie(COOKIE, path=path, httponly=True, samesite="strict")

    return router
