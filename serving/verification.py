"""Do models still answer as they did when they were made? After an upgrade of torch or of the machine, say.

In: registered models. Out: for each whether its bundle is whole and its golden images get the stored logits. The
same check stands before a model that is to answer: a service whose model fails it does not become ready.
"""

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from records.errors import IntegrityError, UnknownIdError
from records.models import registered_bundle
from records.store import Store
from records.types import ModelRecord
from vision.inference.loaded import load_model
from vision.precision import PrecisionChoice


class VerifiedModel(BaseModel):
    """What came of checking one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    status: str
    precision: str | None = Field(description="it computed in; null if it could not be loaded")
    golden_difference: float | None = Field(description="largest difference of a golden logit; null if it is not whole")
    problem: str | None = Field(description="one sentence; null if all is well")


def verify_models(
    store: Store,
    records: Sequence[ModelRecord],
    precision: PrecisionChoice,
    on_done: Callable[[], None] = lambda: None,
) -> list[VerifiedModel]:
    """Let models answer their golden images again.

    Args:
        store: that knows where their bundles are.
        records: of the models.
        precision: that they would be served in.
        on_done: hears of each.
    Returns:
        One result per model, in order; what is wrong with one does not keep the next from being checked.
    """
    found = []
    for record in records:
        found.append(_verify(store, record, precision))
        on_done()
    return found


def _verify(store: Store, record: ModelRecord, precision: PrecisionChoice) -> VerifiedModel:
    computed_in, difference, problem = None, None, None
    try:
        model = load_model(registered_bundle(store, record), precision=precision)
        computed_in = model.precision
        difference = model.check_golden()
    except (IntegrityError, UnknownIdError) as error:
        problem = str(error)
    return VerifiedModel(
        id=record.id, status=record.status, precision=computed_in, golden_difference=difference, problem=problem
    )
