"""Predict, explain and flag calls in random order: each must get the same response alone and among fifteen others.

In: a running service and images. Out: the body of every response without ids and times. The same seed draws the same
calls, so one list can be sent one call at a time and again concurrently.
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
"""Drawn evenly; Grad-CAM is requested most, and the others take seconds."""
TOLERANCE = 1e-6
"""A batch in fp32 may round differently than one image alone; in bf16 no difference was seen on any machine so far."""
_PER_RESPONSE = {"id", "request_id", "created_at", "review"}


@dataclass(frozen=True)
class Call:
    """One call to make.

    Args:
        kind: which route.
        image: number of the image, or of the prediction that it is about.
        choice: explain: the method; flag: the reason; predict: whether a map comes along.
        code: a class.
    """

    kind: Kind
    image: int
    choice: str
    code: str


@dataclass(frozen=True)
class Outcome:
    """The response to a call.

    Args:
        id: of the stored prediction or flag; empty for a map, which is not stored.
        body: everything that must not depend on concurrent requests.
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
    url: str, calls: Sequence[Call], image: Callable[[int], bytes], predictions: Sequence[str], threads: int, tag: str
) -> list[Outcome]:
    """Make all calls.

    Args:
        url: of the service.
        calls: to make.
        image: by its number.
        predictions: ids of the stored predictions that explain and flag calls are about.
        threads: calls under way at once; 1 makes one at a time, in order.
        tag: written into every flag, so that it differs from those of other runs.
    Returns:
        The responses, in the order of the calls.
    """
    with Client(url, timeout_s=600.0, retry_s=1800.0) as client, ThreadPoolExecutor(threads) as pool:

        def ask(number: int) -> Outcome:
            return _send(client, calls[number], image, predictions, f"{tag} {number}")

        return list(pool.map(ask, range(len(calls))))


def _send(
    client: Client, call: Call, image: Callable[[int], bytes], predictions: Sequence[str], comment: str
) -> Outcome:
    if call.kind == "predict":
        response = client.predict(image(call.image), explain="gradcam" if call.choice else None)
        return Outcome(response.id, response.model_dump(mode="json", exclude=_PER_RESPONSE))
    if call.kind == "explain":
        found = client.explanation(predictions[call.image], method=call.choice, target=call.code)
        return Outcome("", found.model_dump(mode="json"))
    request = FlagRequest(reason=FlagReason(call.choice), suggested_label=call.code, comment=comment)
    flag = client.flag(predictions[call.image], request)
    return Outcome(flag.id, {"state": flag.review.state, "text": flag.text, "prediction": flag.prediction_id})


def differing(alone: Sequence[Outcome], together: Sequence[Outcome], *, exactly: bool) -> list[int]:
    """Compare the responses of two runs.

    Args:
        alone: [N] one at a time.
        together: [N] the same calls, all at once.
        exactly: to the last bit; else numbers within `TOLERANCE`, and drawings are not compared.
    Returns:
        The numbers of the calls whose responses differ.
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


def stored_once(tx: Transaction, calls: Sequence[Call], outcomes: Sequence[Outcome], tag: str) -> dict[str, int]:
    """Find what the calls left in the ledger; maps leave nothing.

    Args:
        tx: a transaction that reads.
        calls: [N].
        outcomes: [N].
        tag: of the run.
    Returns:
        Numbers of predictions and flags.
    Raises:
        ContractError: one is missing, there twice, or differs from its response.
    """
    predicted = [s for c, s in zip(calls, outcomes, strict=True) if c.kind == "predict"]
    rows = {row.id: row for row in tx.find(Prediction, where={"id": [s.id for s in predicted]})}
    if len(rows) != len(predicted) or any(rows[s.id].probabilities != s.body["probabilities"] for s in predicted):
        raise ContractError(f"{len(predicted)} predictions were returned and {len(rows)} are in the ledger, or others")
    flagged = {s.id: f"{tag} {n}" for n, (c, s) in enumerate(zip(calls, outcomes, strict=True)) if c.kind == "flag"}
    flags = [flag for flag in tx.find(Flag) if (flag.comment or "").startswith(f"{tag} ")]
    if {flag.id: flag.comment for flag in flags} != flagged:
        raise ContractError(f"{len(flagged)} flags were accepted and {len(flags)} are in the ledger, or others")
    comments = {item.id: (item.comment or "").splitlines() for item in tx.find(ReviewItem)}
    if any(comments[flag.review_item_id].count(flag.comment or "") != 1 for flag in flags):
        raise ContractError("a flag is not exactly once in its review item")
    return {"predictions": len(rows), "flags": len(flags)}
