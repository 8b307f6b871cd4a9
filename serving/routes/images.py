"""The routes that erase a stored image and take consent back."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from records.erasure import erase_images
from records.types import Scope
from serving.access.keys import Caller
from serving.erasure import serving_places, take_back_consent
from serving.routes.authenticator import Authenticator
from serving.schemas import ConsentRequest, ErasureResponse, ImageConsent
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
        erased = erase_images(store, [image_id], actor=caller.id, places=serving_places(service.settings))
        return ErasureResponse(
            image_id=image_id,
            blobs=erased.blobs,
            withdrawn=erased.withdrawn,
            left_in_place=bool(erased.left_in_place),
        )

    @router.patch("/{image_id}", response_model=ImageConsent)
    def take_back(
        image_id: ImageId,
        body: ConsentRequest,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
    ) -> ImageConsent:
        """Lower the consent of an image that the caller's organisation sent; `none` erases it."""
        take_back_consent(store, service.settings, image_id, body.consent, caller)
        return ImageConsent(image_id=image_id, consent=body.consent)

    return router
