"""The local Label Studio server of a RELOOK_HOME: start it, find it again, stop it.

It runs on SQLite under RELOOK_HOME, listens on loopback only, and has a session of its own, so that it keeps running
when the command that started it ends. Its account is created once and passed in environment variables. Its process id
is kept in a file. To detect a later process with the same id, the data folder in the environment variables of the
process is compared as well.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import time
from pathlib import Path

import httpx
import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from labeling.environment import (
    DATA_VARIABLE,
    DATABASE,
    Environment,
    ReportLine,
    environment_of,
    exclusive,
    install,
    server_variables,
)
from labeling.settings import LabelingSettings
from labeling.webhooks import webhook_variables
from records.durable import replacing, write_file
from records.errors import ConfigError, IntegrityError, LabelStudioError, LabelStudioStartError
from records.home import Home
from records.ids import utc_now

USERNAME = "annotator@relook.local"
_HOST = "127.0.0.1"
_STOP_TIMEOUT_S = 10.0
_LOG_LIMIT_BYTES = 20_000_000


class Secrets(BaseModel):
    """The account of the local server, created once per RELOOK_HOME."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    username: str
    password: SecretStr
    token: SecretStr


class ServerInfo(BaseModel):
    """Address and account of a running local Label Studio."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    version: str
    username: str
    password: SecretStr
    token: SecretStr
    pid: int
    started_at: AwareDatetime


class _Process(BaseModel):
    """Content of the state file, which is written as soon as the process exists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    pid: int
    started_at: AwareDatetime
    version: str | None = Field(default=None, description="empty until it responds")


class LocalLabelStudio:
    """The Label Studio of one RELOOK_HOME; the settings name its port, timeouts and environment."""

    def __init__(self, home: Home, settings: LabelingSettings) -> None:
        self._home = home
        self._settings = settings

    @property
    def environment(self) -> Environment:
        """The virtual environment that it is started from."""
        return environment_of(self._settings)

    @property
    def keys_file(self) -> Path:
        """File with its account."""
        return self._home.keys / "label-studio.json"

    @property
    def log_file(self) -> Path:
        """File with its output."""
        return self._home.logs / "label-studio.log"

    @property
    def existed(self) -> bool:
        """Whether it was ever started in this home."""
        return (self._home.label_studio / DATABASE).is_file()

    def up(self, report: ReportLine = lambda text: None) -> ServerInfo:
        """Start the server, or find it running.

        Args:
            report: called with lines of progress.
        Returns:
            Address and account, the same as long as the process runs.
        Raises:
            ConfigError: the port is taken, or the environment cannot be used.
            LabelStudioError: it could not be installed, or did not come up in time.
        """
        running = self.status()
        if running is not None:
            return running
        install(self.environment, report)
        waiting = "waiting for another process that starts Label Studio"
        with exclusive(self._home.label_studio / "up.lock", lambda: report(waiting)):
            # Looked up again, now that the lock is held: the process that was waited for may have started it.
            return self.status() or self._start(report)

    def _start(self, report: ReportLine) -> ServerInfo:
        process = self._known_process()
        # A process without a version was started by a command that was killed while it waited. No second process is
        # started; this command waits for the first.
        if process is None or not self._is_alive(process.pid):
            process = self._spawn(self._free_port(), self._account())
        try:
            version = self._wait(process, report)
            process = process.model_copy(update={"version": version})
            write_file(self._state_file, process.model_dump_json(), mode=0o600, sync=False)
        except BaseException:
            self.down()
            raise
        return self._info(process, version)

    def status(self) -> ServerInfo | None:
        """Return address and account of the server, or None if it is down or still starting."""
        process = self._known_process()
        if process is None or process.version is None or not self._is_alive(process.pid):
            return None
        return self._info(process, process.version)

    def down(self) -> bool:
        """Stop the server and its child processes; returns False if it was not running."""
        process = self._known_process()
        if process is None:
            return False
        ran = self._is_alive(process.pid)
        if ran:
            self._stop(process)
        self._state_file.unlink(missing_ok=True)
        return ran

    @property
    def _state_file(self) -> Path:
        return self._home.label_studio / "server.json"

    def _info(self, process: _Process, version: str) -> ServerInfo:
        account = self._account()
        return ServerInfo(
            url=process.url,
            version=version,
            username=account.username,
            password=account.password,
            token=account.token,
            pid=process.pid,
            started_at=process.started_at,
        )

    def _known_process(self) -> _Process | None:
        try:
            return _Process.model_validate_json(self._state_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise IntegrityError(f"{self._state_file} is damaged; delete it and run `relook label up`") from error

    def _account(self) -> Secrets:
        try:
            return Secrets.model_validate_json(self.keys_file.read_bytes())
        except FileNotFoundError:
            pass
        except ValidationError as error:
            raise IntegrityError(f"{self.keys_file} is damaged; restore it from a backup") from error
        if self.existed:
            raise LabelStudioError(
                f"the account of Label Studio is lost: {self.keys_file} is missing; restore it from a backup, "
                f"or move {self._home.label_studio} away to start with an empty Label Studio"
            )
        made = {"username": USERNAME, "password": secrets.token_urlsafe(12), "token": secrets.token_hex(20)}
        write_file(self.keys_file, json.dumps(made), mode=0o600)
        return Secrets.model_validate(made)

    def _free_port(self) -> int:
        port = self._settings.port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError as error:
                raise ConfigError(
                    f"labeling.port {port} cannot be used for Label Studio ({error.strerror}); stop what listens "
                    f"there or choose another with --set labeling.port={port + 1 if port < 65535 else 8090}"
                ) from error
            return int(probe.getsockname()[1])

    def _prepare_data(self) -> None:
        self._home.label_studio.chmod(0o700)
        if not self.existed:
            with replacing(self._home.label_studio / DATABASE) as temporary:
                shutil.copyfile(self.environment.template, temporary)
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))

    def _spawn(self, port: int, account: Secrets) -> _Process:
        self._prepare_data()
        variables = server_variables(
            self._home.label_studio,
            {
                "LABEL_STUDIO_USERNAME": account.username,
                "LABEL_STUDIO_PASSWORD": account.password.get_secret_value(),
                "LABEL_STUDIO_USER_TOKEN": account.token.get_secret_value(),
                **webhook_variables(self._settings.webhook_url),
            },
        )
        program = str(self.environment.program)
        arguments = ["start", "--no-browser", "--internal-host", _HOST, "--port", str(port)]
        # In the home, since the caller may be in a folder that is removed, as the driver of Ray is for a moment.
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", 'cd "$0" && exec "$@"', str(self._home.label_studio), program, *arguments],
            variables,
            setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log_file), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        process = _Process(url=f"http://{_HOST}:{port}", pid=pid, started_at=utc_now())
        # Written before the wait: if this process is killed while waiting, the server can still be found and stopped.
        write_file(self._state_file, process.model_dump_json(), mode=0o600, sync=False)
        return process

    def _wait(self, process: _Process, report: ReportLine) -> str:
        url = process.url
        started = time.monotonic()
        while (waited_s := time.monotonic() - started) < self._settings.start_timeout_s:
            report(f"starting Label Studio at {url} ({waited_s:.0f} s)")
            if not self._is_alive(process.pid):
                raise LabelStudioStartError(f"Label Studio stopped while it started: {self._last_log_line()}")
            version = _version(url)
            if version is not None:
                return version
            time.sleep(0.1)
        raise LabelStudioStartError(
            f"Label Studio did not come up within {self._settings.start_timeout_s:g} s "
            f"(labeling.start_timeout_s): {self._last_log_line()}"
        )

    def _is_alive(self, pid: int) -> bool:
        _reap(pid)
        try:
            # Identified by its data folder, not by its start time, which moves when the clock of the machine is set.
            process = psutil.Process(pid)
            variables = process.environ()
            # Between fork and exec a process shows no variables; a child of this process is then the one just spawned.
            is_spawning = not variables and process.ppid() == os.getpid()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
        return is_spawning or variables.get(DATA_VARIABLE) == str(self._home.label_studio)

    def _stop(self, process: _Process) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                # The server leads its own process group: this reaches its children and nothing else.
                os.killpg(process.pid, number)
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            while time.monotonic() < deadline:
                if not self._is_alive(process.pid):
                    _wait_until_gone(process)
                    return
                time.sleep(0.05)

    def _last_log_line(self) -> str:
        lines = [line.strip() for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'its log is empty'}; see {self.log_file}"


def _version(url: str) -> str | None:
    """Return the release of the server, or None if it does not respond yet."""
    try:
        # A proxy from the environment cannot reach the loopback of this machine.
        with httpx.Client(trust_env=False, timeout=30) as http:
            if not http.get(f"{url}/health").is_success:
                return None
            return str(http.get(f"{url}/api/version").json()["release"])
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def _reap(pid: int) -> bool:
    """Return whether a process is no running child of this one."""
    # A child that ended stays a zombie, and looks alive, until its parent waits for it.
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _wait_until_gone(process: _Process) -> None:
    """Wait until a stopped server has released its port, so that the next one can bind it."""
    port = int(process.url.rsplit(":", 1)[1])
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if _reap(process.pid) and probe.connect_ex((_HOST, port)) != 0:
                return
        time.sleep(0.02)
