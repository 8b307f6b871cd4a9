"""Model card and data sheet of a model, filled from what is stored about it; nothing is measured or guessed.

In: a store and a bundle. Out: a `ModelCard`, and its Markdown. Figures are those of the round that made the model, of
the bundle, and of the report beside it, each with its source. What is not stored is listed under `missing`, with what
would bring it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from shlex import quote
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.provenance import stored_test_figures
from images.export import SourceOfImages, sources_of
from records.bundles import Bundle, BundleDocument, PointName, Rule
from records.datasets import DatasetVersion, load_dataset
from records.frames import Crop, Frame
from records.settings import first_problem
from records.store import Store, find_images
from records.types import LABEL_RANK, DatasetRecord, Image, ModelRecord, Split
from trainers.evaluation.figures import Evaluation, Interval
from trainers.evaluation.report.words import POINT_WORDS, RULE_WORDS, warnings_of
from trainers.evaluation.report.write import METRICS
from trainers.fitting.run import REPORT

INTENDED_USE = (
    "Decision support for research on images of the classes below: it proposes a class with its uncertainty, and "
    "refers doubtful images to a person.",
    "For users who can judge such images without it. A person makes every decision about a patient.",
    "It makes no diagnosis, is no medical device, and no authority has cleared or approved it.",
)
"""`docs/quality/intended-use.md` says the same at length."""

_TRAITS = {
    "lesion": "lesion_id",
    "patient": "patient_hash",
    "age": "age_years",
    "sex": "sex",
    "body site": "localization",
    "device": "device",
    "institution": "site",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=(), allow_inf_nan=False)


class StoredFigures(_Part):
    """An evaluation, and where it was found."""

    source: str
    evaluation: Evaluation


class DataSheet(_Part):
    """The dataset version that a model was made with, as far as it may still be read."""

    dataset_id: str
    images_when_made: int = Field(description="images of the version when it was built")
    images: int = Field(description="the same without those that were erased, or whose consent was lowered, since")
    groups: int = Field(description="groups of the images that are left")
    splits: dict[str, dict[str, int]] = Field(description="split to class code to images")
    confirmations: dict[str, int] = Field(description="how the diagnosis was established")
    label_sources: dict[str, int]
    consent: dict[str, int]
    sources: list[SourceOfImages] = Field(description="imports with the licence that each source stated")
    known: dict[str, int] = Field(description="what is known about an image to the images of which it is known")


class ModelCard(_Part):
    """What may be said about a model from what is stored."""

    model_id: str
    status: str | None = Field(description="null if the model is not registered in this home")
    architecture: str
    side_px: int
    crop: Crop
    taxonomy: str
    classes: dict[str, str] = Field(description="code to name, in class order")
    malignant: list[str]
    parent_model_id: str | None
    starting_weights: str | None = Field(description="random, or the source of pretrained ones; null if not stored")
    code_version: str
    rule: Rule = Field(description="which class is the label")
    point: PointName = Field(description="how the thresholds of `refer` were chosen")
    refer: dict[str, float] = Field(description="key class to the calibrated probability from which it is referred")
    intended_use: list[str]
    figures: list[StoredFigures]
    data: DataSheet | None
    limits: list[str]
    missing: list[str]


def model_card(store: Store, bundle: Bundle) -> ModelCard:
    """Fill the card of a model from ledger and bundle; images are not read, and no split is looked at.

    Args:
        store: with the model's dataset version, if it was made here.
        bundle: the model.
    Returns:
        The card.
    Raises:
        IntegrityError: the manifest of the dataset version is missing or was altered.
    """
    document, missing = bundle.document, list[str]()
    with store.ledger.read() as tx:
        record = tx.get(ModelRecord, bundle.id)
    figures = _stored_figures(store, bundle, missing)
    missing += _missing_figures(bundle, figures)
    data = _data_sheet(store, document.dataset_id, missing)
    weights = _starting_weights(document)
    if weights is None and document.parent_model_id is None:
        missing.append("what training started from: the bundle does not say whether its weights were pretrained")
    missing.append("licence of the weights: bundles record none; whoever publishes the model states one")
    return ModelCard(
        model_id=bundle.id,
        status=record.status.value if record else None,
        architecture=document.architecture.name,
        side_px=document.geometry.side_px,
        crop=document.geometry.crop,
        taxonomy=f"{document.taxonomy.name}, version {document.taxonomy.version}",
        classes={one.code: one.name for one in document.taxonomy.classes},
        malignant=list(document.taxonomy.malignant_codes),
        parent_model_id=document.parent_model_id,
        starting_weights=weights,
        code_version=document.code_version,
        rule=document.operating.decision.rule,
        point=document.operating.decision.point,
        refer={code: point.threshold for code, point in document.operating.refer.items()},
        intended_use=list(INTENDED_USE),
        figures=figures,
        data=data,
        limits=_limits(bundle, figures, data),
        missing=missing,
    )


def _starting_weights(document: BundleDocument) -> str | None:
    if document.members:
        listed = ", ".join(f"{member.model_id[:12]} x {member.weight:.3g}" for member in document.members)
        return f"the weights of its members: {listed}"
    training: dict[str, Any] | None = document.metrics.get("training")
    # Bundles that were made elsewhere, or by an earlier version, may say nothing about it.
    if training is None or "weights" not in training:
        return None
    return str(training["weights"]["source"]) if training["weights"] else "random weights"


def _stored_figures(store: Store, bundle: Bundle, missing: list[str]) -> list[StoredFigures]:
    """Collect the evaluations that are stored of a model; what cannot be used is added to `missing`."""
    document, path = bundle.document, bundle.path / REPORT / METRICS
    owner = {"model_id": bundle.id, "dataset_id": document.dataset_id}
    _, own = document.measured
    written: list[tuple[str, Any]] = [
        ("the round that made the model", stored_test_figures(store, bundle.id)),
        ("bundle.json, part of the model's id", owner | own if own else None),
        (f"{REPORT}/{METRICS}, not part of the model's id", path.read_bytes() if path.is_file() else None),
    ]
    found = []
    for source, value in written:
        if value is None:
            continue
        try:
            is_text = isinstance(value, bytes)
            evaluation = Evaluation.model_validate_json(value) if is_text else Evaluation.model_validate(value)
        except ValidationError as error:
            field, reason = first_problem(error)
            missing.append(f"figures of {source}: they cannot be read ({field or METRICS}: {reason})")
            continue
        if evaluation.model_id == bundle.id:
            found.append(StoredFigures(source=source, evaluation=evaluation))
        else:
            missing.append(f"figures of {source}: they are of model {evaluation.model_id[:12]}, and not of this one")
    return found


def _missing_figures(bundle: Bundle, figures: Sequence[StoredFigures]) -> list[str]:
    """Name the measurements that no evaluation holds, each with the call that stores it beside the bundle."""
    evaluations = [one.evaluation for one in figures]
    folder = quote(str(bundle.path))
    call = f"relook evaluate {folder} --split test --report {folder}/{REPORT}"
    found = []
    if not any(one.split == Split.TEST for one in evaluations):
        found.append(f"figures on the test split: none is stored; `{call}` stores them")
    if not any(one.slices for one in evaluations):
        found.append(f"figures by age, sex, body site, confirmation, skin tone: none is stored; `{call}` stores them")
    if not any(one.robustness for one in evaluations):
        found.append(f"figures under attack: none is stored; `{call} --robustness` stores them")
    if not bundle.document.explanation.get("faithfulness") and not any(one.explanations for one in evaluations):
        found.append(f"faithfulness of the heat maps: none is stored; `{call} --explanations` stores it")
    return found


def _data_sheet(store: Store, dataset_id: str, missing: list[str]) -> DataSheet | None:
    with store.ledger.read() as tx:
        record = tx.get(DatasetRecord, dataset_id)
    if record is None:
        missing.append(f"data sheet: dataset version {dataset_id[:12]} is not in this home; make the card where it is")
        return None
    dataset = load_dataset(store, dataset_id)
    images = find_images(store, [str(image_id) for image_id in dataset.rows["image_id"]])
    sources = sources_of(store, images)
    without = sum(source.images for source in sources if not source.licences)
    if without:
        missing.append(
            f"licence of {without} of {len(images)} images: their source stated none; ask where they are from"
        )
    return DataSheet(
        dataset_id=dataset.id,
        images_when_made=record.num_images,
        images=dataset.num_images,
        groups=dataset.num_groups,
        splits=_splits(dataset),
        confirmations=_counted(_confirmation_of(int(rank)) for rank in dataset.rows["label_rank"]),
        label_sources=_counted(str(source).partition(":")[0] for source in dataset.rows["label_source"]),
        consent=_counted(image.consent.value for image in images),
        sources=sources,
        known={name: _known(images, field) for name, field in _TRAITS.items()},
    )


def _splits(dataset: DatasetVersion) -> dict[str, dict[str, int]]:
    return {split.value: _counted(str(label) for label in dataset.split(split)["label"]) for split in Split}


def _confirmation_of(rank: int) -> str:
    names = [confirmation.value for confirmation, its_rank in LABEL_RANK.items() if its_rank == rank]
    return " or ".join(names) or "unknown"


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _known(images: Sequence[Image], field: str) -> int:
    return sum(getattr(image, field) is not None for image in images)


def _limits(bundle: Bundle, figures: Sequence[StoredFigures], data: DataSheet | None) -> list[str]:
    """Return what must be known before the model is used, one sentence each; all of it follows from what is stored."""
    document = bundle.document
    found = []
    for key in document.taxonomy.key_classes:
        point = document.operating.refer.get(key.code)
        if point is None:
            found.append(
                f"{key.code}: the model has no threshold for it, so its floor of {key.sensitivity_floor} is open."
            )
        elif document.operating.decision.point == "target":
            found.append(
                f"{key.code}: it is referred at the point `target`, an estimate of a sensitivity of "
                f"{point.sensitivity_floor} on calibration and val ({point.lesions} lesions); no floor is proven at it."
            )
        elif not point.proven:
            bound = "none" if point.sensitivity_lower_bound is None else f"{point.sensitivity_lower_bound:.3f}"
            found.append(
                f"{key.code}: its floor of {point.sensitivity_floor} is not proven on the calibration split "
                f"({point.lesions} lesions, lower bound {bound})."
            )
    if document.suitability is None:
        found.append("It does not check whether an image is unlike its training images or of poor quality.")
    if data is not None and data.images < data.images_when_made:
        gone = data.images_when_made - data.images
        found.append(
            f"{gone} images it was made with were erased or withdrawn since; it keeps what it learned of them."
        )
    for one in figures:
        said = warnings_of(one.evaluation, document.taxonomy)
        found += [f"On {_where(one.evaluation)}: {sentence}" for sentence in said]
    return list(dict.fromkeys(found))


def _where(evaluation: Evaluation) -> str:
    if evaluation.split is None or evaluation.dataset_id is None:
        return "a folder of labelled images"
    return f"{evaluation.split} of dataset {evaluation.dataset_id[:12]}"


def card_page(card: ModelCard) -> str:
    """Return a card as Markdown."""
    lines = [f"# Model card: {card.architecture} {card.model_id[:12]}", ""]
    lines += _table(
        ("", ""),
        [
            ("model", card.model_id),
            ("status here", card.status or "not registered in this home"),
            (
                "network",
                f"{card.architecture}, {card.side_px} x {card.side_px} pixels of {Frame(card.side_px, card.crop).part}",
            ),
            ("taxonomy", card.taxonomy),
            ("classes", ", ".join(f"{code} ({name})" for code, name in card.classes.items())),
            ("malignant", ", ".join(card.malignant) or "none"),
            ("label", RULE_WORDS[card.rule]),
            ("operating point", POINT_WORDS[card.point]),
            ("referred from", ", ".join(f"{code} {value:.4f}" for code, value in card.refer.items()) or "no threshold"),
            ("trained from", card.parent_model_id or card.starting_weights or "not stored"),
            ("made by", f"Relook {card.code_version}"),
        ],
    )
    lines += ["## Intended use", "", *_listed(card.intended_use), "## Figures", ""]
    lines += ["Intervals are 95 %, by bootstrap over groups, exact where it does not vary.", ""] if card.figures else []
    lines += [] if card.figures else ["No figure is stored.", ""]
    for one in card.figures:
        lines += [f"### On {_where(one.evaluation)}", "", *_figures(one)]
    lines += ["## Limits", "", *_listed(card.limits or ["Nothing that is stored shows one."])]
    lines += ["## Data sheet", "", *(_data_lines(card.data) if card.data else ["Not available here.", ""])]
    lines += ["## What is missing", "", *_listed(card.missing)]
    return "\n".join(lines).rstrip() + "\n"


def _figures(one: StoredFigures) -> list[str]:
    found, why = one.evaluation, one.evaluation.undefined
    key, coverage = found.key_class, found.coverage
    rows = [
        ("balanced accuracy", _figure(found.balanced_accuracy, found.balanced_accuracy_ci)),
        ("accuracy", _figure(found.accuracy, found.accuracy_ci)),
        ("macro F1", _figure(found.macro_f1, found.macro_f1_ci)),
        ("macro AUC", _figure(found.macro_auc, why=why.get("macro_auc"))),
        ("calibration error", _figure(found.ece)),
        ("decided without an annotator", _figure(found.answered_share, why=why.get("answered_share"))),
    ]
    if key is not None:
        rows += [
            (f"{key.name} lesions referred, of {key.lesions}",
             _figure(key.sensitivity, key.sensitivity_ci, why.get("key_class.sensitivity"))),
            (f"other lesions than {key.name} not referred",
             _figure(key.specificity, key.specificity_ci, why.get("key_class.specificity"))),
        ]  # fmt: skip
    if coverage is not None:
        rows.append((f"prediction set contains the class (promised {coverage.promise})", _figure(coverage.overall)))
    reads = "" if found.split_reads is None else f"; read {found.split_reads} times"
    basis = f"{found.images} images, {found.lesions} lesions, {found.groups} groups{reads}. From {one.source}."
    classes = [
        (code, report.support, report.lesions, _figure(report.sensitivity, report.sensitivity_ci),
         _figure(report.specificity, report.specificity_ci), _figure(report.precision, report.precision_ci))
        for code, report in found.per_class.items()
    ]  # fmt: skip
    slices = [
        (field.replace("_", " "), value, part.images, _figure(part.balanced_accuracy, part.balanced_accuracy_ci),
         _figure(part.key_class_sensitivity, part.key_class_sensitivity_ci))
        for field, parts in found.slices.items() for value, part in parts.items()
    ]  # fmt: skip
    lines = [basis, "", *_table(("figure", "value"), rows)]
    lines += _table(("class", "images", "lesions", "sensitivity", "specificity", "precision"), classes)
    head = ("by", "value", "images", "balanced accuracy", "key class referred")
    return lines + (_table(head, slices) if slices else [])


def _data_lines(data: DataSheet) -> list[str]:
    left = f"{data.images} images in {data.groups} groups; {data.images_when_made} when the version was built."
    codes = sorted({code for counts in data.splits.values() for code in counts})
    splits = [(split, sum(counts.values()), *(counts.get(code, 0) for code in codes))
              for split, counts in data.splits.items()]  # fmt: skip
    rows = [
        ("diagnosis established by", _counts(data.confirmations)),
        ("labels from", _counts(data.label_sources)),
        ("consent", _counts(data.consent)),
        ("known of the images", _counts(data.known)),
    ]
    sources = [(one.provenance, one.images, one.reading or "unknown", "; ".join(one.licences) or "none was stated")
               for one in data.sources]  # fmt: skip
    return [
        f"Dataset version {data.dataset_id}. {left}", "",
        *_table(("split", "images", *codes), splits),
        *_table(("", "images"), rows),
        *_table(("source", "images", "read as", "licence that it states"), sources),
        "Relook records what a source states about its licence and checks none.", "",
    ]  # fmt: skip


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"


def _figure(value: float | None, interval: Interval | None = None, why: str | None = None) -> str:
    if value is None:
        return f"undefined: {why}" if why else "undefined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    body = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in (head, *rows)]
    return [body[0], "|" + "---|" * len(head), *body[1:], ""]


def _listed(sentences: Sequence[str]) -> list[str]:
    return [*(f"- {_cell(sentence)}" for sentence in sentences), ""]


def _cell(value: Any) -> str:
    # Names of classes, slices and licences come from outside and must not become structure of the page.
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
