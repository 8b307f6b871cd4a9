"""The route that erases a stored image."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from images.cache import blank_pixels
from records.erasure import erase_image
from records.types import Scope
from serving.access.keys import Caller
from serving.routes.authenticator import Authenticator
from serving.schemas import ErasureResponse
from serving.service import Service

ImageId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the stored bytes")]


def images_router(service: Service, authenticator: Authenticator) -> APIRouter:
    """Return the router of /v1/images."""
    router = APIRouter(prefix="/v1/images", tags=["images"])
    store = service.store

    @router.delete("/{image_id}", response_model=ErasureResponse)
    def erase(
        image_id: ImageId, caller: Annotated[Caller, Depends(authenticator.requires(Scope.ADMIN))]
    ) -> ErasureResponse:
        """Erase an image, its heat maps and all personal data of it; Label Studio follows at its next sync."""
        erased = erase_image(store, image_id, actor=caller.id)
        blank_pixels(store.home.cache, [image_id])
        return ErasureResponse(
            image_id=image_id,
            blobs=erased.blobs,
            withdrawn=erased.withdrawn,
            left_in_place=erased.left_in_place is not None,
        )

    return router
