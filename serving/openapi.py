"""The API's OpenAPI document: what FastAPI derives from the routes, and what it cannot know.

In: FastAPI's document and the classes that exist. Out: the same document, whole. It adds the class codes that exist,
the media type of problems, and the form parts that routes read by themselves.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from starlette.routing import compile_path

from serving.problems import MEDIA_TYPE
from serving.schemas import Context

CLASS_FIELDS = {"FlagRequest": "suggested_label", "OutcomeRequest": "diagnosis"}
CLASS_PARAMETERS = frozenset({"target", "versus"})

Document = dict[str, Any]


def completed(document: Document, class_codes: Sequence[str]) -> Document:
    """Complete the document of an app.

    Args:
        document: as FastAPI derives it; changed in place.
        class_codes: that exist, in class order.
    Returns:
        The same document, OpenAPI 3.1.
    """
    schemas = document["components"]["schemas"]
    schemas["Context"] = Context.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schemas["Context"].pop("$defs", {})
    for operation in _operations(document):
        _name_problem_type(operation)
        for parameter in operation.get("parameters", []):
            if parameter["name"] in CLASS_PARAMETERS:
                _name_classes(parameter["schema"], class_codes)
    for body, field in CLASS_FIELDS.items():
        _name_classes(schemas[body]["properties"][field], class_codes)
    return document


def allowed_verbs(document: Document, path: str) -> list[str]:
    """Return the verbs that a path takes; Starlette would name only those of the first route that has it.

    Args:
        document: of the app.
        path: of a request.
    Returns:
        Verbs in capitals; GET alone for a path outside the document, such as that of its own page.
    """
    paths = document["paths"]
    # A path that is written out, /v1/predictions/batch, is not meant as one with an id in it.
    meant = path if path in paths else next((p for p in paths if compile_path(p)[0].match(path)), None)
    return ["GET"] if meant is None else [verb.upper() for verb in paths[meant]]


def _operations(document: Document) -> Iterator[Document]:
    for verbs in document["paths"].values():
        yield from verbs.values()


def _name_problem_type(operation: Document) -> None:
    """Say that problems have their own media type; FastAPI writes JSON for every model."""
    for response in operation["responses"].values():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        if schema.get("$ref", "").endswith("/Problem"):
            response["content"] = {MEDIA_TYPE: {"schema": schema}}


def _name_classes(schema: Document, class_codes: Sequence[str]) -> None:
    """Say which strings a schema takes, whether it also takes null or not."""
    for choice in schema.get("anyOf", [schema]):
        if choice.get("type") == "string":
            choice["enum"] = list(class_codes)
