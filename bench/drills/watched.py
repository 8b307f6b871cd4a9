"""Run a command and measure it from outside: wall time, peak memory of all its processes, processes left running.

Memory is proportional set size (PSS): a page shared by several processes counts once in the sum.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

SAMPLE_EVERY_S = 1.0


@dataclass
class Measured:
    """What a run took.

    Args:
        exit_code: of the command.
        seconds: wall time.
        peak_pss_mb: largest sum over all processes at one moment, MB (10^6 bytes).
        peak_by_program_mb: that sum by program name, largest first.
        left_running: programs that were still there 15 s after the end.
    """

    exit_code: int
    seconds: float
    peak_pss_mb: float
    peak_by_program_mb: dict[str, float] = field(default_factory=dict)
    left_running: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def watch(command: Sequence[str], environ: Mapping[str, str]) -> Measured:
    """Run a command to its end.

    Args:
        command: program and arguments; its output goes where ours goes.
        environ: variables on top of this process's own.
    Returns:
        The figures.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | dict(environ), stdin=subprocess.DEVNULL)
    known: dict[int, psutil.Process] = {process.pid: psutil.Process(process.pid)}
    peak_mb, peak_by_program = 0.0, {}
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            known |= {child.pid: child for child in known[process.pid].children(recursive=True)}
        by_program = _pss_by_program(known)
        if sum(by_program.values()) > peak_mb:
            peak_mb, peak_by_program = sum(by_program.values()), by_program
        time.sleep(SAMPLE_EVERY_S)
    seconds = time.monotonic() - began
    known.pop(process.pid)
    _, alive = psutil.wait_procs(list(known.values()), timeout=15)
    largest_first = sorted(peak_by_program.items(), key=lambda pair: -pair[1])
    return Measured(
        exit_code=process.returncode,
        seconds=round(seconds, 1),
        peak_pss_mb=round(peak_mb),
        peak_by_program_mb={name: round(mb) for name, mb in largest_first},
        left_running=[name for one in alive if (name := _name(one))],
    )


def _pss_by_program(processes: Mapping[int, psutil.Process]) -> dict[str, float]:
    found: dict[str, float] = {}
    for process in processes.values():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            mb = process.memory_full_info().pss / 1e6
            found[process.name()] = found.get(process.name(), 0.0) + mb
    return found


def _name(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.name()
    return None
