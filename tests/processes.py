"""Command lines of processes that may end while they are looked at."""

import psutil


def command_line(process: psutil.Process) -> str:
    """Return the command line of a process; empty if it has ended, whether its parent has noticed or not."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return ""


def below_with(words: str) -> list[psutil.Process]:
    """Return the processes below this one that have certain words in their command lines."""
    return [child for child in psutil.Process().children(recursive=True) if words in command_line(child)]
