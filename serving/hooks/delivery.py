"""Signed outbound hooks: events of `/v1/events`, sent to the addresses that an administrator has set.

In: events of the ledger. Out: POST requests, one per event, in the order of the events, each until it is accepted. The
position of a hook is in the ledger, so a restart continues there, and a lease lets one replica deliver at a time: an
event is delivered at least once, and twice only if a process ends between the response and the note of it.
"""

import hmac
import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Self

from records import lease
from records.cursors import set_position
from records.errors import RefusedError, RelookError, UnavailableError
from records.home import Home
from records.ids import new_id, utc_now
from records.keys import key_file
from records.store import Store
from records.types import Cursor
from serving.events import events_of, last_event_id
from serving.hooks.requests import post
from serving.hooks.settings import HookSettings

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""How often a hook looks for events, seconds."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 900.0
"""Wait after a failed delivery; it doubles with each further one, seconds."""
MANY_FAILURES = 3
"""Deliveries that fail in a row before the hook is reported."""
AT_ONCE = 100
STOP_S = 1.0
"""How long a stop waits for requests that are under way, seconds."""
SIGNATURE_HEADER, EVENT_HEADER = "X-Relook-Signature", "X-Relook-Event"


@dataclass(frozen=True, slots=True)
class HookState:
    """Where a hook stands."""

    after: str | None = None
    """id of the last event that was delivered, or of the last one before the hook was set"""
    failures: int = 0
    """deliveries that failed since the last one that was accepted"""
    failing_since: datetime | None = None
    error: str | None = None
    tried_at: datetime | None = None

    @property
    def is_dead(self) -> bool:
        """Whether so many deliveries failed in a row that a person should look."""
        return self.failures >= MANY_FAILURES

    @property
    def pause_s(self) -> float:
        """How long after the last attempt the next one is made, seconds."""
        return min(FIRST_PAUSE_S * 2 ** min(self.failures - 1, 20), LONGEST_PAUSE_S) if self.failures else 0.0

    @classmethod
    def of(cls, position: dict[str, Any]) -> Self:
        """Return the state that a cursor holds."""
        times = {name: position[name] and datetime.fromisoformat(position[name]) for name in _TIMES}
        return cls(**{**position, **times})

    def position(self) -> dict[str, Any]:
        """Return the state as a cursor holds it."""
        plain = {name: getattr(self, name) for name in ("after", "failures", "error")}
        return plain | {name: (at := getattr(self, name)) and at.isoformat() for name in _TIMES}


_TIMES = ("failing_since", "tried_at")


def state_of(store: Store, hook: HookSettings) -> HookState:
    """Return where a hook stands; a hook that was never tried has no position."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, _cursor(hook))
    return HookState() if cursor is None else HookState.of(cursor.position)


def secret_of(home: Home, hook: HookSettings) -> bytes:
    """Return the secret with which a hook is signed, made now if there is none."""
    path = hook.secret_file or key_file(home, f"hook-{hook.name}")
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UnavailableError(f"the secret of hook {hook.name} cannot be read from {path}: {error}") from error
    if not secret:
        raise UnavailableError(f"the secret of hook {hook.name} is empty; write one to {path}")
    return secret.encode()


def signature(secret: bytes, at_s: int, body: bytes) -> str:
    """Return the value of the signature's header: HMAC-SHA-256 over time, a point and the body, as hex."""
    signed = hmac.new(secret, b"%d." % at_s + body, "sha256").hexdigest()
    return f"t={at_s},v1={signed}"


def deliver(home: Home, hook: HookSettings, event_id: str, body: bytes) -> None:
    """Send one signed body; UnavailableError if it was not accepted."""
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "relook",
        EVENT_HEADER: event_id,
        SIGNATURE_HEADER: signature(secret_of(home, hook), int(time.time()), body),
    }
    post(hook, body, headers)


def send_test(home: Home, hook: HookSettings) -> str:
    """Send an event of the kind `test`, which is in no ledger, and return its id; UnavailableError if refused."""
    # Not an `Event`, whose kinds are those of the API.
    event_id, at = new_id(), utc_now().isoformat()
    sent = {"id": event_id, "created_at": at, "kind": "test", "prediction_id": "0" * 32, "details": {}}
    deliver(home, hook, event_id, json.dumps(sent).encode())
    return event_id


def deliver_due(store: Store, hook: HookSettings) -> int:
    """Deliver what is due for a hook, in order, up to the first failure; return the number of delivered events.

    A hook that is new begins with the events after this moment.
    """
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, _cursor(hook))
    if cursor is None:
        _write(store, hook, HookState(after=last_event_id(store)))
        return 0
    state = HookState.of(cursor.position)
    # A clock that was set back does not make a hook wait longer than its pause.
    waited = utc_now() - (state.tried_at or utc_now())
    if state.failures and timedelta(0) <= waited < timedelta(seconds=state.pause_s):
        return 0
    delivered = 0
    for event in events_of(store, hook.organisation, state.after, AT_ONCE):
        if not hook.kinds or event.kind in hook.kinds:
            try:
                deliver(store.home, hook, event.id, event.model_dump_json().encode())
            except UnavailableError as error:
                _write(store, hook, _failed(state, hook, str(error)))
                return delivered
            delivered += 1
        if state.is_dead:
            logger.warning("hook %s is delivered again", hook.name)
        state = HookState(after=event.id, tried_at=utc_now())
        _write(store, hook, state)
    return delivered


def _failed(state: HookState, hook: HookSettings, error: str) -> HookState:
    failed = replace(
        state,
        failures=state.failures + 1,
        failing_since=state.failing_since or utc_now(),
        error=error,
        tried_at=utc_now(),
    )
    if failed.failures == MANY_FAILURES:
        logger.error("hook %s failed %d times in a row and is tried on: %s", hook.name, failed.failures, error)
    return failed


class Hooks:
    """Delivers the events of all hooks, each in a thread of its own, so that a slow one holds up no other.

    Args:
        store: with ledger and secrets.
        hooks: from the settings.
        poll_s: how often each looks for events, seconds.
    """

    def __init__(self, store: Store, hooks: Sequence[HookSettings], poll_s: float = POLL_S) -> None:
        self._store = store
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(hook,), name=f"hook-{hook.name}", daemon=True) for hook in hooks
        ]
        self._started = False

    def check(self) -> None:
        """Start the threads at the first call; later raise UnavailableError if one has ended."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        elif not all(thread.is_alive() for thread in self._threads):
            raise UnavailableError("a hook is not delivered any more")

    def stop(self) -> None:
        """Deliver nothing more, and give the leases back."""
        self._stopping.set()
        until_s = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=max(0.0, until_s - time.monotonic()))

    def _run(self, hook: HookSettings) -> None:
        while not self._stopping.is_set():
            # Held by another replica, or lost; or the ledger cannot be reached.
            with suppress(RefusedError, UnavailableError), lease.hold(self._store.ledger, _cursor(hook)):
                while not self._stopping.wait(self._poll_s):
                    self._deliver(hook)
            self._stopping.wait(self._poll_s)

    def _deliver(self, hook: HookSettings) -> None:
        try:
            deliver_due(self._store, hook)
        except (RefusedError, UnavailableError):
            raise
        except RelookError:
            logger.exception("hook %s: its events cannot be read", hook.name)


def troubles(store: Store, hooks: Sequence[HookSettings]) -> list[str]:
    """Return one sentence per hook that is not delivered."""
    found = []
    for hook in hooks:
        state = state_of(store, hook)
        if state.is_dead and state.failing_since is not None:
            found.append(
                f"hook {hook.name} is not delivered since {state.failing_since:%Y-%m-%d %H:%M} UTC: {state.error}"
            )
    return found


def _cursor(hook: HookSettings) -> str:
    return f"hook.{hook.name}"


def _write(store: Store, hook: HookSettings, state: HookState) -> None:
    name = _cursor(hook)
    with store.ledger.begin(touches=[name]) as tx:
        set_position(tx, name, state.position())
