"""Tasks for the labeling page of somebody else's project, and whether that page can ask for every class."""

from collections.abc import Mapping
from typing import Any

from images.pairs import label_pair
from labeling.existing.page import LabelPage
from labeling.settings import LabelingSettings
from labeling.tasks import no_image
from records.errors import DataError
from records.taxonomy import Taxonomy
from records.types import Image
from records.types.base import LINE

_TEXTS = frozenset({"text", "header", "hypertext", "style", "view", "label", "panel", "markdown", "chat"})


def require_fit(page: LabelPage, taxonomy: Taxonomy) -> list[str]:
    """Refuse a page on which not every class can be chosen, or that shows what Relook does not have.

    Args:
        page: of the project that is to be linked.
        taxonomy: its classes are asked for.
    Returns:
        The choices that mean no class.
    Raises:
        DataError: the sentence says which choices are missing, or what cannot be shown.
    """
    if not page.choices:
        raise DataError(
            f"the choices of {page.from_name!r} come from the data of each task; a page that is linked has them itself"
        )
    classes = page.classes(taxonomy)
    missing = [code for code in taxonomy.codes if code not in classes.values()]
    if missing:
        raise DataError(
            f"{page.from_name!r} has no choice for {', '.join(missing)}; add them to the project's page in Label "
            f"Studio, or name the choices that mean them, for example --labels "
            f"'{label_pair(LINE.keep(page.choices[0]), missing[0])}'"
        )
    other = [f"<{tag}> ${key}" for key, tag in page.keys.items() if tag != "image" and tag not in _TEXTS]
    if other:
        raise DataError(f"the project's page shows {', '.join(other)}; Relook's tasks have images and texts only")
    return [choice for choice in page.choices if choice not in classes and not page.is_unsure(choice, taxonomy)]


def fitted(document: Mapping[str, Any], page: LabelPage, image: Image, settings: LabelingSettings) -> dict[str, Any]:
    """Return a task with the keys that a page needs, and with no others: annotators can open a task's data.

    Args:
        document: a task for a page of Relook's own.
        page: of the linked project.
        image: the image of the task.
        settings: size of the placeholder for an image that Relook does not have.
    Returns:
        The task for that page.
    """
    own = document["data"]
    known = {
        "age": "" if image.age_years is None else f"{image.age_years:g}",
        "sex": image.sex or "",
        "localization": image.localization or "",
        "site": image.site or "",
        "lesion_id": image.lesion_id or "",
    }
    texts = {name: own.get(name, "") for name in ("why", "about", "prediction", "cases_text")}
    data: dict[str, Any] = {"relook_item": own["relook_item"], "relook_key": own["relook_key"]}
    for key, tag in page.keys.items():
        if key == page.image_key:
            value = own["image"]
        elif tag == "image":
            # Label Studio refuses a task without a key that its page uses.
            value = own.get(key) if key in ("heatmap", "cases") else None
            value = value or no_image(settings.image_side_px)
        else:
            value = {**known, **texts}.get(key, "")
        data[key] = [value] if key in page.lists else value
    return {**document, "data": data}
