"""The demo's order of events. Each stage is kept when it is done, so an interrupted demo goes on.

data -> round 1 -> serve -> traffic -> annotators -> round 2 under traffic -> drills -> trace -> summary
"""

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.demo.stages import (
    Annotator,
    Demo,
    ask_annotators,
    follow_one,
    gate_drill,
    gather_data,
    hidden_images,
    play_round,
    send_traffic,
    summarise,
    swap,
)
from cluster.demo.state import DemoSummary, Stages, summary_path, write_json
from cluster.demo.traffic import Tally, Traffic
from cluster.demo.view import View
from cluster.session import start_ray
from cluster.settings import Settings
from images.source_table import read_source
from labeling.local_server import LocalLabelStudio, ServerInfo
from records.errors import RefusedError
from records.store import Store
from serving.http_server import require_free_port
from serving.launch import ServiceHandle, start_service

BACKGROUND_RATE_PER_S = 3.0


@dataclass(frozen=True)
class Running:
    """What a finished demo still has running, for `relook demo` to show until it is left."""

    summary: DemoSummary
    service: ServiceHandle
    label_studio: ServerInfo


@contextmanager
def play(settings: Settings, store: Store, *, data: Path | None, annotator: Annotator) -> Generator[Running]:
    """Play the demo; service and Label Studio run until the block ends.

    Args:
        settings: of everything.
        store: the home that the demo fills.
        data: a folder in HAM10000's layout, or a folder with a table; None generates images.
        annotator: `simulated` answers from the known truth, `human` waits for people.
    Yields:
        The summary, and what is still running.
    Raises:
        UserError: the data, a port or a setting cannot be used, or Label Studio does not come up.
    """
    # Said before minutes of work, not after them.
    require_free_port(settings.serving.host, settings.serving.port)
    if data is not None:
        read_source(data)
    stages = Stages(store.home)
    tally = Tally()
    demo = Demo(settings, store, View(tally), tally, annotator, stages)
    with ExitStack() as running:
        with demo.view.shown():
            # Label Studio's first start takes a while, so it starts while images are read.
            starting = _start_label_studio(demo, running)
            running.enter_context(start_ray(settings))
            _require_alive(starting)
            _first_half(demo, data, starting)
            with demo.view.chapter("Service", "the model answers over HTTP, with a heat map beside every answer"):
                service = start_service(settings.serving, settings.records)
                running.callback(service.stop)
                demo.view.say(f"listening on {service.url}")
            summary = _second_half(demo, service, starting.result())
        yield Running(summary, service, starting.result())


@contextmanager
def reopen(settings: Settings, store: Store) -> Generator[Running]:
    """Bring a finished demo back: the same model answers, Label Studio holds the same tasks.

    Args:
        settings: of everything.
        store: the home that the demo filled.
    Yields:
        The summary of then, and what is running now.
    Raises:
        RefusedError: no demo was finished here.
    """
    path = summary_path(store.home)
    if not path.is_file():
        raise RefusedError(f"no finished demo is in {store.home.root}; play one with `relook demo`")
    summary = DemoSummary.model_validate_json(path.read_text())
    with ExitStack() as running:
        server = LocalLabelStudio(store.home, settings.labeling)
        running.callback(server.down)
        info = server.up()
        running.enter_context(start_ray(settings))
        service = start_service(settings.serving, settings.records)
        running.callback(service.stop)
        yield Running(summary, service, info)


def _start_label_studio(demo: Demo, running: ExitStack) -> "Future[ServerInfo]":
    server = LocalLabelStudio(demo.store.home, demo.settings.labeling)
    running.callback(server.down)  # runs after the pool below has ended, so nothing is started behind its back
    pool = running.enter_context(ThreadPoolExecutor(1, thread_name_prefix="label-studio"))
    return pool.submit(server.up)


def _require_alive(starting: "Future[ServerInfo]") -> None:
    """Raise what kept Label Studio from coming up, as soon as it is known."""
    if starting.done():
        starting.result()


def _first_half(demo: Demo, data: Path | None, starting: "Future[ServerInfo]") -> None:
    demo.stage(
        "data",
        "Images",
        "a model is only as honest as its split: no lesion may be on two splits",
        lambda: gather_data(demo, data),
    )
    starting.result()  # a round collects answers first, and an annotator's desk that is not open yet is an error to it
    demo.stage(
        "round_1",
        "Round 1",
        "search, fit, evaluate and ask the gate before anybody is answered",
        lambda: play_round(demo),
    )


def _second_half(demo: Demo, service: ServiceHandle, server: ServerInfo) -> DemoSummary:
    demo.stage(
        "traffic",
        "Traffic",
        "unlabelled images arrive; doubts go to the annotators by themselves",
        lambda: send_traffic(demo, service),
    )
    demo.stage(
        "annotators",
        "Annotators",
        "people see the doubtful images in Label Studio and answer",
        lambda: ask_annotators(demo, server),
    )
    background = Traffic(
        service.url,
        hidden_images(demo),
        demo.tally,
        requests=None,
        concurrency=2,
        rate_per_s=BACKGROUND_RATE_PER_S,
        retry_s=demo.settings.demo.retry_s,
    )
    background.start()
    try:
        demo.stage(
            "round_2",
            "Round 2",
            "the next model learns from what the annotators said, while requests keep coming",
            lambda: play_round(demo),
        )
        demo.stage(
            "gate_drill",
            "Gate drill",
            "planted: a challenger that misses the key class must be refused",
            lambda: gate_drill(demo),
        )
        demo.stage("swap", "Swap", "a new model takes over while requests come in", lambda: swap(demo, service))
    finally:
        background.stop()
    demo.stage(
        "trace",
        "Trace",
        "one flagged image, from the request to the model that learned from it",
        lambda: follow_one(demo),
    )
    summary = summarise(demo, server)
    write_json(summary_path(demo.store.home), summary.model_dump(mode="json"))
    return summary
