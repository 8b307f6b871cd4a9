"""Notifications that a round ended, waits for approval, or failed: one POST to `round.notify_url`.

The body is JSON; its `text` is a sentence that chat systems can show, the other fields are for programs. A
receiver that fails does not affect the round. A killed process sends nothing; the process that resumes its
round does.
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
NotifyEnd = Callable[[RoundRecord, dict[str, dict[str, Any]]], None]

logger = logging.getLogger(__name__)


@contextmanager
def notifying(settings: RoundSettings, number: int) -> Iterator[NotifyEnd]:
    """Notify `round.notify_url` of the end of a round, and of an error that leaves the block.

    Args:
        settings: without `notify_url` nothing is sent.
        number: of the round.
    Yields:
        A function to call with the finished round and the results of its steps.
    """

    def ended(record: RoundRecord, results: dict[str, dict[str, Any]]) -> None:
        rollout = results.get("rollout", {})
        waits = record.verdict == Verdict.PROMOTE and rollout.get("status") == ModelStatus.CANDIDATE
        model_id = record.model_id or ""
        text = f"Relook round {number} ended: {record.verdict}, {rollout.get('text', 'nothing changed')}"
        if waits:
            text += f"; it waits for approval: relook promote {model_id[:12]}"
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
        # The address is often the secret of the receiver, as with chat webhooks, so no message contains it.
        httpx.post(settings.notify_url.get_secret_value(), json=body, timeout=TIMEOUT_S).raise_for_status()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        logger.warning("the receiver of round.notify_url responded with %s to %s", status, body["event"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning("the receiver of round.notify_url did not get %s: %s", body["event"], type(error).__name__)
