"""The OpenAPI document of the API, and the page that shows it.

FastAPI derives the document from the routes; `completed` adds what it cannot know: the class codes, the media type of
problems, and the form parts that routes read themselves. `docs_html` renders the document as one page without
scripts and without foreign hosts, so that it also works offline.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from starlette.routing import compile_path

from serving.open_inference import InferenceRequest
from serving.problems import MEDIA_TYPE
from serving.schemas import Context, EncodedImage

CLASS_FIELDS = {"FlagRequest": "suggested_label", "OutcomeRequest": "diagnosis"}
CLASS_PARAMETERS = frozenset({"target", "versus"})

Document = dict[str, Any]

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2733;background:#fff}
h1{margin-bottom:0}h2{margin-top:2.2rem;border-bottom:1px solid #d5dce3}
section{border:1px solid #d5dce3;border-radius:8px;padding:.8rem 1rem;margin:.8rem 0}
h3{margin:0;font:600 1rem ui-monospace,monospace}h3 b{color:#0b6e6e}
table{border-collapse:collapse;width:100%;margin:.5rem 0;font-size:.93rem}
td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-top:1px solid #e8edf1}
code,pre{font:.9rem ui-monospace,monospace}
pre{background:#f3f6f8;padding:.7rem;border-radius:6px;overflow:auto}
"""
DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""Of the page with the documentation, which has styles and nothing else."""
_EXAMPLES = """curl -s -H 'Content-Type: image/jpeg' --data-binary @lesion.jpg '{url}/v1/predictions?explain=gradcam'
curl -s -F image=@lesion.jpg -F 'context={{"age": 61}};type=application/json' {url}/v1/predictions
curl -s -H 'Content-Type: application/json' -d '{{"reason": "wrong_label"}}' {url}/v1/predictions/ID/flags"""


def completed(document: Document, class_codes: Sequence[str]) -> Document:
    """Complete FastAPI's document of an app in place and return it, OpenAPI 3.1; `class_codes` in class order."""
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


def docs_html(openapi: dict[str, Any]) -> str:
    """Render the OpenAPI document as a whole HTML page."""
    info = openapi["info"]
    operations = "".join(
        _operation_html(path, verb, operation)
        for path, verbs in openapi["paths"].items()
        for verb, operation in verbs.items()
    )
    bodies = "".join(_body_html(name, schema) for name, schema in openapi["components"]["schemas"].items())
    examples = escape(_EXAMPLES.format(url="http://127.0.0.1:8000"))
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])} API</h1><p>{escape(info.get('summary', ''))} "
        f"Version {escape(info['version'])}. For programs: <a href='/openapi.json'>openapi.json</a>.</p>"
        f"<pre>{examples}</pre><h2>Requests</h2>{operations}<h2>Bodies</h2>{bodies}"
        "<p>Every error is a problem document (RFC 9457), media type <code>application/problem+json</code>.</p></html>"
    )


def _operation_html(path: str, verb: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}</td><td>{escape(_type_text(p['schema']))}</td>"
        f"<td>{escape(p.get('description', ''))}</td></tr>"
        for p in operation.get("parameters", [])
    )
    takes = ", ".join(operation.get("requestBody", {}).get("content", {}))
    body = f"<p>Body: <code>{escape(takes)}</code></p>" if takes else ""
    gives = ", ".join(
        _type_text(content["schema"])
        for content in operation["responses"].get("200", {}).get("content", {}).values()
        if "$ref" in content.get("schema", {})
    )
    return (
        f"<section><h3><b>{verb.upper()}</b> {escape(path)}</h3><p>{escape(operation.get('description', ''))}</p>"
        f"{body}{f'<table>{rows}</table>' if rows else ''}"
        f"{f'<p>Response: <code>{escape(gives)}</code></p>' if gives else ''}</section>"
    )


def _body_html(name: str, schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{escape(_type_text(facts))}</td>"
        f"<td>{escape(facts.get('description', ''))}</td></tr>"
        for field, facts in schema.get("properties", {}).items()
    )
    values = f"<p>{escape(_type_text(schema))}</p>" if "enum" in schema else ""
    return (
        f"<section id='{escape(name)}'><h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>"
        f"{values}<table>{rows}</table></section>"
    )


def _type_text(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_type_text(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type_text(schema.get('items', {}))}"
    return str(schema.get("format", schema.get("type", "any")))
