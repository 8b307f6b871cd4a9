"""The verbs `serve` and `explain` of `python -m bench`.

python -m bench serve --peers DIR --json
python -m bench explain --peers DIR --json
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.figures import figures_table
from bench.options import PeersOption
from records.command import Call, verb
from records.progress import progress

if TYPE_CHECKING:
    from rich.progress import Progress

    from records.bundles import Bundle
    from records.settings import RecordsSettings

app = typer.Typer()

NETWORK = "resnet18"
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Id prefix of 8 or more, bundle path, or champion; default: a newly trained ResNet-18."
    ),
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Number of rounds; the figures are medians.")]
SecondsOption = Annotated[float, typer.Option(min=1.0, help="Length of one measurement in seconds.")]


@verb(app, "serve")
def bench_serve(
    call: Call,
    model: ModelOption = None,
    peers: PeersOption = None,
    data: Annotated[Path | None, typer.Option(help="Folder of JPEG files to send; default: generated ones.")] = None,
    rounds: RoundsOption = 3,
    seconds: SecondsOption = 15.0,
    requests: Annotated[
        int, typer.Option(min=5, help="Number of requests with heat maps, to measure memory growth.")
    ] = 20_000,
) -> None:
    """Measure the service: bare network, other servers, overload, heat maps under load, memory growth."""
    from bench.serve.load import Images
    from bench.serve.peers import Peers, free_port
    from bench.serve.serve import Plan, ServeBench
    from bench.serve.subject import Bare, cores, images_of, write_for_peers
    from serving.settings import compute_threads
    from vision.inference.loaded import load_model

    # The predictor gets all cores, as the bare network does, so Ray's logical CPUs must cover the other actors too.
    shares = [f"serving.predictor_cpus={cores()}", f"cluster.logical_cpus={2 * cores() + 2}"]
    shares.append(f"serving.port={free_port()}")
    settings = call.compose(before=shares)
    serving = settings.serving
    with TemporaryDirectory(prefix="relook-bench-") as name, progress() as bar:
        folder = Path(name)
        bundle, records = _subject(settings, model, folder, bar)
        loaded = load_model(bundle, precision=serving.precision)
        write_for_peers(loaded, folder / "network.pt")
        bare = Bare(loaded, serving.max_batch_size, compute_threads(serving.predictor_cpus))
        images = Images(images_of(data, folder, bar))
        others = Peers(peers, folder / "network.pt", folder)
        with call.ray(settings):
            bench = ServeBench(serving, records, bare, others, images, Plan(rounds, seconds, requests), bar)
            figures = bench.run()
    figures |= _described(bundle, loaded.precision, compute_threads(serving.predictor_cpus))
    call.emit(figures, figures_table("python -m bench serve", figures))


@verb(app, "explain")
def bench_explain(
    call: Call,
    model: ModelOption = None,
    peers: PeersOption = None,
    rounds: RoundsOption = 5,
    seconds: SecondsOption = 5.0,
) -> None:
    """Measure Grad-CAM against its prediction and against pytorch-grad-cam."""
    from bench.serve.explain import explain_figures
    from bench.serve.peers import Peers
    from bench.serve.subject import Bare, cores, write_for_peers
    from vision.inference.loaded import load_model

    settings = call.settings
    with TemporaryDirectory(prefix="relook-bench-") as name, progress() as bar:
        folder = Path(name)
        bundle, _ = _subject(settings, model, folder, bar)
        # The peer differentiates, which needs fp32; so both compute in it.
        loaded = load_model(bundle, precision="fp32")
        write_for_peers(loaded, folder / "network.pt")
        pixels = Bare(loaded, settings.serving.max_batch_size, cores()).pixels
        others = Peers(peers, folder / "network.pt", folder)
        figures = explain_figures(loaded, pixels, others, rounds, seconds, cores(), bar)
    figures |= _described(bundle, loaded.precision, cores())
    call.emit(figures, figures_table("python -m bench explain", figures))


def _subject(settings: Any, model: str | None, folder: Path, bar: "Progress") -> "tuple[Bundle, RecordsSettings]":
    """Return the measured model and a temporary home to serve it from; the user's home is only read."""
    from bench.serve.subject import named_bundle, prepare

    home = settings.records.apart(folder / "home")
    trainers = settings.trainers.with_values({"model.name": NETWORK})
    return prepare(home, named_bundle(settings.records, model), trainers, folder, bar), home


def _described(bundle: "Bundle", precision: str, threads: int) -> dict[str, Any]:
    document = bundle.document
    side_px = document.geometry.side_px
    return {"model": document.architecture.name, "side_px": side_px, "precision": precision, "threads": threads}
