"""All long forms in one go: long tests, then drill after drill, then the demo again and again.

    .venv/bin/python -m bench.drills.soak [--minutes 10] [--points 30] [--logs build/soak] [PART ...]

A part that fails does not keep the others from running. Every part writes a log of its own; `summary.md` beside the
logs holds a row per part, and grows while the parts run. The exit code is 1 if a part failed. Nodes get networks of
their own where this process may make them (root, Linux), and share this machine's loopback elsewhere.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

RAY_WITH_TOKEN = {"RAY_AUTH_MODE": "token"}
LAST_WORDS = 200


@dataclass(frozen=True)
class Part:
    """A part of the whole.

    Args:
        name: of its row and its log.
        module: that is run.
        arguments: of the module.
        variables: of the environment, on top of this process's own.
    """

    name: str
    module: str
    arguments: str = ""
    variables: dict[str, str] = field(default_factory=dict)


def parts(minutes: float, points: int, *, root: bool) -> list[Part]:
    """Return all parts in order.

    Args:
        minutes: of what runs for as long as it is told to.
        points: moments at which a round is killed.
        root: whether nodes can have networks of their own.
    """
    networks = "--namespaces --tls" if root else ""
    loopback = "" if root else "--loopback"
    return [
        Part("tests", "pytest", "-m soak"),
        Part("kill_training", "bench.drills.kill_training", "--workers 2 --kills 4"),
        Part("kill_matrix", "bench.drills.kill_matrix", f"--points {points}"),
        Part("chaos_tune", "bench.drills.chaos_tune", "--rounds 3 --kills 3", RAY_WITH_TOKEN),
        Part("chaos_tune_pbt", "bench.drills.chaos_tune", "--rounds 2 --kills 3 --searcher pbt", RAY_WITH_TOKEN),
        Part("fuzz_api", "bench.drills.fuzz_api", "--uploads 10000 --examples 40"),
        Part("release_drills", "bench.drills.release_drills"),
        Part("interleaved", "bench.drills.interleaved", "--calls 1000 --predictors 3 --ingresses 2"),
        Part("kill_service", "bench.drills.kill_service", "--kills 2"),
        Part("kill_database", "bench.drills.kill_database", "--rounds 3"),
        Part("power_cut", "bench.drills.power_cut", "--moments 200"),
        Part("abuse", "bench", "abuse --minutes 5"),
        Part("two_services", "bench.drills.two_services", f"--minutes {minutes:g}"),
        Part("label_chaos", "bench.drills.label_chaos", "--items 2000 --kills 20"),
        Part("two_nodes", "bench.drills.two_nodes", "--trials 6 --epochs 8"),
        Part("three_nodes", "bench.drills.three_nodes", networks),
        Part("scaling", "bench.drills.scaling", f"--nodes 3 {loopback} --device-ms 200 --rollout --kill-every 20"),
        Part("peers", "bench.drills.peers"),
        Part("demo_on_postgres", "bench.drills.demo_on_postgres"),
        Part("repeated_demo", "bench.drills.repeated_demo", f"--minutes {minutes:g}"),
    ]


def run(part: Part, log: Path) -> tuple[int, float]:
    """Run a part with its output in a file.

    Returns:
        Exit code and duration, seconds.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", part.module, *part.arguments.split()]
    with log.open("w") as stream:
        done = subprocess.run(
            command,
            env=os.environ | part.variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            check=False,
        )
    return done.returncode, time.monotonic() - began


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    said = [line.strip("= ") for line in lines if line.strip("= \t")]
    return said[-1].replace("|", "/")[:LAST_WORDS] if said else ""


def main() -> int:
    """Run the parts that were named, or all, and write a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of two services, and of demo after demo")
    parser.add_argument("--points", type=int, default=30, help="moments at which a round is killed")
    parser.add_argument("--logs", type=Path, default=Path("build/soak"), help="folder for logs and summary")
    parser.add_argument("part", nargs="*", help="names of parts; default: all")
    arguments = parser.parse_args()
    every = parts(arguments.minutes, arguments.points, root=sys.platform == "linux" and os.geteuid() == 0)
    unknown = sorted(set(arguments.part) - {part.name for part in every})
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(part.name for part in every)}")
    chosen = [part for part in every if not arguments.part or part.name in arguments.part]
    arguments.logs.mkdir(parents=True, exist_ok=True)
    summary, failed = arguments.logs / "summary.md", 0
    summary.write_text("| part | result | seconds | last line of its log |\n|---|---|---|---|\n")
    for number, part in enumerate(chosen, 1):
        print(f"{time.strftime('%H:%M:%S')} {number} of {len(chosen)}: {part.name}", file=sys.stderr, flush=True)
        code, seconds = run(part, arguments.logs / f"{part.name}.log")
        failed += code != 0
        row = f"| {part.name} | {'held' if code == 0 else f'FAILED, exit code {code}'} | {seconds:.0f} |"
        with summary.open("a") as stream:
            stream.write(f"{row} {_last_line(arguments.logs / f'{part.name}.log')} |\n")
        print(f"{time.strftime('%H:%M:%S')} {row.strip('| ')}", file=sys.stderr, flush=True)
    print(summary.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
