"""One sync: pull, then add adjudications, then push. Pull and push each hold the lease `labeling.sync`."""

import time

from pydantic import BaseModel, ConfigDict, Field

from labeling.cases import CaseSource
from labeling.client import LabelStudioClient
from labeling.pull import PullReport, pull
from labeling.push import Advance, PushReport, push
from labeling.reads import add_adjudications
from labeling.settings import LabelingSettings
from records.ledger import Ledger
from records.notifications import last_notification
from records.store import Store

_LISTEN_EVERY_S = 1.0


class SyncReport(BaseModel):
    """What one pull and one push did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adjudications: int = Field(default=0, ge=0, description="review items added since annotators disagree")
    pull: PullReport
    push: PushReport


def sync(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    model_id: str | None = None,
    *,
    advance: Advance = lambda done, total: None,
    moved: bool = False,
    cases: CaseSource | None = None,
) -> SyncReport:
    """Pull new annotations and push waiting review items, once.

    Args:
        store: its ledger holds both.
        client: connected.
        settings: also says when annotators disagree enough for an adjudication.
        model_id: of the champion.
        advance: called by both halves.
        moved: whether to send open review items again that are not at this address.
        cases: finds the confirmed cases that tasks show; None shows none.
    Returns:
        Both reports.
    Raises:
        LabelStudioError: Label Studio cannot be reached; what was done so far is recorded.
        RefusedError: another process held the lease for over a minute, or review items are open at an old address.
    """
    # Pull first: it requeues the items of deleted projects and finds disagreement, and the push then sends both.
    pulled = pull(store, client, settings, advance=advance, moved=moved)
    added = add_adjudications(store, settings.adjudicate_below) if not pulled.idle else 0
    pushed = push(store, client, settings, model_id, advance=advance, cases=cases)
    return SyncReport(adjudications=added, pull=pulled, push=pushed)


def wait_for_notification(ledger: Ledger, seen: str | None, longest_s: float) -> bool:
    """Wait for a webhook of Label Studio.

    Args:
        ledger: to which the service writes notifications.
        seen: id of the newest notification that was handled; read it before the sync, so that one which arrives
            during the sync ends the wait at once.
        longest_s: timeout, seconds.
    Returns:
        False after the timeout.
    """
    end_s = time.monotonic() + longest_s
    # Polled, since the service is another process and may run on another machine: the ledger is all they share.
    while last_notification(ledger) == seen:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(left_s, _LISTEN_EVERY_S))
    return True
