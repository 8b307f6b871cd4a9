"""The Ray session of one command: started with token authentication, and ended without leaving a process.

In: `Settings`. Out: a context in which `ray` is initialised: a local Ray, on loopback only, or a connection to a
running cluster. It schedules no work.
"""

import contextlib
import importlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.daemons import (
    Ending,
    daemons_in_own_session,
    orderly_sigterm,
    orphans,
    shut_down_ray,
    time_for_a_slow_node,
    watched_daemons,
)
from cluster.settings import ClusterSettings, Settings
from images.settings import limits_variable
from records.errors import ConfigError, ContractError, UnavailableError
from records.home import Home, open_home
from records.keys import key_file
from records.settings import environment

# Ray appends `/session_<time>_<pid>/sockets/plasma_store` (about 65 characters); Unix limits a socket's path to 107.
MAX_TEMP_DIR_CHARS = 40
PROBE_TIMEOUT_S = 3.0
START_ATTEMPTS = 2
_OWNER = "owner.pid"
_TOO_SLOW = "timed out during startup"
_KILLED_WITHIN_S = 60.0
# Ray logs the controller's requested shutdown as an error.
_EXPECTED_AT_THE_END = re.compile(r"Task ServeController\.graceful_shutdown failed")
NOT_UPLOADED = (".relook", ".venv", "venv", ".git", "**/__pycache__", ".*_cache", "tests", "bench", "docs")

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's default is 15 for every worker, replicas of a service included: any other process would slow them down.
    "RAY_worker_niceness": "0",
    # Idle threads of a forward pass sleep instead of spinning, which is OpenMP's default. Spinning threads take the
    # core from other processes: beside one busy process, inference on two threads ran at half of its rate.
    "OMP_WAIT_POLICY": "passive",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
_LOCAL = {
    # An idle Ray takes 466 MB; without prestarted workers and metrics 350 MB.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Ray keeps as many idle processes as it has CPUs; one that has trained holds 0.5 GB and more. A minute is enough
    # for the next fit of a round to find it.
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_enable_metrics_collection": "0",
    # Serve's control loop runs ten times a second by default, which took 5 % of a core when idle.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # With "0" Ray uses 127.0.0.1 as the node's address, as on desktop systems. Its ports accept code to run and are
    # not encrypted; on loopback no other machine can reach them, whatever the firewall.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True)
class RaySession:
    """A running Ray; `owned` if this process started it, `logs` only then."""

    address: str
    owned: bool
    logs: Path | None


@contextlib.contextmanager
def start_ray(settings: Settings) -> Iterator[RaySession]:
    """Start Ray here, or connect to the cluster at `cluster.ray_address`, while the context lasts.

    Args:
        settings: `cluster` sets the size of Ray; `records.home` keeps its token and logs.
    Yields:
        The session. At the end every process of a local Ray is gone, also after Ctrl-C or an error.
    Raises:
        ConfigError: token authentication is disabled by the environment, or the temporary path is too long.
        ContractError: Ray is already initialised in this process.
        UnavailableError: Ray does not start, or the cluster does not respond.
    """
    require_token_mode(os.environ)
    if ray_is_running():
        raise ContractError("Ray is already initialised in this process; open one session around the whole command")
    environ = {"RAY_AUTH_MODE": "token", **_QUIET, **limits_variable(settings.images)}
    if settings.cluster.ray_address:
        with environment(environ), orderly_sigterm():
            yield from _joined(settings, environ)
    else:
        home = open_home(settings.records.home)
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            environ["RAY_AUTH_TOKEN_PATH"] = str(ray_token_file(home))
        with environment({**_LOCAL, **environ}), orderly_sigterm() as ending:
            yield from _local(settings, home, ending)


def require_token_mode(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if the environment disables token authentication."""
    # Without a token Ray runs any code from anyone who reaches its ports, and on loopback that is every local user.
    mode = environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise ConfigError(f"RAY_AUTH_MODE={mode!r} opens Ray to everyone who reaches its ports; unset it, or set token")


def ray_is_running() -> bool:
    """Return whether this process has a Ray session; does not import Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def is_listening(address: str) -> bool:
    """Return whether something listens at `host:port`; true for `auto`, which names no address."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return True
    try:
        # A probe of 3 s, since Ray itself would try to connect for a minute.
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def ray_token_file(home: Home) -> Path:
    """Return the file with this home's Ray token, created at first use with mode 0600."""
    return key_file(home, "ray_token")


def _local(settings: Settings, home: Home, ending: Ending) -> Iterator[RaySession]:
    wanted = settings.cluster
    temp_dir = _temp_dir(wanted.temp_dir)
    failed = True
    with contextlib.ExitStack() as running:
        clean_up: Callable[[], object] = list
        try:
            _init_here(temp_dir, wanted)
            clean_up = running.enter_context(watched_daemons(ending))
            yield RaySession(address=_address(), owned=True, logs=temp_dir / "session_latest" / "logs")
            failed = False
        # Stopped on purpose: nobody will look for Ray's logs.
        except (KeyboardInterrupt, SystemExit):
            failed = ending.lost is not None
            if not failed:
                raise
        finally:
            clean_up()
            with _uninterrupted():
                # Before the shutdown: workers that survive the daemons are no longer descendants of this process.
                started = [*_processes_under(temp_dir), *orphans(ending)]
                if ending.gone is not None:
                    _end(started, timeout_s=0)
                shut_down_ray(ending)
                _end(started, wanted.stop_timeout_s)
                if failed:
                    _keep_logs(temp_dir, home)
                shutil.rmtree(temp_dir, ignore_errors=True)
            if failed and ending.lost is not None:
                raise UnavailableError(f"{ending.lost}; its logs are in {home.logs / 'ray'}")


def _init_here(temp_dir: Path, wanted: ClusterSettings) -> None:
    """Start a local Ray; try again if its node did not start in time, as on a busy machine."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            _init(
                address="local",
                num_cpus=wanted.logical_cpus,
                num_gpus=wanted.num_gpus,
                object_store_memory=wanted.object_store_mb * 2**20,
                include_dashboard=False,
                log_to_driver=wanted.worker_logs,
                _temp_dir=str(temp_dir),
                _system_config={"enable_metrics_collection": False},
            )
        except UnavailableError as error:
            if attempt == START_ATTEMPTS or _TOO_SLOW not in str(error):
                raise
            _end(_processes_under(temp_dir), timeout_s=0)
        else:
            return


def _joined(settings: Settings, environ: Mapping[str, str]) -> Iterator[RaySession]:
    # The nodes were started with an authentication mode of their own; a runtime environment must not set another.
    variables = {name: value for name, value in environ.items() if not name.startswith("RAY_AUTH")}
    runtime_env: dict[str, Any] = {"env_vars": variables}
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        excludes = [*NOT_UPLOADED]
        if settings.records.home.is_relative_to(root):
            excludes.append(str(settings.records.home.relative_to(root)))
        # In a checkout the code is uploaded, so that workers run this version and not the one installed on the nodes.
        runtime_env |= {"working_dir": str(root), "excludes": excludes}
    address = settings.cluster.ray_address
    if address is not None and not is_listening(address):
        raise UnavailableError(
            f"no Ray responds at {address}; start it (ray up ray_cluster.yaml), or unset RELOOK_RAY_ADDRESS"
        )
    try:
        _init(
            address=address,
            runtime_env=runtime_env,
            log_to_driver=settings.cluster.worker_logs,
        )
        yield RaySession(address=_address(), owned=False, logs=None)
    finally:
        with _uninterrupted():
            shut_down_ray(Ending())


def _init(**options: Any) -> None:
    import ray
    from ray._private import ray_constants
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.ray_logging import stdout_deduplicator

    native: Any = importlib.import_module("ray._raylet")
    if "RAY_DEDUP_LOGS_SKIP_REGEX" not in os.environ:
        stdout_deduplicator.skip_re = _EXPECTED_AT_THE_END
    if options["address"] == "local":
        # Ray reads the variable when it is imported, which may have happened before this session set it.
        ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray caches authentication mode and token at first use; a second session in this process has another token.
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()
    if not is_token_auth_enabled():
        raise UnavailableError("Ray did not enable token authentication, so it was not started; check its version")
    try:
        # `ray.init` installs its own SIGTERM handler; leaving this block restores ours.
        with (
            orderly_sigterm(),
            daemons_in_own_session(),
            time_for_a_slow_node(),
            _clean_working_folder(options.get("_temp_dir")),
        ):
            ray.init(configure_logging=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises a bare Exception for a node that is too slow
        what = "start here" if options["address"] == "local" else f"respond at {options['address']}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnavailableError(f"Ray did not {what}: {reason[:300]}") from error


@contextlib.contextmanager
def _clean_working_folder(temp_dir: str | None) -> Iterator[None]:
    """Be in an empty folder while the block runs.

    Ray puts the working folder of its driver first on the import path of every worker, and its local daemons keep it
    as theirs. A folder of the user's that is named like one of our packages (`records`, `serving`) would be imported
    instead of ours.
    """
    before = Path.cwd()
    # Below the session's folder, since it has to last as long as the daemons; a cluster's daemons have their own.
    empty = Path(tempfile.mkdtemp(prefix="relook-empty-", dir=temp_dir))
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(before)
        if temp_dir is None:
            empty.rmdir()


def _address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _temp_dir(wanted: Path | None) -> Path:
    if wanted is None:
        base = Path(tempfile.gettempdir())
        # TMPDIR may be long, as on macOS; a socket in it could not be bound.
        if len(str(base)) > MAX_TEMP_DIR_CHARS - len("/relook-12345678"):
            base = Path("/tmp")
        _sweep(base)
        path = Path(tempfile.mkdtemp(prefix="relook-", dir=base))
        (path / _OWNER).write_text(str(os.getpid()))
        return path
    path = Path(os.path.abspath(wanted))
    if len(str(path)) > MAX_TEMP_DIR_CHARS:
        raise ConfigError(
            f"cluster.temp_dir {str(path)!r} has {len(str(path))} characters and sockets allow {MAX_TEMP_DIR_CHARS}; "
            "choose a shorter one, such as /tmp/relook"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _sweep(base: Path) -> None:
    """Remove the folders of sessions whose process was killed."""
    for owner in base.glob(f"relook-*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            # A folder belongs to a running session as long as its process lives; a kill (SIGKILL) skips its cleanup.
            if not psutil.pid_exists(int(owner.read_text())):
                shutil.rmtree(owner.parent)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM while the block runs: a second one during the cleanup would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _processes_under(temp_dir: Path) -> list[psutil.Process]:
    """Return Ray's daemons of this session with all their descendants."""
    # This process has other children, such as Label Studio. Ray's name the session's folder in their command line.
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(temp_dir) in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Wait for processes to end, then kill those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # A killed process runs for a moment more, on a busy machine for seconds, and Python warns if its `Popen` object is
    # gone before it. The exit code is left to that object; psutil's own waiting would take it.
    deadline = time.monotonic() + _KILLED_WITHIN_S
    while any(map(_runs, alive)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _keep_logs(temp_dir: Path, home: Home) -> None:
    """Move Ray's logs to the home after a failure."""
    for session in temp_dir.glob("session_2*"):
        if (session / "logs").is_dir():
            shutil.move(session / "logs", home.logs / "ray" / session.name)
