"""What a service does while nobody asks: how often its parts wake up."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from gradio.queueing import Queue

from records.settings import RecordsSettings
from records.store import open_store
from serving.page.layout import QUEUE_POLL_S, build_page
from serving.page.uploads import PageFiles
from serving.settings import ServingSettings


def test_an_idle_page_looks_for_events_a_few_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, settings = open_store(RecordsSettings(home=tmp_path / "home")), ServingSettings()
    looks: list[float] = []
    waiting = Queue.__len__
    monkeypatch.setattr(Queue, "__len__", lambda self: looks.append(time.monotonic()) or waiting(self))

    async def idle() -> float:
        # Gradio opens event loops of its own where none runs.
        queue = build_page(settings, store, PageFiles(settings, tmp_path))._queue
        looks.clear()
        began_s = time.monotonic()
        loops = [asyncio.create_task(loop) for loop in (queue.start_processing(), queue.start_progress_updates())]
        await asyncio.sleep(0.5)
        for task in loops:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return time.monotonic() - began_s

    lasted_s = asyncio.run(idle())
    store.close()
    assert 1 <= len(looks) <= 1 + lasted_s / QUEUE_POLL_S
