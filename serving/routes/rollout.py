"""Routes of the rollout: read it, begin or widen it, take it back."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from records.errors import UnknownIdError
from records.models import find_bundle
from records.types import Scope
from serving.access.keys import Caller
from serving.responses import rollout_body
from serving.rollout.control import begin, current_rollout, promote, roll_back
from serving.routes.door import Door
from serving.schemas import RolloutInfo, RolloutRequest
from serving.service import Service


def rollout_router(service: Service, door: Door) -> APIRouter:
    """Make the routes under /v1/rollout.

    Args:
        service: with the ledger.
        door: that knows callers.
    Returns:
        The router.
    """
    router = APIRouter(prefix="/v1/rollout", tags=["models"])
    store = service.store

    @router.get("", response_model=RolloutInfo)
    def read_rollout(caller: Annotated[Caller, Depends(door.requires(None))]) -> RolloutInfo:
        """Read how far the candidate under way has come, and what was seen of it."""
        with store.ledger.read() as tx:
            running = current_rollout(tx)
        if running is None:
            raise UnknownIdError("no rollout is under way")
        return rollout_body(running)

    @router.post("", response_model=RolloutInfo)
    def move_rollout(
        body: RolloutRequest, caller: Annotated[Caller, Depends(door.requires(Scope.ADMIN))]
    ) -> RolloutInfo:
        """Begin a rollout in shadow or with a share, change its share, or with 100 promote the candidate."""
        bundle = find_bundle(store, body.model)
        running = begin(store, bundle.id, min(body.percent, 99), actor=caller.id, reason=body.reason)
        return rollout_body(promote(store, actor=caller.id) if body.percent == 100 else running)

    @router.delete("", response_model=RolloutInfo)
    def take_back(
        caller: Annotated[Caller, Depends(door.requires(Scope.ADMIN))],
        reason: Annotated[str, Query(min_length=1, max_length=500)] = "taken back by hand",
    ) -> RolloutInfo:
        """Take the candidate under way back, or undo the last promotion."""
        return rollout_body(roll_back(store, actor=caller.id, why=reason))

    return router
