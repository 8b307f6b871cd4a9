"""How sure an answer is, in words: how often such scores were right, and what the set of classes means.

In: figures of the calibration split, which neither training nor calibration saw. Out: sentences. They say how often,
and what that rests on; never that an image or a person has nothing to fear.
"""

from collections.abc import Mapping, Sequence

from serving.schemas_registry import ModelDetails, ScoreBand

FEW_LESIONS = 20
NOT_KNOWN = "How often scores like this one were right is not known for this model."


def scores_text(confidence: float, scores: Sequence[ScoreBand]) -> str:
    """Say how often answers of about this score were right.

    Args:
        confidence: probability of the most likely class.
        scores: bands of the calibration split.
    Returns:
        One or two sentences.
    """
    if not scores:
        return NOT_KNOWN
    band = next((b for b in scores if b.low <= confidence < b.high or confidence == b.high == 1.0), None)
    if band is None:
        return "No calibration image had a score like this one, so how often such scores are right is not known."
    low, high = (100 * end for end in band.right_ci)
    few = f" {band.lesions} are few, so this says little." if band.lesions < FEW_LESIONS else ""
    return (
        f"Of {band.lesions} lesions of the calibration data with a score from {100 * band.low:.0f} to "
        f"{100 * band.high:.0f} %, the most likely class was the right one for {band.right}: "
        f"{100 * band.right / band.lesions:.0f} % (95 % interval {low:.0f} to {high:.0f} %).{few}"
    )


def set_text(prediction_set: Sequence[str], names: Mapping[str, str], details: ModelDetails | None) -> str:
    """Say what the set of classes means.

    Args:
        prediction_set: class codes that cannot be excluded.
        names: class code to name.
        details: of the model that answered, or None if nothing is known of it.
    Returns:
        Some sentences.
    """
    held = ", ".join(names.get(code, code) for code in prediction_set)
    if not prediction_set:
        return "No class looks the way it did on the calibration data: the image is unlike what the model knows."
    is_one = len(prediction_set) == 1
    begun = f"{'One class' if is_one else f'{len(prediction_set)} classes'} cannot be excluded: {held}."
    if details is None:
        return begun
    share = f"{100 * details.promise:.0f} of 100"
    pooled = [names.get(code, code) for code in details.pooled_classes]
    few = "every class" if len(pooled) == len(names) else ", ".join(pooled)
    together = f" Few lesions were there for {few}: for these it holds taken together." if pooled else ""
    return (
        f"{begun} Such a set is made to hold the true class for at least {share} images of each class, if images "
        f"are like those of calibration. A class outside it is unlikely, not ruled out.{together}"
    )
