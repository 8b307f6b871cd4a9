"""Reading images from request bodies: raw, or with their context as multipart form or as base64 in JSON."""

from typing import Any

from fastapi import HTTPException, Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile

from records.errors import DataError, ImageError
from records.settings import first_problem
from serving.json_images import decoded_base64, require_few_values
from serving.schemas import Context, EncodedImage

NAMED_TYPES = ("image/jpeg", "image/png", "image/webp", "application/dicom")
RAW_TYPES = (*NAMED_TYPES, "application/octet-stream", "image/jpg", "image/pjpeg")
"""The first ones are named in the API; the last two are old names of JPEG that programs still send."""
BINARY = {"schema": {"type": "string", "format": "binary"}}
JSON_TYPE = "application/json"
IMAGE_PARTS = ("image", "file")
"""Names of the form part with an image; the second one is what other servers call it."""
_CONTEXTS = TypeAdapter(list[Context])


def image_body(*, many: bool = False) -> dict[str, Any]:
    """Return the OpenAPI description of a body: one image, raw, as form or as JSON, or many as form."""
    image: dict[str, Any] = {"type": "string", "format": "binary"}
    context: dict[str, Any] = {"$ref": "#/components/schemas/Context"}
    if many:
        # Without a least number: a form cannot hold an empty list, so an absent part would contradict it.
        image = {"type": "array", "items": image}
        context = {"type": "array", "items": context, "description": "one for each image, in their order"}
    form = {
        "schema": {
            "type": "object",
            "properties": {**dict.fromkeys(IMAGE_PARTS, image), "context": context},
            "oneOf": [{"required": [name]} for name in IMAGE_PARTS],
            "additionalProperties": False,
        },
        "encoding": {
            **{name: {"contentType": ", ".join(NAMED_TYPES)} for name in IMAGE_PARTS},
            "context": {"contentType": JSON_TYPE},
        },
    }
    content: dict[str, Any] = {"multipart/form-data": form}
    if not many:
        # JSON first: it is the form that a page of documentation can fill with an example.
        encoded = {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/EncodedImage"}}}
        content = {**encoded, **dict.fromkeys(NAMED_TYPES, BINARY), **content}
    return {"requestBody": {"required": True, "content": content}}


async def one_image(request: Request) -> tuple[bytes, Context]:
    """Return the bytes of one image as sent, and its context, which is empty for a raw body.

    Raises ImageError for another content type, and DataError if form or JSON have no image or their context does not
    fit.
    """
    media_type = _media_type(request)
    if media_type in RAW_TYPES:
        return await request.body(), Context()
    if media_type == JSON_TYPE:
        return _encoded_image(await request.body())
    if media_type != "multipart/form-data":
        raise ImageError(
            f"content type {media_type or 'none'!r} is not supported; send {', '.join(NAMED_TYPES)}, "
            "multipart/form-data with `image`, or application/json with `image_base64`",
            "unsupported_type",
        )
    async with request.form(max_files=2, max_fields=2, max_part_size=_largest_part(request)) as form:
        _require_known_parts(form)
        images = _image_parts(form)
        if not images or not isinstance(images[0], UploadFile):
            raise DataError("the form has no file `image`; add the image under that name")
        if len(images) > 1:
            raise DataError("the form has two images; send one, or several to /v1/predictions/batch")
        text = await _context_text(form)
        return await images[0].read(), Context() if text is None else _parsed_one(text)


async def many_images(request: Request, most: int) -> list[tuple[bytes, Context]]:
    """Return several images with their contexts, in the order of the form; at most `most`.

    Raises ImageError if the body is not a form, and DataError for no image, too many, or contexts that do not fit.
    """
    if _media_type(request) != "multipart/form-data":
        raise ImageError("a batch must be multipart/form-data with one part `image` per image", "unsupported_type")
    # Room for the context and one image too many, so that the check below names the limit.
    async with request.form(max_files=most + 2, max_fields=2, max_part_size=_largest_part(request)) as form:
        _require_known_parts(form)
        images = [part for part in _image_parts(form) if isinstance(part, UploadFile)]
        if not 1 <= len(images) <= most:
            raise DataError(f"a batch has 1 to {most} files `image`, not {len(images)}")
        text = await _context_text(form)
        contexts = [Context()] * len(images) if text is None else _parsed_many(text)
        if len(contexts) != len(images):
            raise DataError(f"context: {len(contexts)} for {len(images)} images; send one for each, in their order")
        return [(await image.read(), context) for image, context in zip(images, contexts, strict=True)]


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _largest_part(request: Request) -> int:
    limit: int = request.app.state.max_body_bytes
    return limit


def _require_known_parts(form: FormData) -> None:
    """Refuse unknown parts: a misspelt `context` may hold a consent that would silently be ignored."""
    unknown = sorted(set(form) - {*IMAGE_PARTS, "context"})
    if unknown:
        raise DataError(f"the form has a part {unknown[0][:40]!r}; its parts are `image` (or `file`) and `context`")
    if len(form.getlist("context")) > 1:
        raise DataError("the form has two parts `context`; send one")


def _image_parts(form: FormData) -> list[UploadFile | str]:
    # Images of two names have no order that a list of contexts could follow.
    if set(IMAGE_PARTS) <= set(form):
        raise DataError("the form has parts `image` and `file`; give images one of these names")
    return [part for name in IMAGE_PARTS for part in form.getlist(name)]


def _encoded_image(body: bytes) -> tuple[bytes, Context]:
    require_few_values(body)
    try:
        sent = EncodedImage.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid":
            raise HTTPException(400, "the body is not JSON; send an object with `image_base64`") from error
        field, reason = first_problem(error)
        raise DataError(f"{field or 'the body'}: {reason}") from error
    return decoded_base64(sent.image_base64, "image_base64"), sent.context or Context()


async def _context_text(form: FormData) -> bytes | str | None:
    part = form.get("context")
    return await part.read() if isinstance(part, UploadFile) else part


def _parsed_one(text: bytes | str) -> Context:
    try:
        return Context.model_validate_json(text)
    except ValidationError as error:
        raise _misfit(error) from error


def _parsed_many(text: bytes | str) -> list[Context]:
    try:
        return _CONTEXTS.validate_json(text)
    except ValidationError as error:
        raise _misfit(error) from error


def _misfit(error: ValidationError) -> DataError:
    field, reason = first_problem(error)
    return DataError(f"context: {field or 'context'}: {reason}")
