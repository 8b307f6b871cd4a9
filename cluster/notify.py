"""Telling people that a round ended, waits for a person, or failed: one POST to a receiver that the operator names.

The body is JSON whose `text` is one sentence, which chat systems show as it is; the other fields are for programs. A
receiver that does not answer changes nothing about the round. A process that is killed tells nothing: whoever goes
on with its round does.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from cluster.gate import Verdict
from cluster.settings import RoundSettings
from records.types import ModelStatus, RoundRecord

TIMEOUT_S = 10.0
Announce = Callable[[RoundRecord, dict[str, dict[str, Any]]], None]

logger = logging.getLogger(__name__)


@contextmanager
def announced(settings: RoundSettings, number: int) -> Iterator[Announce]:
    """Tell the receiver of `round.notify_url` how a round ends.

    Args:
        settings: of the round; without a receiver nothing is sent.
        number: of the round.
    Yields:
        To be called with the finished round and its steps' results. An error that leaves the block
        is told, and goes on.
    """

    def ended(record: RoundRecord, results: dict[str, dict[str, Any]]) -> None:
        rollout = results.get("rollout", {})
        waits = record.verdict == Verdict.PROMOTE and rollout.get("status") == ModelStatus.CANDIDATE
        model_id = record.model_id or ""
        text = f"Relook round {number} ended: {record.verdict}, {rollout.get('text', 'nothing changed')}"
        if waits:
            text += f"; it waits for a person: relook promote {model_id[:12]}"
        body = {"verdict": record.verdict, "why": record.why, "model_id": model_id, "dataset_id": record.dataset_id}
        _send(settings, {"event": "round.waits" if waits else "round.ended", "round": number, "text": text, **body})

    try:
        yield ended
    except Exception as error:
        text = f"Relook round {number} failed: {error}"
        _send(settings, {"event": "round.failed", "round": number, "text": text, "error": type(error).__name__})
        raise


def _send(settings: RoundSettings, body: dict[str, Any]) -> None:
    if settings.notify_url is None:
        return
    try:
        # The address itself may be the receiver's secret, so it is in no message.
        httpx.post(settings.notify_url.get_secret_value(), json=body, timeout=TIMEOUT_S).raise_for_status()
    except httpx.HTTPStatusError as error:
        logger.warning("the receiver of round.notify_url answered %s to %s", error.response.status_code, body["event"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning("the receiver of round.notify_url was not told of %s: %s", body["event"], type(error).__name__)
