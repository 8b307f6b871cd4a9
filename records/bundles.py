"""Model bundles: a folder with everything a model needs to predict, and nothing pickled.

    bundle.json               taxonomy, architecture, geometry, calibration, operating points
    weights.safetensors       parameters and buffers
    golden.safetensors        generated images (`inputs`, uint8 [N, S, S, 3]) and the model's `logits` for them, [N, C]
    suitability.safetensors   statistics that detect images unlike the training images; older bundles lack it
    report/               written later; not part of the id

The id is the hash of these files without the report.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from records.context import ContextHead
from records.durable import building, place
from records.errors import ContractError, IntegrityError, UnavailableError, UnknownIdError
from records.frames import Crop, Frame
from records.ids import sha256_hex
from records.settings import first_problem
from records.store import Store
from records.taxonomy import Taxonomy

FORMAT_VERSION: Literal[1] = 1
DOCUMENT, WEIGHTS, GOLDEN = "bundle.json", "weights.safetensors", "golden.safetensors"
SUITABILITY = "suitability.safetensors"
"""The only optional file."""


class _Part(BaseModel):
    # Kept as NaN in JSON values, so that `write_bundle` can refuse them; pydantic's default would write null.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")


class Architecture(_Part):
    """Which network, with which options; see the model registry of trainers."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Geometry(_Part):
    """How an image becomes the network's input."""

    side_px: int = Field(gt=0, description="the network sees side_px x side_px pixels")
    crop: Crop = Field(
        default=Crop.CENTER,
        description="center: the shorter side is scaled to side_px, the rest cut; whole: both sides are scaled to it",
    )
    scaling: Literal["mean_std", "min_max"] = "mean_std"
    mean: tuple[float, float, float] = Field(
        default=(0.5, 0.5, 0.5), description="per RGB channel, of values in [0, 1]"
    )
    std: tuple[float, float, float] = Field(default=(0.25, 0.25, 0.25), description="per RGB channel")
    decode_version: int = Field(default=1, ge=1, description="of the decoder that the model was trained behind")

    @property
    def frame(self) -> Frame:
        """Which part of an image the network sees, and at which side."""
        return Frame(self.side_px, self.crop)


class Calibration(_Part):
    """probabilities = softmax(logits / temperature + bias), fitted at the natural prevalence."""

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias: list[float] = Field(description="[C], in class order")
    priors: dict[str, float] = Field(default_factory=dict, description="class shares it was fitted at")


class ReferPoint(_Part):
    """A threshold on one calibrated probability, and what was proven about it on the calibration split."""

    threshold: float = Field(ge=0, le=1, description="p at or above it is referred")
    sensitivity_floor: float = Field(ge=0, le=1)
    proven: bool = Field(description="true if the exact one-sided 95 % lower bound reaches the floor")
    sensitivity: float | None = Field(description="lesion-level, on the calibration split; empty without cases")
    sensitivity_lower_bound: float | None = Field(description="exact one-sided 95 %")
    specificity: float | None
    lesions: int = Field(ge=0, description="positive lesions it was measured on")


Rule = Literal["natural", "even", "cost"]
"""Which class is the label: the most probable one (natural), that of the largest probability over its share at
calibration (even), that of the smallest expected cost, which is the largest probability times miss cost (cost)."""
PointName = Literal["proven", "target"]
"""Thresholds of referral whose sensitivity is proven on calibration, or estimated on it and on val."""


class ReferPoints(_Part):
    """The thresholds of referral at one operating point."""

    refer: dict[str, ReferPoint] = Field(default_factory=dict, description="per key class")
    refer_malignant: ReferPoint | None = Field(default=None, description="on the sum over malignant classes")


class DecisionRule(_Part):
    """How a label follows from probabilities, and at which operating point images are referred."""

    version: Literal[1] = 1
    rule: Rule = "natural"
    weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=list, description="[C]: the label is the argmax of probability * weight; empty: all are 1"
    )
    point: PointName = Field(default="proven", description="whose thresholds `refer` and `refer_malignant` hold")
    other: ReferPoints | None = Field(default=None, description="the other operating point, for reports")

    @model_validator(mode="after")
    def _weights_fit_the_rule(self) -> Self:
        if (self.rule == "natural") == any(self.weights):
            raise ValueError(f"the rule {self.rule} does not fit the weights {self.weights}; natural has none")
        return self


class OperatingPoints(_Part):
    """The thresholds that triage compares probabilities with."""

    refer: dict[str, ReferPoint] = Field(default_factory=dict, description="per key class")
    refer_malignant: ReferPoint | None = Field(default=None, description="on the sum over malignant classes")
    urgent_threshold: float | None = Field(default=None, ge=0, le=1, description="on p(malignant)")
    conformal_promise: float = Field(default=0.90, gt=0, lt=1, description="promised coverage of prediction sets")
    conformal_thresholds: dict[str, float] = Field(
        default_factory=dict, description="class code to q: the class is in the set if 1 - p <= q"
    )
    pooled_classes: list[str] = Field(
        default_factory=list,
        description="classes with few calibration lesions: they share one threshold and are promised coverage together",
    )
    decision: DecisionRule = Field(
        default=DecisionRule(),
        # Left out where nothing was chosen, so that the ids of such bundles stay as they were.
        exclude_if=lambda decision: decision == DecisionRule(),
        description="bundles made before it are `natural` and `proven`",
    )


class QualityLimits(_Part):
    """Limits of image quality, on the pixels that the model sees; see `vision.inference.suitability`."""

    min_side_px: int = Field(gt=0, description="shorter side of an image as it was sent")
    lightness_median: float = Field(description="mean CIE lightness of an image, 0 to 255")
    min_lightness: float
    max_lightness: float
    sharpness_median: float = Field(description="log(1 + deviation of the Laplacian)")
    min_sharpness: float
    fine_share_median: float = Field(description="sharpness less log(1 + deviation of the gradient)")
    min_fine_share: float
    distance_median: float = Field(description="of colour and texture to the training images")
    max_distance: float


class SuitabilityLimits(_Part):
    """Limits beyond which an image is not suitable for the model."""

    ood_threshold: float = Field(gt=0, description="distance of the features; above it: out of distribution")
    ood_early_threshold: float | None = Field(
        default=None, gt=0, description="the same for the first convolution's output; empty in older bundles"
    )
    ood_max_refused: float = Field(ge=0, le=1, description="share of val that the thresholds were allowed to refuse")
    quality: QualityLimits


class Member(_Part):
    """A model whose logits are part of an ensemble's."""

    model_id: str
    dataset_id: str = Field(description="the version that it was trained on")
    weight: float = Field(gt=0, le=1, description="of its logits in the mean; those of all members add up to 1")


class Teacher(_Part):
    """The model whose probabilities a student was trained on, beside the labels."""

    model_id: str = Field(description="the hash of its files")
    dataset_id: str = Field(description="the version that it was trained on")
    logits_sha256: str = Field(description="of its logits for the training images, float32, in order of image id")


class BundleDocument(_Part):
    """bundle.json."""

    format_version: Literal[1] = FORMAT_VERSION
    taxonomy: Taxonomy
    taxonomy_hash: str
    architecture: Architecture
    geometry: Geometry
    class_priors: dict[str, float] = Field(description="share of each class among the training images")
    calibration: Calibration
    # Left out where they change nothing, so that such bundles have the content, and the id, that they had before.
    context: ContextHead | None = Field(
        default=None,
        exclude_if=lambda head: head is None,
        description="what is known about an image adds to its logits",
    )
    views: int = Field(
        default=1,
        ge=1,
        le=8,
        exclude_if=lambda views: views == 1,
        description="flips and turns whose logits are averaged",
    )
    operating: OperatingPoints = OperatingPoints()
    suitability: SuitabilityLimits | None = Field(
        default=None, description="empty in bundles made before it was fitted"
    )
    dataset_id: str
    trained_on: list[str] = Field(
        default=["train"],
        min_length=1,
        exclude_if=lambda splits: splits == ["train"],
        description="splits of the dataset that its network, or a member's, was trained on",
    )
    parent_model_id: str | None = Field(default=None, description="the model it was warm-started from")
    members: list[Member] = Field(
        default_factory=list, exclude_if=lambda members: not members, description="of an ensemble, in order"
    )
    teacher: Teacher | None = Field(
        default=None, exclude_if=lambda teacher: teacher is None, description="the model it was distilled from"
    )
    config: dict[str, Any] = Field(description="the settings of trainers that made it")
    code_version: str
    num_threads: int = Field(ge=1, description="threads that the golden logits were computed with")
    metrics: dict[str, Any] = Field(default_factory=dict, description="on the splits that fitting may read")
    explanation: dict[str, Any] = Field(default_factory=dict, description="target layer, and how faithful its maps are")

    @property
    def measured(self) -> tuple[str, dict[str, Any]]:
        """The split that the model's own figures are of, and the figures, empty in bundles of other makers.

        The split is val, or calibration for a model that was trained on val.
        """
        split = "val" if "val" not in self.trained_on else "calibration"
        return split, {name: value for name, value in self.metrics.get(split, {}).items() if name != "scores"}

    @model_validator(mode="after")
    def _rule_fits_the_classes(self) -> Self:
        weights = self.operating.decision.weights
        if weights and len(weights) != len(self.taxonomy.codes):
            raise ValueError(f"the decision rule has {len(weights)} weights for {len(self.taxonomy.codes)} classes")
        return self


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were checked against its id."""

    path: Path
    id: str
    document: BundleDocument

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return parameters and buffers by name."""
        return load_file(self.path / WEIGHTS)

    def golden(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return `inputs` (uint8 [N, S, S, 3]) and `logits` (float32 [N, C]) of generated images."""
        return load_file(self.path / GOLDEN)

    def suitability(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the arrays that images are compared with; None if the bundle has none."""
        return load_file(self.path / SUITABILITY) if (self.path / SUITABILITY).is_file() else None


def write_bundle(
    store: Store,
    document: BundleDocument,
    weights: Mapping[str, np.ndarray[Any, Any]],
    golden: Mapping[str, np.ndarray[Any, Any]],
    suitability: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Bundle:
    """Write a bundle under the home folder, without registering it; see `write_bundle_in`."""
    return write_bundle_in(store.home.bundles, document, weights, golden, suitability)


def write_bundle_in(
    bundles: Path,
    document: BundleDocument,
    weights: Mapping[str, np.ndarray[Any, Any]],
    golden: Mapping[str, np.ndarray[Any, Any]],
    suitability: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Bundle:
    """Write a bundle into a folder, as a folder named by its id.

    Args:
        bundles: exists.
        document: content of bundle.json.
        weights: parameters and buffers by name.
        golden: `inputs` (uint8 [N, S, S, 3]) and `logits` (float32 [N, C]).
        suitability: arrays that belong to `document.suitability`; None if that is None.
    Returns:
        The bundle; writing the same content again gives the same bundle.
    Raises:
        ContractError: the document holds a number that is not finite, or its `suitability` has no arrays.
        IntegrityError: the bundle exists already and was altered.
        UnavailableError: it cannot be written; nothing is left of it then.
    """
    if (document.suitability is None) != (suitability is None):
        raise ContractError("a bundle holds the limits and the arrays of suitability, or neither")
    try:
        text = json.dumps(document.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise ContractError(f"the bundle's document cannot be written as JSON: {error}") from error
    # Written under a hidden name and renamed when complete: the id is known only then, and no reader sees a part.
    with _writing(), building(bundles) as temporary:
        (temporary / DOCUMENT).write_text(text + "\n")
        save_file(_contiguous(weights), temporary / WEIGHTS)
        save_file(_contiguous(golden), temporary / GOLDEN)
        if suitability is not None:
            save_file(_contiguous(suitability), temporary / SUITABILITY)
        bundle_id = content_id(temporary)
        final = bundles / bundle_id
        # If another process wrote the same bundle first, that one is kept and checked below.
        place(temporary, final)
    return read_bundle(final, bundle_id)


def _contiguous(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    # safetensors writes the buffer as it lies in memory. ascontiguousarray would give a scalar a dimension.
    return {name: np.asarray(value, order="C") for name, value in arrays.items()}


@contextmanager
def _writing() -> Generator[None]:
    try:
        yield
    except SafetensorError as error:  # safetensors reports a full disk as an error of its own
        raise UnavailableError(f"a bundle cannot be written ({error}); free some space") from error


def read_bundle(path: Path, expected_id: str | None = None) -> Bundle:
    """Open a bundle and check it against its id.

    Args:
        path: its folder.
        expected_id: the id it must have; by default the folder's name, if that is an id.
    Returns:
        The bundle.
    Raises:
        UnknownIdError: the folder is not a bundle.
        IntegrityError: a file is missing, truncated or altered.
    """
    if not (path / DOCUMENT).is_file():
        raise UnknownIdError(f"{str(path)!r} is not a model bundle: it has no {DOCUMENT}")
    named = path.name if len(path.name) == 64 else None
    expected = expected_id or named
    actual = content_id(path)
    if expected is not None and actual != expected:
        raise IntegrityError(f"bundle {expected[:12]} was altered: its files hash to {actual[:12]}")
    try:
        document = BundleDocument.model_validate_json((path / DOCUMENT).read_text())
        # The id only says that the bytes are as written; loading says that they were right when written.
        for name in (WEIGHTS, GOLDEN, *_optional(path)):
            load_file(path / name)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise IntegrityError(f"bundle {actual[:12]} cannot be read: {field or DOCUMENT}: {reason}") from error
    except (SafetensorError, UnicodeDecodeError) as error:
        raise IntegrityError(f"bundle {actual[:12]} cannot be read: {str(error).splitlines()[0]}") from error
    if document.taxonomy.hash != document.taxonomy_hash:
        raise IntegrityError(f"bundle {actual[:12]} names a taxonomy hash that its taxonomy does not have")
    if (document.suitability is None) == bool(_optional(path)):
        raise IntegrityError(f"bundle {actual[:12]} holds {DOCUMENT} and {SUITABILITY} that do not belong together")
    return Bundle(path, actual, document)


def content_id(path: Path) -> str:
    """Return the id of a bundle's files: the hash over the files' hashes in fixed order, 64 hex characters.

    A missing file raises IntegrityError.
    """
    parts = []
    for name in (DOCUMENT, WEIGHTS, GOLDEN, *_optional(path)):
        if not (path / name).is_file():
            raise IntegrityError(f"bundle {str(path)!r} is incomplete: {name} is missing")
        # Hashes of files, not of their bytes joined: moving bytes between two files has to change the id.
        parts.append(f"{name}:{sha256_hex((path / name).read_bytes())}")
    return sha256_hex("\n".join(parts).encode())


def _optional(path: Path) -> tuple[str, ...]:
    return (SUITABILITY,) if (path / SUITABILITY).is_file() else ()
