"""Ray's daemons of a local session: started out of reach of signals to the command's group, and watched.

In: the running `ray`. Out: a SIGTERM to this process once a daemon is gone, since calls to Ray would wait for ever.
"""

import atexit
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from types import FrameType
from typing import Any, NoReturn

import psutil

logger = logging.getLogger(__name__)

WATCHED = ("gcs_server", "raylet")
LOOK_EVERY_S = 0.5
NODE_STARTS_WITHIN_S = 90.0
# A supervisor that signals every process of a service reaches the daemons and this process at about the same time.
SAME_MOMENT_S = 1.5
INTERRUPT_EVERY_S = 3.0
"""Between two interruptions of the command: each ends one call to Ray that waits, and a cleanup may make several."""
INTERRUPTIONS = 4
SHUTDOWN_S = 20.0
"""How long Ray's shutdown may take before what it started is killed; it takes 1 s, or waits for ever for a reply."""
SHUTDOWN_OF_LOST_S = 3.0
ORDERLY_S = 8.0
"""How long the command may take after SIGTERM until its calls to Ray are interrupted."""
_DAEMON_LOST = threading.Event()
"""Set when a daemon ended or stopped responding in this process; see `end_process`."""


@contextlib.contextmanager
def daemons_in_own_session() -> Iterator[None]:
    """Start Ray's daemons in sessions of their own while the block runs.

    A signal to the command's process group then reaches the command alone, which ends them in order. Ray has no option
    for it; they still end with this process, because the kernel kills them when it dies.
    """
    from ray._private import services

    names: Any = services
    plain = getattr(names, "ConsolePopen", None)
    if plain is None:
        _warn_of_other_ray("a signal to the command's process group ends Ray's daemons before the command")
        yield
        return
    names.ConsolePopen = functools.partial(plain, start_new_session=True)
    try:
        yield
    finally:
        names.ConsolePopen = plain


@contextlib.contextmanager
def time_for_a_slow_node() -> Iterator[None]:
    """Give a node that starts `NODE_STARTS_WITHIN_S` while the block runs; Ray's own limit of 30 s is a constant.

    On a busy machine a node takes longer, and Ray would end it and start the next one on the same busy machine.
    """
    from ray._private import services

    names: Any = services
    plain = names.get_node

    def patient(*arguments: Any, **options: Any) -> Any:
        until_s = time.monotonic() + NODE_STARTS_WITHIN_S
        while True:
            try:
                return plain(*arguments, **options)
            except RuntimeError:  # not known yet
                if time.monotonic() >= until_s:
                    raise
                time.sleep(LOOK_EVERY_S)

    names.get_node = patient
    try:
        yield
    finally:
        names.get_node = plain


@dataclass
class Ending:
    """Why the command ends: SIGTERM from outside, or a daemon that is gone; `folder` is the daemons' working folder."""

    asked: bool = False
    asked_at_s: float = 0.0
    gone: str | None = None
    folder: str | None = None
    interrupting: bool = field(default=False, repr=False)

    @property
    def lost(self) -> str | None:
        """The sentence about a daemon that ended although nobody asked the command to end."""
        if self.gone is None or self.asked:
            return None
        return f"Ray's process {self.gone} ended while it was needed, so what ran on it was lost"


@contextlib.contextmanager
def orderly_sigterm() -> Iterator[Ending]:
    """Turn SIGTERM into SystemExit, so that the context ends; Ray's own handler prints a stack and stops no worker."""
    ending = Ending()
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield ending
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if not ending.interrupting:
            # `timeout` and some supervisors send it twice, to the process and to its group.
            if ending.asked:
                return
            ending.asked, ending.asked_at_s = True, time.monotonic()
        ending.interrupting = False
        if callable(before):
            before(signum, frame)
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield ending
    except (Exception, SystemExit):
        if not ending.asked:
            raise
        # Ray gives a SystemExit that passes through its calls another code, and processes that were stopped at the
        # same moment make calls fail.
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _daemons() -> dict[str, Any]:
    """Return Ray's daemons of this session by name; none if this version of Ray does not tell."""
    from ray._private import worker

    node: Any = getattr(worker, "_global_node", None)
    try:
        return {name: processes[0].process for name, processes in node.all_processes.items()}
    except (AttributeError, IndexError, TypeError):
        return {}


def _warn_of_other_ray(effect: str) -> None:
    # Both are internals of Ray, which may change with any version.
    logger.warning(
        "Ray %s treats its daemons in a way that Relook does not know, so %s; install the version in requirements.lock",
        metadata.version("ray"), effect,
    )  # fmt: skip


@contextlib.contextmanager
def watched_daemons(ending: Ending) -> Iterator[Callable[[], None]]:
    """Interrupt the main thread when a daemon is gone; yield what ends the interruptions, for the cleanup.

    If the command is still not at its end after several interruptions, this process ends at once.
    """
    daemons = _daemons()
    if not daemons.keys() >= set(WATCHED):
        _warn_of_other_ray("a command whose daemon is gone may wait for it for ever")
        yield lambda: None
        return
    ending.folder = psutil.Process(daemons["raylet"].pid).cwd()
    cleaning, over = threading.Event(), threading.Event()

    def find_gone() -> str | None:
        # After a SIGTERM to all processes, raylet takes ten seconds to end; the other daemons end at once.
        names = daemons if ending.asked else WATCHED
        return next((name for name in names if daemons[name].poll() is not None), None)

    def begin_cleaning() -> None:
        cleaning.set()
        ending.gone = ending.gone or find_gone()

    def watch() -> None:
        while not over.wait(LOOK_EVERY_S):
            if find_gone() is not None or (ending.asked and time.monotonic() > ending.asked_at_s + ORDERLY_S):
                break
        else:
            return
        over.wait(SAME_MOMENT_S)
        if ending.gone is None:
            if cleaning.is_set():
                return  # ended by the cleanup
            ending.gone = find_gone()
        for _ in range(INTERRUPTIONS):
            if not cleaning.is_set():
                ending.interrupting = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if over.wait(INTERRUPT_EVERY_S):
                return
        _end_at_once(ending)

    if threading.current_thread() is threading.main_thread():
        threading.Thread(target=watch, name="Ray's daemons", daemon=True).start()
    try:
        yield begin_cleaning
    finally:
        over.set()


def orphans(ending: Ending) -> list[psutil.Process]:
    """Return the workers that survived raylet: they are no longer descendants, and keep its working folder."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter() if ending.gone is not None else ():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == ending.folder:
                found.append(process)
    return found


def shut_down_ray(ending: Ending) -> None:
    """Disconnect from Ray and end its daemons; wait for a limited time, a few seconds if a daemon is gone."""
    import ray

    if ending.gone is not None:
        _DAEMON_LOST.set()
    # In a thread: without its daemons, or where one does not respond, Ray's shutdown waits for a minute or for ever (a
    # call of its error subscriber has no deadline).
    running = threading.Thread(target=ray.shutdown, name="Ray's shutdown", daemon=True)
    running.start()
    running.join(SHUTDOWN_S if ending.gone is None else SHUTDOWN_OF_LOST_S)
    if running.is_alive():
        _DAEMON_LOST.set()
        atexit.unregister(ray.shutdown)


def end_process(code: int) -> NoReturn:
    """End this process with an exit code.

    After the loss of a daemon, threads of Ray's native code may still run. The destructors that run at a normal exit
    free what these threads use, and the process would end by SIGABRT or SIGSEGV; so they are passed over.
    """
    if not _DAEMON_LOST.is_set():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_at_once(ending: Ending) -> None:
    # The main thread waits within Ray for a daemon that will not come back, and takes no signal.
    for process in [*psutil.Process().children(recursive=True), *orphans(ending)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if ending.lost is not None:
        sys.stderr.write(f"relook: {ending.lost}\n")
    os._exit(1 if ending.lost is not None else 128 + signal.SIGTERM)
