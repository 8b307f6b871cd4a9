"""The places from which the service erases images, and which images a caller may take consent back for.

Tasks in Label Studio are not among them: `relook label sync` deletes those of erased images at its next run, and
`relook erase` at once.
"""

from images.cache import PIXELS
from records.consent import lower_consent, organisations_of
from records.erasure import RECORDS_PLACES, Place, erase_images
from records.errors import UnknownIdError
from records.store import Store
from records.types import Consent, Scope
from serving.access.keys import Caller
from serving.incidents.report import REPORT
from serving.page.uploads import erase_uploads
from serving.settings import ServingSettings


def serving_places(settings: ServingSettings) -> tuple[Place, ...]:
    """Return the places in which the service, and the rooms that it uses, keep images."""
    uploads = Place(
        "uploads",
        "serving.page_folder",
        "images as visitors of the page chose them, for minutes",
        lambda store, image_ids: erase_uploads(settings, store.home.root, image_ids),
    )
    return (*RECORDS_PLACES, PIXELS, uploads, REPORT)


def take_back_consent(store: Store, settings: ServingSettings, image_id: str, consent: Consent, caller: Caller) -> None:
    """Lower the consent of an image; `none` erases it.

    Args:
        store: with the image.
        settings: say where the page keeps uploads.
        image_id: 64 hex characters.
        consent: the new one.
        caller: an administrator, or one whose organisation alone sent the image.
    Raises:
        UnknownIdError: there is no such image, and equally if others sent or imported it as well.
        RefusedError: the image has a lower consent.
    """
    with store.ledger.read() as tx:
        owners = organisations_of(tx, image_id)
    # Nobody may take an image away from another organisation that has the same file.
    if Scope.ADMIN not in caller.scopes and owners != {caller.organisation}:
        raise UnknownIdError(f"no Image has the id {image_id!r}")
    if consent is Consent.NONE:
        erase_images(store, [image_id], actor=caller.id, places=serving_places(settings))
    else:
        lower_consent(store, image_id, consent, actor=caller.id)
