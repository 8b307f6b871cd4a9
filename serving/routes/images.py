"""Routes of stored images: signed links to them, and their erasure."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Response

from images.forget import forget_pixels
from records.erasure import erase_image
from records.errors import UnknownIdError
from records.store import read_image
from records.types import Image, Scope
from serving.access.keys import Caller
from serving.access.links import check_link
from serving.routes.bodies import BINARY
from serving.routes.door import Door
from serving.schemas import ErasureResponse
from serving.service import Service

ImageId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the stored bytes")]
_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": BINARY, "image/png": BINARY, "image/webp": BINARY}}
}


def images_router(service: Service, door: Door) -> APIRouter:
    """Make the routes under /v1/images.

    Args:
        service: with ledger and blobs.
        door: that knows callers.
    Returns:
        The router.
    """
    router = APIRouter(prefix="/v1/images", tags=["images"])
    store = service.store

    @router.get("/{image_id}", response_class=Response, responses=_IMAGE)
    def get_image(
        image_id: ImageId,
        expires: Annotated[int, Query(ge=0, le=2**53, description="seconds since 1970")],
        signature: Annotated[str, Query(max_length=128)],
    ) -> Response:
        """Return a stored image to whoever holds a signed link that has not expired."""
        check_link(store.home, image_id, expires, signature)
        with store.ledger.read() as tx:
            image = tx.get(Image, image_id)
        if image is None or image.erased_at is not None:
            raise UnknownIdError(f"no image has the id {image_id!r}")
        data = store.blobs.get(image.id) if store.blobs.has(image.id) else read_image(store, image)
        return Response(data, media_type=f"image/{image.format}", headers={"Cache-Control": "private, no-store"})

    @router.delete("/{image_id}", response_model=ErasureResponse)
    def erase(image_id: ImageId, caller: Annotated[Caller, Depends(door.requires(Scope.ADMIN))]) -> ErasureResponse:
        """Erase an image, its heat maps and what was said of the person; Label Studio follows at its next sync."""
        erased = erase_image(store, image_id, actor=caller.id)
        forget_pixels(store.home.cache, [image_id])
        return ErasureResponse(
            image_id=image_id,
            blobs=erased.blobs,
            withdrawn=erased.withdrawn,
            left_in_place=erased.left_in_place is not None,
        )

    return router
