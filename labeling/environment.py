"""Label Studio's own virtual environment, built once from a lock file and shared by every RELOOK_HOME.

Label Studio pins versions that conflict with Relook's, so it is installed into an environment of its own, together
with an empty, migrated database: copying that shortens a first start from half a minute to a few seconds. A marker
file that is written last says that the environment is complete and which lock it was built from. Nothing here starts
a server.
"""

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labeling.settings import LabelingSettings
from records.durable import write_file
from records.errors import ConfigError, LabelStudioError
from records.ids import sha256_hex

ReportLine = Callable[[str], None]
"""Called with one line of progress for the terminal."""

DATABASE = "label_studio.sqlite3"
DATA_VARIABLE = "LABEL_STUDIO_BASE_DATA_DIR"
_MARKER = "relook-ready.json"
_BUILDING = "relook-building"
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True)
class Environment:
    """The virtual environment of Label Studio in a folder."""

    folder: Path

    @property
    def python(self) -> Path:
        """The Python interpreter."""
        return self.folder / "bin" / "python"

    @property
    def program(self) -> Path:
        """The `label-studio` command."""
        return self.folder / "bin" / "label-studio"

    @property
    def template(self) -> Path:
        """An empty database with all migrations applied."""
        return self.folder / "template" / DATABASE

    @property
    def install_log(self) -> Path:
        """Output of pip and of the migrations."""
        return self.folder.with_name(f"{self.folder.name}-install.log")


def environment_of(settings: LabelingSettings) -> Environment:
    """Return the environment that the settings name, whether it exists or not."""
    folder = settings.environment or Path(sys.prefix) / "label-studio"
    return Environment(Path(os.path.abspath(folder.expanduser())))


def lock_text() -> str:
    """Return the pinned versions, one a line."""
    return Path(__file__).with_name("label_studio_requirements.lock").read_text()


def is_ready(environment: Environment) -> bool:
    """Return whether the environment is complete and was built from the current lock file."""
    marker = environment.folder / _MARKER
    if not marker.is_file() or not environment.template.is_file() or not environment.program.is_file():
        return False
    found: object = json.loads(marker.read_text())
    return isinstance(found, dict) and found.get("lock") == _lock_hash()


def install(environment: Environment, report: ReportLine) -> bool:
    """Build the environment unless it is ready.

    Args:
        environment: to build.
        report: called with lines of progress.
    Returns:
        True if it was built, False if it was ready.
    Raises:
        ConfigError: the folder holds other files, or cannot be written.
        LabelStudioError: a package could not be installed; the message names the log.
    """
    if is_ready(environment):
        return False
    lock_path = environment.folder.with_name(f".{environment.folder.name}.lock")
    with exclusive(lock_path, lambda: report("waiting for another process that installs Label Studio")) as lock_file:
        # Again, now that the lock is held: the process that was waited for may have built it.
        if is_ready(environment):
            return False
        _clear(environment)
        builder = _Builder(environment, report, lock_file)
        builder.make_environment()
        builder.install_packages()
        builder.make_template()
        write_file(environment.folder / _MARKER, json.dumps({"lock": _lock_hash(), "python": sys.version.split()[0]}))
        (environment.folder / _BUILDING).unlink()
    return True


def server_variables(data_folder: Path, secrets: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a Label Studio process.

    Args:
        data_folder: for its database and files.
        secrets: further variables; the command line would show them in `ps`.
    Returns:
        All variables of the process; only those in `_KEPT_VARIABLES` come from the caller's environment.
    """
    # Label Studio reads unprefixed names such as PORT, HOST and DEBUG as well, which are set for other programs.
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        DATA_VARIABLE: str(data_folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
        "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
        # Both default to an error reporting service on the internet.
        "LABEL_STUDIO_SENTRY_DSN": "",
        "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
        **secrets,
    }


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Generator[int]:
    """Hold a lock file while the block runs.

    Args:
        path: of the lock file; created if it is missing.
        on_wait: called once if another process holds the lock.
    Yields:
        The open file descriptor.
    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(
            f"folder {str(path.parent)!r} cannot be written ({error.strerror}); name one that this user may write"
        ) from error
    try:
        # flock rather than the existence of the file: the kernel frees it when the holder is killed.
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _lock_hash() -> str:
    return sha256_hex(lock_text().encode())


def _clear(environment: Environment) -> None:
    """Remove what an interrupted or older install left; ConfigError if the folder holds anything else."""
    folder = environment.folder
    discarded = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    if folder.exists() and any(folder.iterdir()):
        if not any((folder / name).is_file() for name in (_MARKER, _BUILDING)):
            raise ConfigError(
                f"labeling.environment {str(folder)!r} holds files that Relook did not make; "
                "name an empty or a new folder"
            )
        # Renamed first: if the deletion is interrupted, the folder is gone as a whole and not half an environment.
        folder.replace(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _BUILDING).write_text("an install that did not end; the next one starts over\n")


@dataclass(frozen=True)
class _Builder:
    environment: Environment
    report: ReportLine
    lock_file: int

    def make_environment(self) -> None:
        self.report("making a virtual environment for Label Studio")
        self.environment.install_log.write_text("")
        self._run([sys.executable, "-I", "-m", "venv", str(self.environment.folder)])

    def install_packages(self) -> None:
        requirements = self.environment.folder / "requirements.lock"
        requirements.write_text(lock_text())
        total = sum(1 for line in lock_text().splitlines() if "==" in line)
        collected = 0

        def on_line(line: str) -> None:
            nonlocal collected
            # A wheel from a local folder is processed, one from an index is collected.
            if line.startswith(("Collecting ", "Processing ")):
                collected += 1
                self.report(f"fetching Label Studio, package {min(collected, total)} of {total}")
            elif line.startswith("Installing collected packages"):
                self.report(f"unpacking {total} packages of Label Studio (about half a minute)")

        command = [str(self.environment.python), "-I", "-m", "pip", "install", "--disable-pip-version-check"]
        # Most of the gigabyte is never imported: compiling on first use is faster than compiling all of it.
        self._run(
            [
                *command,
                "--no-input",
                "--progress-bar",
                "off",
                "--no-compile",
                "--require-hashes",
                "-r",
                str(requirements),
            ],
            on_line,
        )

    def make_template(self) -> None:
        self.report("preparing an empty Label Studio database (about half a minute)")
        work = self.environment.folder / "template.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        # Without a user: each local server creates its own, with its own password and token.
        variables = server_variables(work, {"LABEL_STUDIO_USERNAME": "", "LABEL_STUDIO_PASSWORD": ""})
        self._run([str(self.environment.program), "version"], variables=variables)
        connection = sqlite3.connect(work / DATABASE)
        try:
            # Stored in the database file, so that copies have it. In WAL mode readers do not wait for writers, and a
            # write takes half the time. The checkpoint empties the log, which is not copied.
            connection.execute("PRAGMA journal_mode=wal")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
        self.environment.template.parent.mkdir(exist_ok=True)
        (work / DATABASE).replace(self.environment.template)
        shutil.rmtree(work)

    def _run(
        self,
        command: list[str],
        on_line: ReportLine = lambda line: None,
        *,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        with (
            self.environment.install_log.open("a") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=variables,
                # The child inherits the lock: if this process is killed, pip may go on writing into the folder, and
                # the next install has to wait until it ends.
                pass_fds=[self.lock_file],
            ) as process,
        ):
            try:
                last = ""
                for line in process.stdout or ():
                    log.write(line)
                    last = line.strip() or last
                    on_line(line.strip())
                code = process.wait()
            except BaseException:
                process.kill()
                raise
        if code != 0:
            raise LabelStudioError(
                f"Label Studio could not be installed: {last or f'exit code {code}'}; "
                f"see {self.environment.install_log}, then run `relook label install` again"
            )
