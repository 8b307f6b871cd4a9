"""What the labels bought: bodies of `GET /v1/labels/value`, read as `relook labels value` kept it.

In: a store. Out: a body. Nothing is computed anew.
"""

from pydantic import AwareDatetime, Field, FiniteFloat

from records.errors import UnknownIdError
from records.store import Store
from records.types import LabelValueRecord
from serving.schemas import Body


class MeasuredFigure(Body):
    """A figure with its 95 % interval; null where there was nothing to measure it on."""

    value: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None


class ClassValueInfo(Body):
    """What the labels of one class bought."""

    code: str
    labels: int = Field(ge=0, description="training images with this label")
    lesions_on_val: int = Field(ge=0, description="that the recall is measured on")
    recall: MeasuredFigure
    gain_of_next: MeasuredFigure | None = Field(description="of the recall, by 100 more labels of the class")
    lacks_labels: bool = Field(description="the interval of that gain lies above 0, or the class has no label")


class RoundValueInfo(Body):
    """What the annotations of the last round changed."""

    number: int = Field(ge=1)
    new: int = Field(ge=0, description="training images that had no label before")
    changed: dict[str, int] = Field(description='training images by "label before -> label now"')
    gain: MeasuredFigure = Field(description="of balanced accuracy on val, with these labels against without")
    recall_gain: dict[str, MeasuredFigure]
    set_right: int = Field(ge=0, description="images of val that are decided right only with them")
    set_wrong: int = Field(ge=0, description="images of val that are decided right only without them")


class LabelValueInfo(Body):
    """What the labels of a dataset version bought, measured on val by heads over a model's features."""

    created_at: AwareDatetime
    dataset_id: str
    model_id: str
    labels: int = Field(ge=0, description="training images")
    curve: list[tuple[int, MeasuredFigure]] = Field(description="(labels, balanced accuracy at equal class shares)")
    gain_of_next: MeasuredFigure = Field(description="of balanced accuracy, by the next 100 labels")
    checked: tuple[MeasuredFigure, FiniteFloat] | None = Field(
        description="(predicted from half of the labels, found with all of them)"
    )
    classes: list[ClassValueInfo]
    last_round: RoundValueInfo | None = Field(description="null if no label came from an annotator")


def label_value(store: Store) -> LabelValueInfo:
    """Return the newest result; UnknownIdError if nothing was measured yet."""
    with store.ledger.read() as tx:
        found = tx.find(LabelValueRecord, order_by=("-created_at", "-id"), limit=1)
    if not found:
        raise UnknownIdError("what the labels bought was not measured yet; run `relook labels value`")
    (record,) = found
    return LabelValueInfo(**record.model_dump(exclude={"id", "figures"}), **record.figures)
