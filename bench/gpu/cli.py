"""The verb `gpu` of `python -m bench`.

python -m bench gpu --json
python -m bench gpu serve --json
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from bench.figures import figures_table
from records.command import Call, verb

app = typer.Typer()


@verb(app, "gpu")
def bench_gpu(
    call: Call,
    part: Annotated[
        Literal["everything", "serve"], typer.Argument(help="serve: only the predictor of the service on the device.")
    ] = "everything",
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where to compute.")] = "cuda",
    short: Annotated[bool, typer.Option("--short", help="Small networks, a moment each: to see that it runs.")] = False,
    limit_s: Annotated[float, typer.Option(min=5.0, help="When to begin no further measurement, seconds.")] = 420.0,
    fake_ms: Annotated[
        float | None,
        typer.Option(min=0.1, help="serve: milliseconds of a forward pass on a fake device that uses no core."),
    ] = None,
) -> None:
    """Measure a GPU: steps, pipeline, feeders, decoding, DDP, predictions, the service's predictor, maps."""
    from bench.gpu.measures import GpuBench

    with TemporaryDirectory(prefix="relook-bench-") as folder:
        only = ("served",) if part == "serve" else ()
        fake_s = None if fake_ms is None else fake_ms / 1000
        figures = GpuBench(device, short, limit_s, Path(folder), only, fake_s).run()
    call.emit(figures, figures_table("python -m bench gpu", figures))
