"""Fixtures that every room's tests share: a home of their own, real data if there are any, one Ray, one browser.

The environment is cleaned of Relook's variables once, before the first test: a developer's shell decides nothing.
"""

import contextlib
import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import typer
import typer.main
import typer.testing
from _pytest.nodeid import NodeId
from httpx._transports import default as httpx_transports

from records.ledger import ledger, open_ledger
from records.settings import RecordsSettings
from records.store import Store, open_store
from tests.postgresql import _databases, new_database, postgresql

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from cluster.session import RaySession
    from cluster.settings import Settings

__all__ = ["_databases", "new_database", "postgresql"]

KEPT_VARIABLES = {
    "RELOOK_TEST_DATA",
    "RELOOK_TEST_S3",
    "RELOOK_TEST_PROMETHEUS",
    "RELOOK_REQUIRE_BROWSER",
    "RELOOK_REQUIRE_NGINX",
    "RELOOK_TEST_PRECISION",
}

PRECISION = os.environ.get("RELOOK_TEST_PRECISION", "fp32")
"""What `precision=auto` means in the tests, on every machine: fp32, or bf16, which torch emulates where it has to."""

# Read when torch is loaded, which nothing above does. Two test files at a time share the cores with Ray and a browser:
# OpenMP's threads would wait for each other awake, and a network then takes four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# The tests start some hundred processes, Ray's workers among them: each would compile our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Ray's workers do not have the working folder on their import path; some run functions of the tests.
_ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))


SERVERS = {"ray_session": "Ray", "server": "Label Studio", "new_database": "PostgreSQL"}
"""Fixtures whose tests share a server, each with the name of the server."""

GROUP = pytest.StashKey[str]()

RUNNING: dict[str, contextlib.ExitStack] = {}
"""Servers that run, by name."""


@pytest.fixture(scope="session", autouse=True)
def _closed_environment() -> Iterator[None]:
    """Take Relook's own variables out of the environment, keep Ray's door shut and every program quiet."""
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("RELOOK_") and name not in KEPT_VARIABLES]:
        patch.delenv(name)
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    patch.setenv("MPLBACKEND", "Agg")
    # The hardware decides what `auto` means, so a figure that a test checks would depend on the machine. Processes
    # that a test starts read the settings from the environment; this one is told directly.
    patch.setenv("RELOOK_TRAINERS__PRECISION", PRECISION)
    patch.setenv("RELOOK_SERVING__PRECISION", PRECISION)
    patch.setattr("vision.precision.has_native_bf16", lambda device="cpu": PRECISION == "bf16")
    # Width, language and time zone of whoever runs the tests change help texts, sorting and printed times.
    patch.setenv("COLUMNS", "120")
    patch.delenv("FORCE_COLOR", raising=False)
    patch.delenv("NO_COLOR", raising=False)
    # A shell without job control starts what it sends to the background with Ctrl-C ignored, and every process that
    # a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger file with its schema; a copy of it saves each test the migrations."""
    path = tmp_path_factory.mktemp("migrated") / "ledger.db"
    open_ledger(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session", autouse=True)
def _quick_starts(migrated: Path) -> Iterator[None]:
    """Do once in this process what thousands of tests would repeat.

    - A new SQLite ledger begins as a copy. The migrations have tests of their own, and processes that tests start run
      them as users do.
    - Nobody waits for a disk: what outlives a power cut is tested in processes of their own.
    - Clients of HTTP share the certificates of the authorities, whose reading takes longer than a request here.
    - Verbs that run in this process share the command with all its options, which takes 55 ms to build.
    """
    command = _built_once(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "upgrade", _copying(migrated, ledger.upgrade))
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(httpx_transports, "create_ssl_context", _remembering(httpx_transports.create_ssl_context))
        patch.setattr(typer.main, "get_command", command)
        patch.setattr(typer.testing, "_get_command", command)
        yield


def _copying(migrated: Path, upgrade: Callable[[sa.Engine], None]) -> Callable[[sa.Engine], None]:
    def copy_or_upgrade(engine: sa.Engine) -> None:
        file = Path(engine.url.database or "")
        if engine.dialect.name != "sqlite" or file.exists() or not os.access(file.parent, os.W_OK):
            upgrade(engine)
            return
        copy = file.with_name(f"copy-{threading.get_ident()}")
        shutil.copyfile(migrated, copy)
        # Threads may open a new ledger at once: it is never seen half written, and the first copy counts.
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(copy)
        copy.unlink()

    return copy_or_upgrade


def _built_once(build: Callable[[typer.Typer], Any]) -> Callable[[typer.Typer], Any]:
    made: dict[tuple[typer.Typer, int], Any] = {}

    def command(app: typer.Typer) -> Any:
        key = app, len(app.registered_commands)  # a test may add a verb of its own
        if key not in made:
            made[key] = build(app)
        return made[key]

    return command


def _remembering(create: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[tuple[str | None, ...], Any] = {}

    def one_context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> Any:
        if verify is not True or cert is not None:
            return create(verify=verify, cert=cert, trust_env=trust_env)
        places = tuple(os.environ.get(name) if trust_env else None for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
        if places not in made:
            made[places] = create(trust_env=trust_env)
        return made[places]

    return one_context


@pytest.fixture
def records_settings(tmp_path: Path, migrated: Path) -> RecordsSettings:
    """Settings of an empty home, whose ledger has its schema already."""
    (tmp_path / "home").mkdir()
    shutil.copy(migrated, tmp_path / "home" / "ledger.db")
    return RecordsSettings(home=tmp_path / "home")


@pytest.fixture
def store(records_settings: RecordsSettings) -> Iterator[Store]:
    """An open, empty store."""
    opened = open_store(records_settings)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real data; tests that need it are skipped where there is none."""
    folder = os.environ.get("RELOOK_TEST_DATA")
    if not folder:
        pytest.skip("RELOOK_TEST_DATA names no folder with real data")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"RELOOK_TEST_DATA={folder!r} is not a folder")
    return path


@pytest.fixture(scope="session")
def ham10000(test_data: Path) -> Path:
    """HAM10000 in its official layout."""
    folder = test_data / "ham10000"
    if not folder.is_dir():
        pytest.skip(f"{test_data} holds no ham10000 folder")
    return folder


@pytest.fixture(scope="session")
def ray_settings(tmp_path_factory: pytest.TempPathFactory) -> "Settings":
    """Settings of the Ray that the whole test session shares."""
    from cluster.sources import load_settings

    return load_settings(sets=[f"records.home={tmp_path_factory.mktemp('ray-home')}"])


@pytest.fixture(scope="session")
def until_last_test() -> Iterator[Callable[[str], contextlib.ExitStack]]:
    """Return where a server is entered by its name; it ends after the last test that shares it.

    Until the end of the process it would take memory and processor time beside all other tests.
    """
    yield lambda server: RUNNING.setdefault(server, contextlib.ExitStack())
    for server in list(RUNNING):  # the tests were interrupted
        RUNNING.pop(server).close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """End the server that no later test shares."""
    try:
        return (yield)
    finally:
        group = item.stash[GROUP]
        if group in RUNNING and (nextitem is None or nextitem.stash[GROUP] != group):
            RUNNING.pop(group).close()


@pytest.fixture(scope="session")
def ray_session(ray_settings: "Settings", until_last_test: Callable[[str], contextlib.ExitStack]) -> "RaySession":
    """One real Ray for all tests that need one: token authentication, 4 logical CPUs, loopback."""
    from cluster.session import start_ray

    return until_last_test("Ray").enter_context(start_ray(ray_settings))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium that can be driven headless."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator["Browser"]:
    """A headless Chromium of the module; open a new context per test.

    It keeps an event loop running in this thread, so no test outside the module may live beside it.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a GPU Chromium computes one, which takes a tenth more of the cores.
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take the shared fixtures, except in a process that only tells others what to run: they load torch."""
    runs_tests = hasattr(config, "workerinput") or not config.getoption("tx", None)
    if runs_tests:
        config.pluginmanager.import_plugin("tests.models")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests one process runs, and begin with those that take long.

    A file stays together, for what its tests share; all files that use the same server stay together, so that it is
    started once. Several processes take these groups in order: a long one that begins last keeps one of them at work
    alone. Tests that the run leaves out are gone by now, so what they would need decides nothing.
    """
    items.sort(key=lambda item: item.path)
    servers: dict[Path, str] = {}
    for item in items:
        for fixture, name in SERVERS.items():
            if not item.get_closest_marker("apart") and fixture in getattr(item, "fixturenames", ()):
                servers[item.path] = name
    long = {item.path for item in items if item.get_closest_marker("slow")}
    places: dict[str, tuple[bool, ...]] = {}
    for item in items:
        group = _group_of(item, servers)
        is_large = group in SERVERS.values() or group == "engines"
        item.stash[GROUP] = group
        places.setdefault(group, (not is_large, "e2e" not in item.path.parts, item.path not in long))
        if group != item.nodeid and config.getoption("loadgroup", False):  # this is one of several processes
            # What the marker `xdist_group` would do: pytest-xdist 3.8 writes the group into `_nodeid`, which pytest 9.2
            # does not read any more.
            item._id = NodeId.parse(f"{item.nodeid}@{group}")
    items.sort(key=lambda item: places[item.stash[GROUP]])


def _group_of(item: pytest.Item, servers: dict[Path, str]) -> str:
    """Return the group of a test: of its server, of its file, or its own."""
    if item.get_closest_marker("engines"):
        return "engines"
    if not item.get_closest_marker("apart"):
        return servers.get(item.path, f"{item.path.parent.name}/{item.path.stem}")
    names = [name for fixture, name in SERVERS.items() if fixture in getattr(item, "fixturenames", ())]
    return names[0] if names else item.nodeid


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collect without the garbage collector: a million objects are made that stay, and it would visit them all.

    Each of several processes begins with another folder. After a checkout nothing is compiled, and compiling takes a
    third of the collection; so each of them compiles a part, and the others read it.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and session.config.args == session.config.getini("testpaths"):
        folders = sorted(str(path.parent.relative_to(_ROOT)) for path in Path(_ROOT).glob("tests/*/test_*.py"))
        # A process that replaces one that crashed has a number beyond the count.
        number = int(worker.removeprefix("gw")) % count
        first = folders[number * len(folders) // count]
        folders = list(dict.fromkeys(folders))
        start = folders.index(first)
        session.config.args = [*folders[start:], *folders[:start], "tests"]
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where a browser is promised (RELOOK_REQUIRE_BROWSER=1), a browser test that skips has failed."""
    outcome = yield
    report = outcome.get_result()
    promised = os.environ.get("RELOOK_REQUIRE_BROWSER") == "1"
    if promised and report.skipped and item.get_closest_marker("browser") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped, but RELOOK_REQUIRE_BROWSER=1 promises a browser"
