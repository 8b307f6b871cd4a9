"""The OpenAPI document of the API.

FastAPI derives it from the routes; `completed` adds what FastAPI cannot know: the class codes, the media type of
problems, the bodies that routes read themselves, with examples that work, and which operations take a key.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from starlette.routing import compile_path

from serving.docs_page import example_image
from serving.open_inference import InferenceRequest
from serving.problems import MEDIA_TYPE
from serving.schemas import Context, EncodedImage

CLASS_FIELDS = {"FlagRequest": "suggested_label", "OutcomeRequest": "diagnosis"}
CLASS_PARAMETERS = frozenset({"target", "versus"})

Document = dict[str, Any]

_KEY = {"type": "http", "scheme": "bearer", "description": "a key of `relook keys create`; none while there is none"}


def completed(
    document: Document, class_codes: Sequence[str], keyed: Collection[tuple[str, str]], root_path: str = ""
) -> Document:
    """Complete FastAPI's document of an app in place and return it, OpenAPI 3.1.

    Args:
        document: as FastAPI made it.
        class_codes: in class order.
        keyed: verb and path of the operations that ask for a key.
        root_path: below which a reverse proxy shows the service, or empty.
    Returns:
        The document.
    """
    schemas = document["components"]["schemas"]
    # Routes read these bodies themselves, so FastAPI leaves their schemas out.
    for model in (Context, EncodedImage, InferenceRequest):
        schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schemas[model.__name__].pop("$defs", {})
    for operation in _operations(document):
        _name_problem_type(operation)
        for parameter in operation.get("parameters", []):
            if parameter["name"] in CLASS_PARAMETERS:
                _name_classes(parameter["schema"], class_codes)
    for body, field in CLASS_FIELDS.items():
        _name_classes(schemas[body]["properties"][field], class_codes)
    _add_examples(schemas)
    document["components"]["securitySchemes"] = {"key": _KEY}
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            if (verb.upper(), path) in keyed:
                # Or none: while there are no keys, this machine needs none.
                operation["security"] = [{"key": []}, {}]
    if root_path:
        document["servers"] = [{"url": root_path}]
    return document


def allowed_verbs(document: Document, path: str) -> list[str]:
    """Return the verbs of a path in capitals; GET alone for a path outside the document, such as /docs.

    Starlette would name only the verbs of the first route with that path.
    """
    paths = document["paths"]
    # A literal path, /v1/predictions/batch, takes precedence over a template with an id in its place.
    template = path if path in paths else next((p for p in paths if compile_path(p)[0].match(path)), None)
    return ["GET"] if template is None else [verb.upper() for verb in paths[template]]


def _operations(document: Document) -> Iterator[Document]:
    for verbs in document["paths"].values():
        yield from verbs.values()


def _add_examples(schemas: Document) -> None:
    """Add an image to the bodies that hold one as text, so that they can be sent as they are."""
    image, context = example_image(), {"age": 61, "localization": "back", "consent": "none"}
    schemas["EncodedImage"]["examples"] = [{"image_base64": image, "context": context}]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
    schemas["InferenceRequest"]["examples"] = [{"inputs": [tensor], "outputs": [{"name": "probabilities"}]}]


def _name_problem_type(operation: Document) -> None:
    """Give problems their own media type; FastAPI writes application/json for every model."""
    for response in operation["responses"].values():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        if schema.get("$ref", "").endswith("/Problem"):
            response["content"] = {MEDIA_TYPE: {"schema": schema}}


def _name_classes(schema: Document, class_codes: Sequence[str]) -> None:
    """Restrict the strings of a schema to the class codes, whether it also accepts null or not."""
    for choice in schema.get("anyOf", [schema]):
        if choice.get("type") == "string":
            choice["enum"] = list(class_codes)
