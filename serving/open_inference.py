"""The Open Inference Protocol (version 2): its bodies, and tensors from and to images and predictions.

In: the body of a request, JSON with or without the binary tensors of Triton's extension. Out: images with their
contexts, and from stored predictions a body again. No HTTP and no model here: the routes call what `POST
/v1/predictions` calls.

A tensor of BYTES is one text or file per element. In JSON an image is base64; in a binary part it is the file itself
after its length in 4 bytes, little-endian.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from records.errors import DataError
from records.settings import first_problem
from records.types import Arm
from records.types.base import Text
from serving.json_images import decoded_base64, require_few_values
from serving.messages import StoredPrediction
from serving.schemas import Context, Whole

MODEL_NAME = "relook"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header with the bytes of the JSON before the binary tensors."""
INPUTS = ("image", "context")


class _Loose(BaseModel):
    # Clients of this protocol send fields of extensions that do not concern predictions.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class InputTensor(_Loose):
    """A tensor of a request."""

    name: Text = Field(description="image, or context for what is known about each image, as JSON texts")
    datatype: Text = Field(description="BYTES")
    shape: Annotated[list[Whole], Field(min_length=1, max_length=2)] = Field(description="[N] or [N, 1]")
    parameters: dict[str, Any] | None = Field(default=None, description="binary_data_size, if the data is binary")
    data: list[Any] | None = Field(default=None, description="N texts; images as base64")


class WantedOutput(_Loose):
    """An output that a request asks for."""

    name: Text
    parameters: dict[str, Any] | None = Field(default=None, description="binary_data: after the JSON instead of in it")


class InferenceRequest(_Loose):
    """Images to predict."""

    id: Text | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="binary_data_output: of all outputs")
    inputs: list[InputTensor] = Field(min_length=1)
    outputs: list[WantedOutput] | None = Field(default=None, description="default: all")


class OutputTensor(BaseModel):
    """A tensor of a response."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = Field(default=None, description="in row order; null is no number")


class InferenceResponse(BaseModel):
    """The stored predictions of a request."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class InferenceError(BaseModel):
    """Any error of this protocol."""

    error: str = Field(description="one sentence")


class TensorInfo(BaseModel):
    """A tensor that the model takes or returns."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 is any size")


class InferenceModel(BaseModel):
    """The model of this protocol."""

    name: str
    versions: list[str] = Field(description="the model that serves now")
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class InferenceServer(BaseModel):
    """The server of this protocol."""

    name: str
    version: str
    extensions: list[str]


class InferenceLive(BaseModel):
    """Whether the server responds."""

    live: bool


class InferenceReady(BaseModel):
    """Whether predictions can be made now."""

    name: str | None = None
    ready: bool


@dataclass(frozen=True, slots=True)
class Inference:
    """What a request asks for."""

    id: str | None
    images: list[tuple[bytes, Context]]
    outputs: dict[str, bool]
    """names, each with whether it is returned as binary"""


@dataclass(frozen=True, slots=True)
class _Output:
    datatype: Literal["BYTES", "FP64", "FP32", "BOOL"]
    shape: list[int]
    values: Callable[[Sequence[StoredPrediction], Sequence[str]], Any]


def _texts(read: Callable[[StoredPrediction], str]) -> Callable[[Sequence[StoredPrediction], Sequence[str]], Any]:
    return lambda stored, codes: np.array([read(each) for each in stored], dtype=np.object_)


def _probabilities(stored: Sequence[StoredPrediction], codes: Sequence[str]) -> Any:
    none = dict.fromkeys(codes, np.nan)
    found = [each.prediction.probabilities or none for each in stored]
    return np.array([[row[code] for code in codes] for row in found], np.float64)


def _without_context(stored: Sequence[StoredPrediction], codes: Sequence[str]) -> Any:
    none = {"probabilities_without": dict.fromkeys(codes, np.nan)}
    found = [(each.prediction.context_effect or none)["probabilities_without"] for each in stored]
    return np.array([[row[code] for code in codes] for row in found], np.float64)


def _context_used(each: StoredPrediction) -> str:
    effect = each.prediction.context_effect
    return " ".join(effect["used"]) if effect is not None else ""


def _confidences(stored: Sequence[StoredPrediction], codes: Sequence[str]) -> Any:
    found = [each.prediction.confidence for each in stored]
    return np.array([np.nan if value is None else value for value in found], np.float64)


def _sets(stored: Sequence[StoredPrediction], codes: Sequence[str]) -> Any:
    return np.array([[code in each.prediction.prediction_set for code in codes] for each in stored], np.bool_)


def _maps(stored: Sequence[StoredPrediction], codes: Sequence[str]) -> Any:
    # All of a tensor have one size. Models of a rollout may differ in it, so a map of another size is left out.
    maps = [None if each.heat_map is None else each.heat_map.values for each in stored]
    shape = next((values.shape for values in maps if values is not None), (0, 0))
    none = np.full(shape, np.nan, np.float32)
    return np.stack([none if values is None or values.shape != shape else values for values in maps])


# What has no value is NaN: probabilities, confidence and map of an image that should be taken again, and probabilities
# without context where none was given that the model uses.
OUTPUTS: dict[str, _Output] = {
    "prediction_id": _Output("BYTES", [-1], _texts(lambda each: each.prediction.id)),
    "model_version": _Output("BYTES", [-1], _texts(lambda each: each.prediction.model_id)),
    "decision": _Output("BYTES", [-1], _texts(lambda each: each.prediction.decision.value)),
    "label": _Output("BYTES", [-1], _texts(lambda each: each.prediction.label or "")),
    "confidence": _Output("FP64", [-1], _confidences),
    "classes": _Output("BYTES", [-1], lambda stored, codes: np.array(codes, dtype=np.object_)),
    "probabilities": _Output("FP64", [-1, -1], _probabilities),
    "prediction_set": _Output("BOOL", [-1, -1], _sets),
    "heat_map": _Output("FP32", [-1, -1, -1], _maps),
    "context_used": _Output("BYTES", [-1], _texts(_context_used)),
    "probabilities_without_context": _Output("FP64", [-1, -1], _without_context),
}
"""Names of the outputs; `prediction_set` and `probabilities` have a column per class, in the order of `classes`."""


def model_info(version: str) -> InferenceModel:
    """Return what the protocol says about the model that serves; `version` is its id."""
    outputs = [TensorInfo(name=name, datatype=each.datatype, shape=each.shape) for name, each in OUTPUTS.items()]
    inputs = [TensorInfo(name=name, datatype="BYTES", shape=[-1]) for name in INPUTS]
    return InferenceModel(name=MODEL_NAME, versions=[version], platform="relook", inputs=inputs, outputs=outputs)


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """Return the JSON of a body and the binary tensors behind it; DataError if the header does not fit the body."""
    if header_length is None:
        return body, b""
    if not (header_length.isascii() and header_length.isdigit()) or not 0 < int(header_length) <= len(body):
        raise DataError(
            f"{HEADER_LENGTH} is {header_length[:20]!r}; it must be 1 to {len(body)}, the bytes of the JSON"
        )
    return body[: int(header_length)], body[int(header_length) :]


def parsed(document: bytes, binary: bytes, most: int) -> Inference:
    """Return what a request asks for.

    Args:
        document: its JSON.
        binary: the binary tensors behind it.
        most: images that one request may have.
    Returns:
        Images with contexts, and the outputs.
    Raises:
        DataError: the request does not fit the protocol or the model; one sentence says where.
    """
    require_few_values(document)
    try:
        sent = InferenceRequest.model_validate_json(document)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise DataError(f"{field or 'the body'}: {reason}") from error
    tensors = _input_tensors(sent.inputs, binary, most)
    if "image" not in tensors:
        raise DataError("the request has no input `image`; send one of datatype BYTES")
    images = [_image(element, index) for index, element in enumerate(tensors["image"])]
    texts = tensors.get("context", [b"{}"] * len(images))
    if len(texts) != len(images):
        raise DataError(f"input context: {len(texts)} elements for {len(images)} images; send one for each")
    contexts = [_context(text, index) for index, text in enumerate(texts)]
    return Inference(sent.id, list(zip(images, contexts, strict=True)), _wanted(sent))


def _input_tensors(inputs: Sequence[InputTensor], binary: bytes, most: int) -> dict[str, list[bytes | str]]:
    """Return the elements of each input: bytes of a binary one, texts of one in JSON."""
    found: dict[str, list[bytes | str]] = {}
    at = 0
    for tensor in inputs:
        where = f"input {tensor.name[:40]}"
        if tensor.name not in INPUTS:
            raise DataError(f"{where}: there is no such input; the inputs are {' and '.join(INPUTS)}")
        if tensor.name in found:
            raise DataError(f"{where}: it is there twice; send it once")
        if tensor.datatype != "BYTES":
            raise DataError(f"{where}: datatype {tensor.datatype[:20]}; it must be BYTES")
        count = tensor.shape[0]
        if not 1 <= count <= most or tensor.shape[1:] not in ([], [1]):
            raise DataError(
                f"{where}: shape {str(tensor.shape)[:40]}; it must be [N] or [N, 1] with N from 1 to {most}"
            )
        size = (tensor.parameters or {}).get("binary_data_size")
        if (size is None) == (tensor.data is None):
            raise DataError(f"{where}: give either `data` or the parameter `binary_data_size`")
        if size is None:
            found[tensor.name] = _texts_of(tensor, count, where)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - at:
            raise DataError(f"{where}: binary_data_size {str(size)[:20]}, and {len(binary) - at} bytes are there")
        found[tensor.name] = _binary_elements(binary[at : at + size], count, where)
        at += size
    if at != len(binary):
        raise DataError(f"{len(binary) - at} bytes behind the JSON belong to no input; see binary_data_size")
    return found


def _texts_of(tensor: InputTensor, count: int, where: str) -> list[bytes | str]:
    texts: list[Any] = []
    for element in tensor.data or []:
        # Nested as the shape is, or flat.
        texts += element if isinstance(element, list) and len(tensor.shape) == 2 else [element]
    if len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: shape {tensor.shape} needs {count} texts in `data`")
    return texts


def _binary_elements(part: bytes, count: int, where: str) -> list[bytes | str]:
    found: list[bytes | str] = []
    at = 0
    for index in range(count):
        if len(part) - at < 4:
            raise DataError(f"{where}: the binary data ends before element {index + 1} of {count}")
        (size,) = struct.unpack_from("<I", part, at)
        at += 4
        if size > len(part) - at:
            raise DataError(f"{where}: element {index + 1} should have {size} bytes, and {len(part) - at} are left")
        found.append(part[at : at + size])
        at += size
    if at != len(part):
        raise DataError(f"{where}: {len(part) - at} bytes are left after its {count} elements")
    return found


def _image(element: bytes | str, index: int) -> bytes:
    return element if isinstance(element, bytes) else decoded_base64(element, f"input image, element {index + 1}")


def _context(text: bytes | str, index: int) -> Context:
    try:
        return Context.model_validate_json(text)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise DataError(f"input context, element {index + 1}: {field or 'context'}: {reason}") from error


def _wanted(sent: InferenceRequest) -> dict[str, bool]:
    binary = _flag(sent.parameters, "binary_data_output", False)
    if not sent.outputs:
        return dict.fromkeys(OUTPUTS, binary)
    found: dict[str, bool] = {}
    for output in sent.outputs:
        where = f"output {output.name[:40]}"
        if output.name not in OUTPUTS:
            raise DataError(f"{where}: there is no such output; the outputs are {', '.join(OUTPUTS)}")
        for parameter in ("classification", "shared_memory_region"):
            if (output.parameters or {}).get(parameter):
                raise DataError(f"{where}: {parameter} is not supported; ask for the output itself")
        found[output.name] = _flag(output.parameters, "binary_data", binary)
    return found


def _flag(parameters: dict[str, Any] | None, name: str, default: bool) -> bool:
    value = (parameters or {}).get(name, default)
    if not isinstance(value, bool):
        raise DataError(f"parameter {name}: it must be true or false")
    return value


def response_body(
    stored: Sequence[StoredPrediction], asked: Inference, codes: Sequence[str]
) -> tuple[bytes, int | None]:
    """Return the body of a response, and how many of its bytes are JSON; None if all are.

    Args:
        stored: a prediction per image.
        asked: the request.
        codes: of the classes, in their order.
    Returns:
        The body, and the value of the header `Inference-Header-Content-Length`.
    """
    outputs, parts = [], []
    for name, as_binary in asked.outputs.items():
        values = np.asarray(OUTPUTS[name].values(stored, codes))
        tensor: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name].datatype, "shape": list(values.shape)}
        if as_binary:
            parts.append(_as_bytes(values))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = [None if value != value else value for value in values.ravel().tolist()]
        outputs.append(tensor)
    # A canary may have predicted some of the images; `model_version` of each image says so.
    served = next((each for each in stored if each.prediction.arm is Arm.CHAMPION), stored[0])
    document: dict[str, Any] = {"model_name": MODEL_NAME, "model_version": served.prediction.model_id}
    if asked.id is not None:
        document["id"] = asked.id
    head = json.dumps({**document, "outputs": outputs}, allow_nan=False).encode()
    return head + b"".join(parts), len(head) if parts else None


def _as_bytes(values: Any) -> bytes:
    if values.dtype != np.object_:
        # The protocol has little-endian numbers.
        return bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())
    texts = [text.encode() for text in values.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
