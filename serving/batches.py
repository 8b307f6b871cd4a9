"""What became of several images that were sent together."""

from collections.abc import Sequence

from records.taxonomy import Taxonomy
from records.types import Decision, Prediction
from serving.messages import StoredPrediction
from serving.problems import problem_of
from serving.responses import prediction_body
from serving.schemas import BatchItem, BatchResponse, Context, LesionSummary

CAUTION: dict[Decision, int] = {
    Decision.ANSWERED: 0,
    Decision.RETAKE: 1,
    Decision.REVIEW: 2,
    Decision.URGENT: 3,
}
"""How cautious a decision is; of two the larger one counts."""


def batch_body(
    found: Sequence[StoredPrediction | BaseException], contexts: Sequence[Context], taxonomy: Taxonomy
) -> BatchResponse:
    """Put the answers of a batch together.

    Args:
        found: an answer or an error per image.
        contexts: of the images, in the same order.
        taxonomy: of the answers.
    Returns:
        The body; images of one lesion are summed up by the most cautious decision among them.
    """
    items = []
    lesions: dict[str, list[Prediction]] = {}
    for outcome, context in zip(found, contexts, strict=True):
        if isinstance(outcome, BaseException):
            items.append(BatchItem(answer=None, problem=problem_of(outcome)))
            continue
        items.append(
            BatchItem(answer=prediction_body(outcome.prediction, outcome.review, None, taxonomy), problem=None)
        )
        if context.lesion_id is not None:
            lesions.setdefault(context.lesion_id, []).append(outcome.prediction)
    summaries = [
        LesionSummary(
            lesion_id=lesion_id,
            decision=max((p.decision for p in predictions), key=CAUTION.__getitem__),
            prediction_ids=[p.id for p in predictions],
        )
        for lesion_id, predictions in lesions.items()
    ]
    return BatchResponse(items=items, lesions=summaries)
