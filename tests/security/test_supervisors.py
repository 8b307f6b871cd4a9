"""Commands end when a supervisor says so, when Ray's daemons are gone, and say why they failed."""

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import psutil
import pytest
import typer.main
from ray._private import services

from bench.processes import command_line
from cluster.cli import app
from cluster.daemons import WATCHED, Ending, daemons_in_own_session, time_for_a_slow_node, watched_daemons
from cluster.sources import load_settings
from records.command import advises_resume
from records.errors import ConfigError, DataError, LabelStudioError, UnavailableError, quoted_error
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ModelStatus
from tests.ports import free_port

pytestmark = pytest.mark.apart

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
UNITS = ("relook.service", "relook-watch.service")
# On a busy machine; alone, each ending takes 3 to 11 s.
ENDS_WITHIN_S = 600
# Ray's own declarations are not clean under the newest pydantic, and it warns about its own defaults.
OF_RAY = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WATCHED_NAMES = re.compile("|".join(WATCHED))
RELOOK = [sys.executable, "-m", "cluster.cli"]
WAITING = """
import sys, time
from cluster.daemons import end_process
from cluster.session import start_ray
from cluster.sources import load_settings
from records.command import until_stopped
from records.errors import RelookError

try:
    with until_stopped(), start_ray(load_settings(sets=["records.home=" + sys.argv[1]])):
        import ray

        @ray.remote
        class Busy:
            def work(self):
                time.sleep(600)

        busy = Busy.remote()
        print("ready", flush=True)
        try:
            ray.get(busy.work.remote())
        finally:
            # As Serve, Tune and Train do at their end: one more call that waits.
            ray.get(Busy.remote().work.remote())
except RelookError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    end_process(1)
end_process(0)
"""


HANGING = """
import atexit, threading
import ray
import cluster.daemons as daemons

atexit.register(print, "at exit")
ray.shutdown = threading.Event().wait
daemons.SHUTDOWN_S = 0.1
daemons.shut_down_ray(daemons.Ending())
print("shut down")
daemons.end_process(7)
"""


OTHER_ENDINGS = (("gcs_server", signal.SIGKILL), ("raylet", signal.SIGTERM))


class Started:
    """A command in a process group of its own, with all that it started."""

    def __init__(self, command: list[str], home: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "RELOOK_HOME": str(home), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.below: list[psutil.Process] = []

    def wait_for(self, text: str) -> None:
        """Wait until the command prints it, and note its processes."""
        deadline = time.monotonic() + 600
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        self.below = psutil.Process(self.process.pid).children(recursive=True)

    def said(self) -> str:
        """Everything that it printed."""
        return self._log.read_text(errors="replace")

    def daemon(self, name: str) -> psutil.Process:
        """One of Ray's daemons."""
        return next(process for process in self.below if name in "".join(command_line(process)[:1]))

    def ends(self) -> int:
        """Return the exit code; nothing is left."""
        code = self.process.wait(ENDS_WITHIN_S)
        _, alive = psutil.wait_procs(self.below, timeout=600)
        assert not alive, [command_line(process) for process in alive]
        return code


@contextmanager
def started(command: list[str], tmp_path: Path) -> Iterator[Started]:
    """Run a command; end it and what it started with the block."""
    running = Started(command, tmp_path / "home", tmp_path / "log.txt")
    try:
        yield running
    finally:
        for process in running.below:
            if process.is_running():
                process.kill()
        running.process.kill()
        running.process.wait()


def _kill_all(running: Started) -> None:
    """Signal every process, as systemd does by default."""
    for process in (psutil.Process(running.process.pid), *running.below):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            process.terminate()


def _twice(running: Started) -> None:
    """Signal the command and its group, as `timeout` does."""
    os.kill(running.process.pid, signal.SIGTERM)
    os.killpg(running.process.pid, signal.SIGTERM)


@pytest.mark.soak
@pytest.mark.parametrize("stop", [_kill_all, _twice])
def test_a_command_that_is_stopped_ends_with_all_its_processes(stop: Callable[[Started], None], tmp_path: Path) -> None:
    with started([sys.executable, "-c", WAITING, str(tmp_path / "home")], tmp_path) as running:
        running.wait_for("ready")
        stop(running)
        assert running.ends() == 0, running.said()


def test_a_shutdown_of_ray_that_hangs_is_given_up_and_its_process_ends_with_its_code() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (7, "shut down\n"), ended.stderr


def test_a_node_that_starts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = iter([RuntimeError("not known yet")] * 2)

    def get_node(address: str, node: str) -> str:
        for error in unknown:
            raise error
        return f"{node} at {address}"

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr("cluster.daemons.LOOK_EVERY_S", 0.0)
    with time_for_a_slow_node():
        assert services.get_node("here", node="one") == "one at here"
        unknown = iter([RuntimeError("never known")] * 100)
        monkeypatch.setattr("cluster.daemons.NODE_STARTS_WITHIN_S", 0.0)
        with pytest.raises(RuntimeError, match="never known"):
            services.get_node("here", node="one")
    assert services.get_node is get_node


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [("raylet", signal.SIGKILL), *(pytest.param(*case, marks=pytest.mark.soak) for case in OTHER_ENDINGS)],
)
def test_a_command_whose_daemon_is_gone_ends_with_a_sentence(name: str, number: int, tmp_path: Path) -> None:
    with started([sys.executable, "-c", WAITING, str(tmp_path / "home")], tmp_path) as running:
        running.wait_for("ready")
        running.daemon(name).send_signal(number)
        assert running.ends() == 1, running.said()
        assert f"UnavailableError: Ray's process {name} ended while it was needed" in running.said()
    assert list((tmp_path / "home" / "logs" / "ray").iterdir()), "Ray's logs are kept"


@pytest.mark.slow
@pytest.mark.long
def test_the_service_ends_normally_when_its_group_is_stopped(tmp_path: Path, tools: Any) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    tools.serve_bundle(store, tools.make_bundle(store), ModelStatus.PROVISIONAL)
    store.close()
    serve = [*RELOOK, "serve", "--port", str(free_port()), "--set", "serving.page=false"]
    with started(serve, tmp_path) as running:
        running.wait_for("Ctrl-C stops it.")
        os.killpg(running.process.pid, signal.SIGTERM)
        assert running.ends() == 0, running.said()
        assert "stopping" in running.said()


@pytest.mark.slow
@pytest.mark.long
def test_a_search_without_its_raylet_ends_and_names_resume(tmp_path: Path, images_folder: Path) -> None:
    sets = ["trainers.model.side_px=32", "trainers.epochs=500", "tuning.trial_epochs=500", "tuning.grace_epochs=500"]
    tune = [*RELOOK, "tune", "--data", str(images_folder), "--trials", "50"]
    with started([*tune, *(word for value in sets for word in ("--set", value))], tmp_path) as running:
        running.wait_for("trials")
        deadline = time.monotonic() + 600
        while not list((tmp_path / "home" / "runs").glob("tune-*/ray-*")):
            assert running.process.poll() is None, running.said()
            assert time.monotonic() < deadline, running.said()
            time.sleep(0.2)
        running.wait_for("")
        running.daemon("raylet").kill()
        assert running.ends() == 1, running.said()
        last = running.said().strip().splitlines()[-1]
        assert last.startswith("relook: Ray's process raylet ended while it was needed"), running.said()
        assert last.endswith("run it again with --resume")
    assert list((tmp_path / "home" / "logs" / "ray").iterdir()), "Ray's logs are kept"


@OF_RAY
@pytest.mark.slow
def test_daemons_are_out_of_reach_of_signals_to_the_group(ray_session: Any) -> None:
    """Fails with a Ray that starts them in another way than through the class that is replaced."""
    below = psutil.Process().children(recursive=True)
    found = [process for process in below if WATCHED_NAMES.search("".join(command_line(process)[:1]))]
    assert len(found) == len(WATCHED)
    assert os.getsid(0) not in {os.getsid(process.pid) for process in found}


@OF_RAY
def test_a_ray_with_other_internals_is_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray._private import services, worker

    monkeypatch.delattr(services, "ConsolePopen")
    with daemons_in_own_session():
        assert "a signal to the command's process group" in caplog.text
    for node in (None, object(), SimpleNamespace(all_processes={"gcs_server": []})):
        caplog.clear()
        monkeypatch.setattr(worker, "_global_node", node)
        with watched_daemons(Ending()) as begin_cleaning:
            begin_cleaning()
        assert "install the version in requirements.lock" in caplog.text


class Unreadable:
    """An object that raises one of our errors where it is unpickled, as damaged input of a worker does."""

    def __reduce__(self) -> Any:
        from trainers.augmentation import load_policy

        return load_policy, ("no-such-policy",)


@OF_RAY
@pytest.mark.slow
@pytest.mark.long
def test_an_error_of_a_training_worker_is_told_in_its_own_sentence(
    ray_session: Any, filled_store: Store, tmp_path: Path
) -> None:
    from images.importer import build_version
    from trainers.fitting.distributed import fit_distributed
    from trainers.fitting.job import job_of
    from trainers.fitting.training_data import plan_data
    from trainers.settings import TrainersSettings

    plan = plan_data(build_version(filled_store).version, filled_store.taxonomy)
    settings = TrainersSettings().with_values(
        {"workers.count": 1, "workers.max_failures": 0, "model.side_px": 32, "workers.threads": 1}
    )
    policy: Any = Unreadable()
    with pytest.raises(ConfigError, match="no-such-policy") as caught:
        fit_distributed(job_of(filled_store, settings, plan, tmp_path, policy))
    assert "worker errors" not in str(caught.value)
    assert "--resume" not in str(caught.value)


@OF_RAY
@pytest.mark.slow
def test_an_error_of_a_replica_is_told_in_its_own_sentence(ray_session: Any) -> None:
    from ray import serve

    from serving.deployments import APPLICATION
    from serving.launch import _why_not_started

    make: Any = serve.deployment

    class Page:
        def __init__(self) -> None:
            raise ConfigError("serving.page_folder cannot be written; free it")

    page = make(Page, name="page", max_constructor_retry_count=1, ray_actor_options={"num_cpus": 0})
    serve.start(proxy_location="Disabled")
    try:
        target = serve.RunTarget(target=page.bind(), name=APPLICATION, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        deadline = time.monotonic() + 600
        while (found := serve.status().applications[APPLICATION]).status != "DEPLOY_FAILED":
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
    error = _why_not_started("the service did not start", found)
    assert isinstance(error, ConfigError)
    assert str(error) == "the service did not start: serving.page_folder cannot be written; free it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Training failed due to worker errors:\n[Rank 0]\n  raise\nrecords.errors.DataError: no image", DataError),
        ("The deployment failed 3 times:\n\x1b[36mray::x()\x1b[39m\nrecords.errors.ConfigError: port 1", ConfigError),
        ("records.errors.ConfigError: a\n\nDuring handling\nrecords.errors.LabelStudioError: b", LabelStudioError),
        ("ValueError: records are wrong", None),
        ("", None),
    ],
)
def test_our_error_is_found_in_a_quoted_traceback(text: str, expected: type[Exception] | None) -> None:
    found = quoted_error(text)
    assert (None if found is None else type(found)) == expected
    assert found is None or str(found) in text.splitlines()[-1]


def test_resume_is_advised_only_where_something_is_to_resume() -> None:
    def told(begun: bool, message: str) -> str:
        with pytest.raises(UnavailableError) as caught, advises_resume(lambda: begun):
            raise UnavailableError(message)
        return str(caught.value)

    assert told(True, "lost") == "lost; run it again with --resume"
    assert told(False, "lost") == "lost"
    assert told(True, "lost, --resume goes on") == "lost, --resume goes on"


def _unit(name: str) -> configparser.ConfigParser:
    # systemd allows a key several times; the environment of a unit has one per line.
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / name)
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_units_name_verbs_and_settings_that_exist(name: str, tmp_path: Path) -> None:
    service = _unit(name)["Service"]
    program, *words = service["ExecStart"].split()
    assert program.endswith("/bin/relook")
    group: Any = typer.main.get_command(app)
    options = {option for parameter in group.commands[words[0]].params for option in parameter.opts}
    assert isinstance(group.commands[words[0]], click.Command) or group.commands[words[0]]
    assert set(words[1:]) <= options
    lines = (DEPLOY / name).read_text().splitlines()
    variables = dict(line.split("=", 2)[1:] for line in lines if line.startswith("Environment="))
    assert variables
    settings = load_settings(environ=variables)
    assert str(settings.records.home).startswith(service["ReadWritePaths"])
    assert settings.cluster.temp_dir is None, "Ray's folder is in the unit's own /tmp, whose path is short"
    hardened = ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictSUIDSGID")
    assert {service[key] for key in hardened} == {"true"}
    assert service["ProtectSystem"] == "strict"
    assert int(service["TimeoutStopSec"]) > 15
    assert service["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_reads_the_units(name: str, tmp_path: Path) -> None:
    # The program is not installed on this machine under the unit's path.
    copied = (DEPLOY / name).read_text().replace("/opt/relook/.venv/bin/relook", "/bin/true")
    (tmp_path / name).write_text(copied)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert name not in done.stderr, done.stderr
