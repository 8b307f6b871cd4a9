"""Processes that may end while they are looked at."""

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Return the words of a command line; none if the process has ended, whether its parent has noticed or not."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # the first is that of a zombie, too
        return []


def processes_with(*words: str, below: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes below one, by default this one, whose command lines have one of these words."""
    family = (below or psutil.Process()).children(recursive=True)
    return [child for child in family if any(word in " ".join(command_line(child)) for word in words)]
