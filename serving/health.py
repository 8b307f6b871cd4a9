"""Whether predictions can be made now: a cached, bounded look at everything that one needs.

Each part is probed in a thread of its own, so one that hangs, such as a database behind a cut network, delays neither
the others nor the response. What is wrong with a part goes to the log and to administrators; everybody else reads
only which part it is, because an error names hosts, paths and users.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from records.errors import RelookError, UnavailableError
from records.models import serving_model
from records.store import Store
from serving.hooks.delivery import troubles
from serving.messages import ServingState
from serving.schemas import ServedModelInfo
from serving.service import Service

logger = logging.getLogger(__name__)

FRESH_S = 2.0
"""Maximum age of what is reported, seconds."""
PROBE_TIMEOUT_S = 2.0
"""How long a part may take to respond, seconds."""
_SPARE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What one look found."""

    model: ServedModelInfo | None
    missing: list[str]
    """one sentence per part that is missing, without details"""
    details: list[str]
    """the same with the errors, for administrators"""
    troubles: tuple[str, ...] = ()
    """why single predictors do not serve, while others do"""
    hooks: tuple[str, ...] = ()
    """which hooks are not delivered, and why"""


class HealthProbe:
    """Looks at the parts of a service, at most every other second. It belongs to one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parts: dict[str, Callable[[Store], None]] = {"the ledger": probe_ledger}
        if service.settings.keep:
            self._parts |= {"the image store": probe_blobs, "the disk": probe_disk}
        self._threads = ThreadPoolExecutor(len(self._parts), "health")
        self._running: dict[str, asyncio.Future[None]] = {}
        self._report: HealthReport | None = None
        self._reported_s = float("-inf")
        self._looking = asyncio.Lock()

    async def check(self) -> HealthReport:
        """Return what is missing, at most two seconds old."""
        # Under the lock, so that many callers cause one look.
        async with self._looking:
            if self._report is None or time.monotonic() - self._reported_s > FRESH_S:
                self._report = await self._look()
                self._reported_s = time.monotonic()
            return self._report

    async def _look(self) -> HealthReport:
        parts = asyncio.gather(*(self._part(name) for name in self._parts))
        state = await self._state()
        model = state.model
        found = await parts
        missing = ["no model is loaded"] if model is None else []
        details = [f"no model is loaded: {state.detail}"] if model is None else []
        for name, error in zip(self._parts, found, strict=True):
            if error is not None:
                missing.append(f"{name} cannot be used")
                details.append(f"{name} cannot be used: {error}")
        if details and (self._report is None or details != self._report.details):
            logger.error("not ready: %s", "; ".join(details))
        if state.troubles and (self._report is None or state.troubles != self._report.troubles):
            logger.error("some predictors do not serve: %s", "; ".join(state.troubles))
        hooks = () if missing else await self._hooks()
        return HealthReport(model, missing, details, state.troubles, hooks)

    async def _hooks(self) -> tuple[str, ...]:
        store, hooks = self._service.store, self._service.settings.hooks
        if not hooks:
            return ()
        running = asyncio.get_running_loop().run_in_executor(self._threads, troubles, store, hooks)
        done, _ = await asyncio.wait([running], timeout=PROBE_TIMEOUT_S)
        # A ledger that fails just now is what the next look finds.
        return tuple(running.result()) if done and running.exception() is None else ()

    async def _state(self) -> ServingState:
        try:
            return await asyncio.wait_for(self._service.state(), PROBE_TIMEOUT_S)
        except TimeoutError:
            return ServingState(None, "the predictor does not respond")
        except RelookError as error:
            return ServingState(None, str(error))

    async def _part(self, name: str) -> BaseException | None:
        # A probe that hangs is not started again: it would hold one more thread.
        running = self._running.get(name)
        if running is None or running.done():
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, self._parts[name], self._service.store)
            self._running[name] = running
        done, _ = await asyncio.wait([running], timeout=PROBE_TIMEOUT_S)
        if not done:
            return TimeoutError(f"no response within {PROBE_TIMEOUT_S:g} s")
        return running.exception()


def probe_ledger(store: Store) -> None:
    """Raise an error if the ledger cannot be read."""
    with store.ledger.read() as tx:
        # An open connection to a deleted SQLite file still reads: the file itself is looked for.
        url = tx.connection.engine.url
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise UnavailableError(f"{url.database} does not exist any more")
        serving_model(tx)


def probe_blobs(store: Store) -> None:
    """Raise an error if the image store cannot be reached, or is a folder that cannot be written."""
    if store.blobs.local:
        _write_into(Path(store.blobs.root))
    else:
        store.blobs.has("0" * 64)


def probe_disk(store: Store) -> None:
    """Raise an error if nothing can be written to the home any more."""
    _write_into(store.home.root)


def _write_into(folder: Path) -> None:
    # A file without a name: nothing is left if this process is killed.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_SPARE_BYTES))
        file.flush()
