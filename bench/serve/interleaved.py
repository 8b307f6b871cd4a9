"""Predict, explain and flag calls in a drawn order: each must say the same alone and beside fifteen others.

In: a running service and images. Out: what every call was answered, without what names one answer (ids and
times). The same seed draws the same calls, so one list can be asked one at a time and again all together.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from records.errors import ContractError
from records.ledger import Transaction
from records.types import Flag, FlagReason, Prediction, ReviewItem
from serving.client import Client
from serving.schemas import FlagRequest

Kind = Literal["predict", "explain", "flag"]

METHODS = (*["gradcam"] * 12, "occlusion", "integrated_gradients", "gradient_shap")
"""Drawn evenly; Grad-CAM is what is asked for most, and the others take seconds."""
TOLERANCE = 1e-6
"""A batch in fp32 may round otherwise than one image alone; in bf16 nothing differed on any machine so far."""
_ONE_ANSWER = {"id", "request_id", "created_at", "review"}


@dataclass(frozen=True)
class Call:
    """One call to make.

    Args:
        kind: what is asked.
        image: number of the image, or of the answer that it is about.
        choice: explain: the method; flag: the reason; predict: whether a map comes along.
        code: a class.
    """

    kind: Kind
    image: int
    choice: str
    code: str


@dataclass(frozen=True)
class Said:
    """What a call was answered.

    Args:
        id: of the stored answer or objection; empty for a map, which is not stored.
        body: everything that must not depend on what else is under way.
    """

    id: str
    body: dict[str, Any]


def draw_calls(seed: int, num_calls: int, num_images: int, codes: Sequence[str]) -> list[Call]:
    """Draw calls of the three kinds, as many of each, in a drawn order.

    Args:
        seed: of the draw.
        num_calls: how many.
        num_images: images are numbered from 0 below it.
        codes: of the classes.
    Returns:
        The calls.
    """
    draw = random.Random(seed)
    choices: dict[Kind, Sequence[str]] = {"predict": ("", "gradcam"), "explain": METHODS, "flag": tuple(FlagReason)}
    kinds = list(choices)
    calls = []
    for number in range(num_calls):
        kind = kinds[number % 3]
        calls.append(Call(kind, draw.randrange(num_images), str(draw.choice(choices[kind])), draw.choice(codes)))
    draw.shuffle(calls)
    return calls


def ask_all(
    url: str, calls: Sequence[Call], image: Callable[[int], bytes], answers: Sequence[str], threads: int, tag: str
) -> list[Said]:
    """Make all calls.

    Args:
        url: of the service.
        calls: to make.
        image: by its number.
        answers: ids of the stored answers that explain and flag calls are about.
        threads: calls under way at once; 1 makes one at a time, in order.
        tag: written into every objection, so that no other run's is the same.
    Returns:
        What was answered, in the order of the calls.
    """
    with Client(url, timeout_s=600.0, retry_s=1800.0) as client, ThreadPoolExecutor(threads) as pool:

        def ask(number: int) -> Said:
            return _asked(client, calls[number], image, answers, f"{tag} {number}")

        return list(pool.map(ask, range(len(calls))))


def _asked(client: Client, call: Call, image: Callable[[int], bytes], answers: Sequence[str], comment: str) -> Said:
    if call.kind == "predict":
        answer = client.predict(image(call.image), explain="gradcam" if call.choice else None)
        return Said(answer.id, answer.model_dump(mode="json", exclude=_ONE_ANSWER))
    if call.kind == "explain":
        found = client.explanation(answers[call.image], method=call.choice, target=call.code)
        return Said("", found.model_dump(mode="json"))
    request = FlagRequest(reason=FlagReason(call.choice), suggested_label=call.code, comment=comment)
    flag = client.flag(answers[call.image], request)
    return Said(flag.id, {"state": flag.review.state, "text": flag.text, "prediction": flag.prediction_id})


def differing(alone: Sequence[Said], together: Sequence[Said], *, exactly: bool) -> list[int]:
    """Compare what calls were answered in two runs.

    Args:
        alone: [N] one at a time.
        together: [N] the same calls, all at once.
        exactly: to the last bit; else numbers within `TOLERANCE`, and drawings are not looked at.
    Returns:
        The numbers of the calls that were answered otherwise.
    """
    pairs = zip(alone, together, strict=True)
    return [n for n, (a, b) in enumerate(pairs) if not (a.body == b.body if exactly else _near(a.body, b.body))]


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_near(one[k], other[k]) for k in one if k != "png_base64")
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_near, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE * max(1.0, abs(one))
    return bool(one == other)


def stored_once(tx: Transaction, calls: Sequence[Call], said: Sequence[Said], tag: str) -> dict[str, int]:
    """Find what the calls left in the ledger; maps leave nothing.

    Args:
        tx: a transaction that reads.
        calls: [N].
        said: [N].
        tag: of the run.
    Returns:
        How many answers and objections there are.
    Raises:
        ContractError: one is missing, there twice, or says something else than was answered.
    """
    predicted = [s for c, s in zip(calls, said, strict=True) if c.kind == "predict"]
    rows = {row.id: row for row in tx.find(Prediction, where={"id": [s.id for s in predicted]})}
    if len(rows) != len(predicted) or any(rows[s.id].probabilities != s.body["probabilities"] for s in predicted):
        raise ContractError(f"{len(predicted)} answers were given and {len(rows)} are in the ledger, or others")
    flagged = {s.id: f"{tag} {n}" for n, (c, s) in enumerate(zip(calls, said, strict=True)) if c.kind == "flag"}
    flags = [flag for flag in tx.find(Flag) if (flag.comment or "").startswith(f"{tag} ")]
    if {flag.id: flag.comment for flag in flags} != flagged:
        raise ContractError(f"{len(flagged)} objections were accepted and {len(flags)} are in the ledger, or others")
    asked = {item.id: (item.comment or "").splitlines() for item in tx.find(ReviewItem)}
    if any(asked[flag.review_item_id].count(flag.comment or "") != 1 for flag in flags):
        raise ContractError("an objection is not once in the question that it raised")
    return {"answers": len(rows), "objections": len(flags)}
