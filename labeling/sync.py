"""Pull and push, one after the other. Each holds the lease, so it never runs twice at the same time."""

import time

from pydantic import BaseModel, ConfigDict, Field

from labeling.client import LabelStudioClient
from labeling.pull import PullReport, pull
from labeling.push import Advance, PushReport, push
from labeling.reads import add_adjudications
from labeling.settings import LabelingSettings
from records.hints import last_ring
from records.ledger import Ledger
from records.store import Store

_LISTEN_EVERY_S = 1.0


class SyncReport(BaseModel):
    """What one pull and one push did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adjudications: int = Field(default=0, ge=0, description="questions added since readers disagree")
    pull: PullReport
    push: PushReport


def sync(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    model_id: str | None = None,
    *,
    advance: Advance = lambda done, total: None,
) -> SyncReport:
    """Pull what was answered and push what waits, once.

    Args:
        store: with the ledger.
        client: connected.
        settings: of the labeling room.
        model_id: of the model that answers now.
        advance: hears how far each half is.
    Returns:
        What was done.
    Raises:
        LabelStudioError: Label Studio does not answer; what was done so far is recorded.
        RefusedError: another process keeps pushing or pulling for over a minute.
    """
    # In this order, since a pull may find that questions have to be asked again.
    pulled = pull(store, client, settings, advance=advance)
    asked = add_adjudications(store, settings.adjudicate_below) if not pulled.idle else 0
    return SyncReport(adjudications=asked, pull=pulled, push=push(store, client, settings, model_id, advance=advance))


def wait_for_notification(ledger: Ledger, rung: str | None, longest_s: float) -> bool:
    """Wait until Label Studio rings, and no longer than a pause.

    Args:
        ledger: that the service writes rings to.
        rung: the last ring that was acted upon.
        longest_s: of the wait, seconds.
    Returns:
        Whether it rang.
    """
    end_s = time.monotonic() + longest_s
    while last_ring(ledger) == rung:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(left_s, _LISTEN_EVERY_S))
    return True
