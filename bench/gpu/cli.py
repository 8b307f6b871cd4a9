"""The verb `gpu` of `python -m bench`.

python -m bench gpu --json
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from records.command import Call, figures_table, verb

app = typer.Typer()


@verb(app, "gpu")
def bench_gpu(
    call: Call,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where to compute.")] = "cuda",
    short: Annotated[bool, typer.Option("--short", help="Small networks, a moment each: to see that it runs.")] = False,
    limit_s: Annotated[float, typer.Option(min=5.0, help="When to begin no further measurement, seconds.")] = 420.0,
) -> None:
    """Measure a GPU: steps, pipeline, feeders, decoding, DDP, predictions, heat maps, closeness to the CPU."""
    from bench.gpu.measures import GpuBench

    with TemporaryDirectory(prefix="relook-bench-") as folder:
        figures = GpuBench(device, short, limit_s, Path(folder)).run()
    call.emit(figures, figures_table("python -m bench gpu", figures))
