"""The order of the demo's stages, and the processes that run beside them.

data -> round 1 -> service -> traffic -> annotators -> round 2 under traffic -> gate fault -> swap -> trace

Each stage's result is kept when it is done, so an interrupted demo resumes after its last finished stage.
"""

from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.demo.stages import (
    AnnotatorKind,
    Demo,
    annotate_tasks,
    gate_fault,
    gather_data,
    run_next_round,
    send_traffic,
    summarise,
    swap,
    trace_one,
    withheld_images,
)
from cluster.demo.state import DemoSummary, Stages, summary_path, write_json
from cluster.demo.traffic import Tally, Traffic
from cluster.demo.view import View
from cluster.session import start_ray
from cluster.settings import Settings
from images.layouts import read_source
from labeling.local_server import LocalLabelStudio, ServerInfo
from records.errors import RefusedError
from records.store import Store
from serving.http_server import require_free_port
from serving.launch import ServiceHandle, start_service

BACKGROUND_RATE_PER_S = 3.0


@dataclass(frozen=True)
class Running:
    """The summary of a finished demo, and the servers that still run."""

    summary: DemoSummary
    service: ServiceHandle
    label_studio: ServerInfo


@contextmanager
def running_demo(
    settings: Settings, store: Store, *, data: Path | None, columns: Mapping[str, str] | None, annotator: AnnotatorKind
) -> Generator[Running]:
    """Run all stages; service and Label Studio keep running until the block ends.

    Args:
        settings: of everything.
        store: the home that the demo fills.
        data: a folder that `relook data import` reads; None generates images.
        columns: names of its table's columns where they differ from HAM10000's.
        annotator: `simulated` annotates from the known truth, `human` waits for people.
    Yields:
        The summary, and what is still running.
    Raises:
        UserError: the data, a port or a setting cannot be used, or Label Studio does not start.
    """
    # Both can be checked now; without these calls they would fail after minutes of work.
    require_free_port(settings.serving.host, settings.serving.port)
    if data is not None:
        read_source(data, columns)
    tally = Tally()
    demo = Demo(settings, store, View(tally), tally, annotator, Stages(store.home))
    with ExitStack() as running:
        with demo.view.shown():
            # Label Studio's first start takes a while, so it starts while images are read.
            starting = _start_label_studio(demo, running)
            running.enter_context(start_ray(settings))
            _require_alive(starting)
            _before_service(demo, data, columns, starting)
            with demo.view.stage("Service", "serve the model over HTTP, with a heat map for every prediction"):
                service = start_service(settings.serving, settings.records)
                running.callback(service.stop)
                demo.view.say(f"listening on {service.url}")
            summary = _with_service(demo, service, starting.result())
        yield Running(summary, service, starting.result())


@contextmanager
def reopened_demo(settings: Settings, store: Store) -> Generator[Running]:
    """Start service and Label Studio of a finished demo again, with the same model and the same tasks.

    RefusedError if no demo was finished here.
    """
    path = summary_path(store.home)
    if not path.is_file():
        raise RefusedError(f"no finished demo is in {store.home.root}; run one with `relook demo`")
    summary = DemoSummary.model_validate_json(path.read_text())
    with ExitStack() as running:
        server = LocalLabelStudio(store.home, settings.labeling)
        running.callback(server.down)
        info = server.up()
        running.enter_context(start_ray(settings))
        # Registered after Ray, so that the stack stops the service while its Ray still runs.
        service = start_service(settings.serving, settings.records)
        running.callback(service.stop)
        yield Running(summary, service, info)


def _start_label_studio(demo: Demo, running: ExitStack) -> "Future[ServerInfo]":
    server = LocalLabelStudio(demo.store.home, demo.settings.labeling)
    # The stack unwinds in reverse: first the pool waits for a start that is still going on, then the server is stopped.
    running.callback(server.down)
    pool = running.enter_context(ThreadPoolExecutor(1, thread_name_prefix="label-studio"))
    return pool.submit(server.up)


def _require_alive(starting: "Future[ServerInfo]") -> None:
    """Raise an early error of Label Studio's start now instead of when it is first needed."""
    if starting.done():
        starting.result()


def _before_service(
    demo: Demo, data: Path | None, columns: Mapping[str, str] | None, starting: "Future[ServerInfo]"
) -> None:
    demo.stage(
        "data",
        "Images",
        "import them and split by lesion, so that no lesion is in two splits",
        lambda: gather_data(demo, data, columns),
    )
    # A round begins by pulling annotations, so a Label Studio that is still starting would fail it.
    starting.result()
    demo.stage("round_1", "Round 1", "search, fit, evaluate and gate the first model", lambda: run_next_round(demo))


def _with_service(demo: Demo, service: ServiceHandle, server: ServerInfo) -> DemoSummary:
    demo.stage(
        "traffic",
        "Traffic",
        "send unlabelled images; doubtful predictions become review items",
        lambda: send_traffic(demo, service.url),
    )
    demo.stage(
        "annotators", "Annotators", "annotate the doubtful images in Label Studio", lambda: annotate_tasks(demo, server)
    )
    # From here to the swap requests keep arriving, so that a request which training or the swap disturbs is counted.
    background = Traffic(
        service.url,
        withheld_images(demo),
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
            "train the next model on the annotations, while requests keep coming",
            lambda: run_next_round(demo),
        )
        demo.stage(
            "gate_fault",
            "Gate",
            "injected fault: the gate must refuse a challenger that misses a class",
            lambda: gate_fault(demo),
        )
        demo.stage("swap", "Swap", "switch to another model while requests come in", lambda: swap(demo, service.url))
    finally:
        background.stop()
    demo.stage(
        "trace", "Trace", "follow one image from the request to the model trained on it", lambda: trace_one(demo)
    )
    summary = summarise(demo, server)
    # Written last: the file is what marks the demo as finished.
    write_json(summary_path(demo.store.home), summary.model_dump(mode="json"))
    return summary
