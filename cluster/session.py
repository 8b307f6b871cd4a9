"""The Ray session of one command: started with token authentication, ended with nothing left behind.

In: `Settings`. Out: a context in which `ray` is initialised, either as a Ray of our own on this
machine (on loopback only) or joined to a running cluster. It places no work; trainers, tuning and
serving do.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from cluster.settings import ClusterSettings, Settings
from records.errors import ConfigError, ContractError, UnavailableError
from records.home import Home, open_home
from records.keys import key_file
from records.settings import environment

# Ray appends `/session_<time>_<pid>/sockets/plasma_store` (about 65 characters); a socket's path ends at 107.
MAX_TEMP_DIR_CHARS = 40
PROBE_TIMEOUT_S = 3.0
_OWNER = "owner.pid"
_TOO_SLOW = "timed out during startup"
# Ray tells as an error that Serve's controller, asked to end, has ended.
_EXPECTED_AT_THE_END = re.compile(r"Task ServeController\.graceful_shutdown failed")
NOT_UPLOADED = (".relook", ".venv", "venv", ".git", "**/__pycache__", ".*_cache", "tests", "bench", "docs")

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would run every worker at 15, a service's replicas as well: behind all else on the machine.
    "RAY_worker_niceness": "0",
    # Threads of one forward pass wait for each other asleep. Awake, as OpenMP has it, they take the core from whoever
    # works there, and one busy neighbour costs a network on two threads half of its rate, alone in a batch four fifths.
    "OMP_WAIT_POLICY": "passive",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
_LOCAL = {
    # Idle, Ray takes 466 MB; without workers in stock and without its metrics pipeline, 350 MB.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    # Serve looks at its replicas ten times a second, which took 5 % of a core for nothing.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray takes loopback as the node's address, as it does on desktop systems: every port it opens stays on 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True)
class RaySession:
    """A Ray that answers."""

    address: str
    owned: bool
    logs: Path | None


@contextlib.contextmanager
def start_ray(settings: Settings) -> Iterator[RaySession]:
    """Start Ray here, or join the cluster of `cluster.ray_address`, for the length of the context.

    Args:
        settings: of the command; `cluster` says how large Ray is, `records.home` keeps its token and logs.
    Yields:
        The session. At the end every process that Ray started here is gone, also after Ctrl-C or an error.
    Raises:
        ConfigError: token authentication is switched off by the environment, or the temporary path is too long.
        ContractError: Ray is already initialised in this process.
        UnavailableError: Ray does not start, or the cluster does not answer.
    """
    require_token_mode(os.environ)
    if ray_is_running():
        raise ContractError("Ray is already initialised in this process; open one session around the whole command")
    environ = {"RAY_AUTH_MODE": "token", **_QUIET}
    if settings.cluster.ray_address:
        with environment(environ), _orderly_sigterm():
            yield from _joined(settings, environ)
    else:
        home = open_home(settings.records.home)
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            environ["RAY_AUTH_TOKEN_PATH"] = str(ray_token_file(home))
        with environment({**_LOCAL, **environ}), _orderly_sigterm():
            yield from _local(settings, home)


def require_token_mode(environ: Mapping[str, str]) -> None:
    """Refuse an environment that would open Ray.

    Args:
        environ: of the process that will start Ray.
    Raises:
        ConfigError: it switches token authentication off.
    """
    mode = environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise ConfigError(f"RAY_AUTH_MODE={mode!r} opens Ray to everyone who reaches its ports; unset it, or set token")


def ray_is_running() -> bool:
    """Return whether this process has a Ray session; asking does not import Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def answers(address: str) -> bool:
    """Return whether something listens at `host:port`; `auto` names no place to ask, and counts as an answer."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return True
    try:
        # Asked before Ray is, which would try for a minute.
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def ray_token_file(home: Home) -> Path:
    """Return the file with this home's Ray token, made at first use, readable by its owner only."""
    return key_file(home, "ray_token")


def _local(settings: Settings, home: Home) -> Iterator[RaySession]:
    wanted = settings.cluster
    temp_dir = _temp_dir(wanted.temp_dir)
    failed = True
    try:
        _init_here(temp_dir, wanted)
        yield RaySession(address=_address(), owned=True, logs=temp_dir / "session_latest" / "logs")
        failed = False
    except (KeyboardInterrupt, SystemExit):
        failed = False
        raise
    finally:
        with _uninterrupted():
            started = _processes_under(temp_dir)
            _shutdown()
            _end(started, wanted.stop_timeout_s)
            if failed:
                _keep_logs(temp_dir, home)
            shutil.rmtree(temp_dir, ignore_errors=True)


def _init_here(temp_dir: Path, wanted: ClusterSettings) -> None:
    """Start Ray; once more if its node took longer than the 30 s that Ray allows it, as on a machine just booted."""
    for attempt in (1, 2):
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
            if attempt == 2 or _TOO_SLOW not in str(error):
                raise
            _end(_processes_under(temp_dir), timeout_s=0)
        else:
            return


def _joined(settings: Settings, environ: Mapping[str, str]) -> Iterator[RaySession]:
    variables = {name: value for name, value in environ.items() if not name.startswith("RAY_AUTH")}
    runtime_env: dict[str, Any] = {"env_vars": variables}
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        excludes = [*NOT_UPLOADED]
        if settings.records.home.is_relative_to(root):
            excludes.append(str(settings.records.home.relative_to(root)))
        runtime_env |= {"working_dir": str(root), "excludes": excludes}
    address = settings.cluster.ray_address
    if address is not None and not answers(address):
        raise UnavailableError(
            f"no Ray answers at {address}; start it (ray up ray_cluster.yaml), or unset RELOOK_RAY_ADDRESS"
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
            _shutdown()


def _init(**options: Any) -> None:
    import ray
    from ray._private import ray_constants
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.ray_logging import stdout_deduplicator

    native: Any = importlib.import_module("ray._raylet")
    if "RAY_DEDUP_LOGS_SKIP_REGEX" not in os.environ:
        stdout_deduplicator.skip_re = _EXPECTED_AT_THE_END
    if options["address"] == "local":
        ray_constants.ENABLE_RAY_CLUSTER = False  # read at import, which may have been before our environment
    # Ray keeps mode and token of its first look at the environment; a second session of this process has its own.
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()
    if not is_token_auth_enabled():
        raise UnavailableError("Ray did not switch token authentication on, so it was not started; check its version")
    try:
        with _orderly_sigterm():
            ray.init(configure_logging=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # a node that is too slow to start is a bare one of Ray's
        what = "start here" if options["address"] == "local" else f"answer at {options['address']}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnavailableError(f"Ray did not {what}: {reason[:300]}") from error


def _address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _shutdown() -> None:
    import ray

    ray.shutdown()


def _temp_dir(wanted: Path | None) -> Path:
    if wanted is None:
        base = Path(tempfile.gettempdir())
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
    """Remove what sessions left behind whose process was killed."""
    for owner in base.glob(f"relook-*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int(owner.read_text())):
                shutil.rmtree(owner.parent)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait until the processes are gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """Make SIGTERM end the context as an error would; Ray's own handler prints a stack and stops no worker."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    handler = _exit_on_sigterm if before in (signal.SIG_DFL, None) else before
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _processes_under(temp_dir: Path) -> list[psutil.Process]:
    """Return Ray's daemons of this session and everything that runs below them."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(temp_dir) in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Wait for processes to end, then kill the ones that do not."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=timeout_s)


def _keep_logs(temp_dir: Path, home: Home) -> None:
    """Move Ray's logs to where someone can read them after a failure."""
    for session in temp_dir.glob("session_2*"):
        if (session / "logs").is_dir():
            shutil.move(session / "logs", home.logs / "ray" / session.name)
