"""The service's part of `relook bench`; `cluster/cli.py` joins the rooms' parts into one group.

python -m bench serve --peers DIR --json
python -m bench explain --peers DIR --json
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from records.command import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    emit,
    figures_table,
    progress,
    ray_of,
    settings_of,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from records.bundles import Bundle
    from records.settings import RecordsSettings

app = typer.Typer()

NETWORK = "resnet18"
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Id prefix of 8 or more, bundle path, or champion; default: a ResNet-18 trained now."),
]
PeersOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the peers' environments (bench/peers/install.py makes it); default: not measured.",
        envvar="RELOOK_BENCH_PEERS", exists=True, file_okay=False,
    ),
]  # fmt: skip
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds; medians are told.")]
SecondsOption = Annotated[float, typer.Option(min=1.0, help="Seconds of one measurement.")]


@app.command("serve")
def bench_serve(
    ctx: typer.Context,
    model: ModelOption = None,
    peers: PeersOption = None,
    data: Annotated[Path | None, typer.Option(help="Folder of JPEG files to send; default: generated ones.")] = None,
    rounds: RoundsOption = 3,
    seconds: SecondsOption = 15.0,
    requests: Annotated[int, typer.Option(min=5, help="Requests with maps, to see memory grow.")] = 20_000,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the service: its bare network, other servers, overload, explanations beside predictions, memory."""
    from bench.serve.load import Images
    from bench.serve.peers import Peers, free_port
    from bench.serve.serve import Plan, ServeBench
    from bench.serve.subject import Bare, cores, images_of, write_for_peers
    from serving.settings import compute_threads
    from vision.inference.loaded import load_model

    # The predictor gets all cores, as the bare network does; Ray's own count must not stand in its way.
    shares = [f"serving.predictor_cpus={cores()}", f"cluster.logical_cpus={2 * cores() + 2}"]
    shares.append(f"serving.port={free_port()}")
    settings = settings_of(ctx, config, preset, [*shares, *(sets or ())])
    serving = settings.serving
    with TemporaryDirectory(prefix="relook-bench-") as name, progress() as bar:
        folder = Path(name)
        bundle, records = _subject(ctx, settings, model, folder, bar)
        loaded = load_model(bundle, precision=serving.precision)
        write_for_peers(loaded, folder / "network.pt")
        bare = Bare(loaded, serving.max_batch_size, compute_threads(serving.predictor_cpus))
        images = Images(images_of(data, folder, bar))
        others = Peers(peers, folder / "network.pt", folder)
        with ray_of(ctx, settings):
            bench = ServeBench(serving, records, bare, others, images, Plan(rounds, seconds, requests), bar)
            figures = bench.run()
    figures |= _described(bundle, loaded.precision, compute_threads(serving.predictor_cpus))
    emit(as_json, figures, figures_table("python -m bench serve", figures))


@app.command("explain")
def bench_explain(
    ctx: typer.Context,
    model: ModelOption = None,
    peers: PeersOption = None,
    rounds: RoundsOption = 5,
    seconds: SecondsOption = 5.0,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure Grad-CAM beside the answer that it belongs to, and beside pytorch-grad-cam."""
    from bench.serve.explain import explain_figures
    from bench.serve.peers import Peers
    from bench.serve.subject import Bare, cores, write_for_peers
    from vision.inference.loaded import load_model

    settings = settings_of(ctx, config, preset, sets)
    with TemporaryDirectory(prefix="relook-bench-") as name, progress() as bar:
        folder = Path(name)
        bundle, _ = _subject(ctx, settings, model, folder, bar)
        # The peer differentiates, which needs fp32; so both compute in it.
        loaded = load_model(bundle, precision="fp32")
        write_for_peers(loaded, folder / "network.pt")
        pixels = Bare(loaded, settings.serving.max_batch_size, cores()).pixels
        others = Peers(peers, folder / "network.pt", folder)
        figures = explain_figures(loaded, pixels, others, rounds, seconds, cores(), bar)
    figures |= _described(bundle, loaded.precision, cores())
    emit(as_json, figures, figures_table("python -m bench explain", figures))


def _subject(
    ctx: typer.Context, settings: Any, model: str | None, folder: Path, bar: "Progress"
) -> "tuple[Bundle, RecordsSettings]":
    """Return the model that is measured, and a home of its own where it answers.

    Measuring must neither see nor change what the user has; a named model is read where it is.
    """
    from bench.serve.subject import named_bundle, prepare

    home = settings.records.apart(folder / "home")
    trainers = settings.trainers.model_copy(update={"model": NETWORK})
    return prepare(home, named_bundle(settings.records, model), trainers, folder, bar), home


def _described(bundle: "Bundle", precision: str, threads: int) -> dict[str, Any]:
    document = bundle.document
    side_px = document.geometry.side_px
    return {"model": document.architecture.name, "side_px": side_px, "precision": precision, "threads": threads}
