"""Export: a bundle as a folder that needs nothing of Relook.

    model.onnx (or model.xml and model.bin)   the graph: pixels in, what the service stores about a prediction out
    model.json      classes, inputs, outputs, thresholds, geometry, and the SHA-256 of the other files
    golden.npz      the bundle's golden images, and every output that torch computes for them
    example.py      runs the graph with one package and compares it with golden.npz
    README.md       what the graph takes, and what it leaves to its caller

In: a bundle. Out: the folder, which appears whole or not at all, after the written graph was run and reproduced the
golden outputs.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from images.decode import DECODE_VERSION
from records.bundles import Bundle
from records.durable import building, place
from records.errors import ConfigError, IntegrityError
from records.frames import Crop
from records.ids import sha256_hex
from vision.calibration.decision import sets_of
from vision.inference.graph import (
    IMAGES,
    LOGITS,
    MAPS,
    OOD_SCORE,
    PREDICTION_SET,
    PROBABILITIES,
    DecisionGraph,
    ForwardGraph,
    export_program,
)
from vision.inference.loaded import LoadedModel, load_model, plain_network
from vision.inference.rounding import ROUNDING, rounding_of_scores

Format = Literal["onnx", "openvino"]
Arrays = Mapping[str, NDArray[Any]]
FORMATS: tuple[Format, ...] = ("onnx", "openvino")
TOLERANCE = 1e-4
"""Largest difference from torch: of probabilities, and of other outputs as a share of the largest value."""

_GRAPH_FILES: dict[str, tuple[str, ...]] = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
_SQUARES: dict[Crop, str] = {
    Crop.CENTER: "scale the shorter side to {side} px (Pillow, bicubic, after whole reductions of a JPEG) and cut the\n"
    "   centre of the longer side.",
    Crop.WHOLE: "scale the whole image to {side} x {side} px (Pillow, bicubic, after whole reductions of a JPEG),\n"
    "   whatever its proportions; nothing is cut.",
}
_DESCRIPTIONS = {
    LOGITS: "before calibration",
    PROBABILITIES: "calibrated; NaN throughout a row whose logits are not finite",
    PREDICTION_SET: "classes that cannot be excluded: 1 - probability <= the class's threshold, and the label",
    MAPS: "Grad-CAM of every class, not negative; scale it to the image to draw it",
    OOD_SCORE: "distance from the training images; above 1 is out of distribution",
}


@dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    folder: Path
    format: Format
    model_id: str
    files: dict[str, str]
    """name to SHA-256"""
    outputs: tuple[str, ...]
    differences: dict[str, float]
    """by output: the largest from torch, as `TOLERANCE` counts it"""


def export_model(bundle: Bundle, folder: Path, format: str) -> Exported:
    """Write a bundle as a graph with its golden outputs and an example.

    Args:
        bundle: its files were checked.
        folder: does not exist.
        format: `onnx` or `openvino`.
    Returns:
        What was written. A bundle whose head has no closed form of Grad-CAM has no maps in its graph.
    Raises:
        ConfigError: the format is unknown, the folder exists, or the extra is not installed.
        IntegrityError: the model or its graph does not reproduce the golden outputs.
        UnavailableError: the folder cannot be written.
    """
    chosen = _format(format)
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists, and an export overwrites nothing; name a new folder with --out")
    _require(chosen)
    model = load_model(bundle, precision="fp32")
    model.check_golden()
    forward = ForwardGraph(plain_network(bundle), model.geometry, model.checks, bundle.document.views)
    graph = DecisionGraph(forward, bundle.document, model.checks).eval()
    images = bundle.golden()["inputs"]
    golden = {IMAGES: images, **_golden(bundle, model, graph.names)}
    tolerance = dict.fromkeys(graph.names, TOLERANCE)
    if model.checks is not None:
        tolerance[OOD_SCORE] = max(TOLERANCE, ROUNDING * rounding_of_scores(bundle, model))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with building(folder.parent) as temporary:
        _WRITERS[chosen](graph, images[:2], temporary)
        differences = compare(_RUNNERS[chosen](temporary, images), golden)
        for name, difference in differences.items():
            # Negated, so that NaN is refused as well.
            if not difference <= tolerance[name]:
                raise IntegrityError(
                    f"the graph of model {bundle.id[:12]} differs from torch: {name} by {difference:.3g}, where "
                    f"{tolerance[name]:.3g} is allowed; nothing was written"
                )
        with (temporary / "golden.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **golden)
        (temporary / "example.py").write_text(_text(f"example_{chosen}.txt"))
        (temporary / "README.md").write_text(_readme(bundle, chosen, graph.names))
        files = {path.name: sha256_hex(path.read_bytes()) for path in sorted(temporary.iterdir())}
        description = {**_description(bundle, chosen, golden), "tolerance": tolerance, "files": files}
        (temporary / "model.json").write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
        if not place(temporary, folder):
            raise ConfigError(f"{folder} exists, and an export overwrites nothing; name a new folder with --out")
    return Exported(folder, chosen, bundle.id, files, graph.names, differences)


def compare(found: Arrays, expected: Arrays) -> dict[str, float]:
    """Return the largest difference of each output, over its largest value where that has no natural scale."""
    differences = {}
    for name, wanted in expected.items():
        if name == IMAGES:
            continue
        if wanted.dtype == np.bool_:
            differences[name] = float((found[name] != wanted).mean())
            continue
        scale = 1.0 if name == PROBABILITIES else max(float(np.abs(wanted).max()), 1e-12)
        differences[name] = float(np.abs(found[name] - wanted).max()) / scale
    return differences


def _format(format: str) -> Format:
    for known in FORMATS:
        if format == known:
            return known
    raise ConfigError(f"--format is {format!r}; it must be {' or '.join(FORMATS)}")


def _require(format: Format) -> None:
    try:
        if format == "onnx":
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        else:
            import openvino  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"an export to {format} needs the package {error.name}; install it with: pip install 'relook[{format}]'"
        ) from error


def _golden(bundle: Bundle, model: LoadedModel, names: Sequence[str]) -> Arrays:
    """Return what torch computes in fp32 for the golden images, by output of the graph."""
    document = bundle.document
    output = model.predict(bundle.golden()["inputs"], gradcam=MAPS in names)
    sets = sets_of(output.probabilities, document.taxonomy, document.operating)
    arrays: dict[str, Any] = {
        LOGITS: output.logits, PROBABILITIES: output.probabilities, PREDICTION_SET: sets, MAPS: output.maps,
        OOD_SCORE: output.ood_scores,
    }  # fmt: skip
    kept = {name: np.asarray(arrays[name]) for name in names}
    return {name: v.astype(np.float32) if v.dtype == np.float64 else v for name, v in kept.items()}


def _write_onnx(graph: DecisionGraph, images: NDArray[np.uint8], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            export_program(graph, images), dynamo=True, verbose=False, input_names=[IMAGES],
            output_names=list(graph.names),
        )  # fmt: skip
    if program is None:
        raise IntegrityError("torch returned no graph")
    program.save(str(folder / "model.onnx"), external_data=False)


def _write_openvino(graph: DecisionGraph, images: NDArray[np.uint8], folder: Path) -> None:
    import openvino

    model = openvino.convert_model(export_program(graph, images))
    model.inputs[0].get_tensor().set_names({IMAGES})
    for output, name in zip(model.outputs, graph.names, strict=True):
        output.get_tensor().set_names({name})
    # Half precision is the default, and costs three digits of every logit.
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def _run_onnx(folder: Path, images: NDArray[np.uint8]) -> Arrays:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {IMAGES: images}), strict=True))


def _run_openvino(folder: Path, images: NDArray[np.uint8]) -> Arrays:
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "model.xml")
    # A compiled model has further names for the same outputs.
    names = [output.get_any_name() for output in model.outputs]
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({IMAGES: images})
    return {name: np.array(found[name]) for name in names}


_WRITERS: dict[str, Callable[[DecisionGraph, NDArray[np.uint8], Path], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}
_RUNNERS: dict[str, Callable[[Path, NDArray[np.uint8]], Arrays]] = {"onnx": _run_onnx, "openvino": _run_openvino}


def _description(bundle: Bundle, format: Format, golden: Arrays) -> dict[str, Any]:
    document = bundle.document
    side_px = document.geometry.side_px
    outputs = [
        {"name": name, "dtype": str(values.dtype), "shape": ["batch", *values.shape[1:]], "is": _DESCRIPTIONS[name]}
        for name, values in golden.items()
        if name != IMAGES
    ]
    return {
        "format": format,
        "format_version": 1,
        "graph": _GRAPH_FILES[format][0],
        "model_id": bundle.id,
        "architecture": document.architecture.model_dump(),
        "dataset_id": document.dataset_id,
        "parent_model_id": document.parent_model_id,
        "code_version": document.code_version,
        "input": {"name": IMAGES, "dtype": "uint8", "shape": ["batch", side_px, side_px, 3], "channels": "RGB"},
        "outputs": outputs,
        "classes": [{"code": c.code, "name": c.name, "malignant": c.malignant} for c in document.taxonomy.classes],
        "taxonomy_hash": document.taxonomy_hash,
        "geometry": document.geometry.model_dump(),
        "decode_version": DECODE_VERSION,
        "calibration": document.calibration.model_dump(),
        # Probabilities of the graph are those of the image alone; this is what a caller adds to the scaled logits.
        "context": None if document.context is None else document.context.model_dump(),
        "views": document.views,
        "thresholds": document.operating.model_dump(),
        "label": {
            "rule": document.operating.decision.rule,
            "weights": document.operating.decision.weights,
            "is": "argmax of probability * weight; without weights, of the probability",
        },
        "suitability": None if document.suitability is None else document.suitability.model_dump(),
        "explanation": document.explanation if MAPS in golden else None,
        "licence": {
            "code": "Apache-2.0",
            "weights": f"those of the images of dataset {document.dataset_id}; `relook data export` lists them",
        },
        "report": f"relook evaluate {bundle.id[:12]} --report DIR",
    }


def _readme(bundle: Bundle, format: Format, names: Sequence[str]) -> str:
    geometry = bundle.document.geometry
    squares = _SQUARES[geometry.crop].format(side=geometry.side_px)
    absent = (
        "" if MAPS in names else "\nThe head of this network has no closed form of Grad-CAM: the graph has no maps.\n"
    )
    absent += "" if OOD_SCORE in names else "\nThe model was made without a check of its distance: there is no score.\n"
    rows = "\n".join(f"| `{name}` | {_DESCRIPTIONS[name]} |" for name in names)
    return _text("readme.txt").format(
        model=bundle.id[:12], graph=_GRAPH_FILES[format][0], side=geometry.side_px, squares=squares,
        decode_version=DECODE_VERSION, rows=rows, absent=absent,
        package="onnxruntime" if format == "onnx" else "openvino",
    )  # fmt: skip


def _text(name: str) -> str:
    return (resources.files("vision.export") / name).read_text(encoding="utf-8")
