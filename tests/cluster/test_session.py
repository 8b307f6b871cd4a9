"""A Ray session: it requires a token, is small when idle, and leaves no process, however it ends."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from bench.processes import command_line
from cluster.daemons import orderly_sigterm
from cluster.session import (
    MAX_TEMP_DIR_CHARS,
    RaySession,
    _keep_logs,
    _temp_dir,
    _uninterrupted,
    ray_token_file,
    require_token_mode,
    start_ray,
)
from cluster.settings import Settings
from cluster.sources import load_settings
from records.errors import ConfigError, ContractError, UnavailableError
from records.home import open_home

pytestmark = pytest.mark.apart

PREAMBLE = """
import os, subprocess, sys, time
from cluster.session import start_ray
from cluster.sources import load_settings
settings = load_settings(sets=["records.home=" + sys.argv[1], "cluster.stop_timeout_s=2"], environ=os.environ)
"""

# A worker with a child of its own, the hardest thing to take down.
BUSY = """
import ray
@ray.remote
class Busy:
    def work(self):
        self.child = subprocess.Popen(["sleep", "600"])
        return self.child.pid
busy = Busy.remote()
print(ray.get(busy.work.remote()), flush=True)
"""


def _start(script: str, home: Path, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
        start_new_session=True,
    )


def _listening(processes: list[psutil.Process]) -> set[str]:
    found: set[str] = set()
    for process in processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr:
                found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def test_a_session_listens_on_loopback_only(ray_session: RaySession) -> None:
    @ray.remote
    def work() -> int:
        return os.getpid()

    worker = psutil.Process(ray.get(work.remote()))
    processes = [worker, *psutil.Process().children(recursive=True)]
    assert len(processes) > 5
    assert ray_session.address.startswith("127.0.0.1:")
    assert _listening(processes) == {"127.0.0.1"}


def test_idle_ray_stays_small(ray_session: RaySession) -> None:
    daemons = [child for child in psutil.Process().children() if "ray" in " ".join(command_line(child))]
    own = {"gcs_server", "monitor.py", "dashboard.py", "log_monitor.py", "raylet"}
    assert len(daemons) >= len(own)
    total = sum(process.memory_full_info().pss for process in daemons)
    # Measured: 215 MB for these five, and 130 MB for the two agents below raylet.
    assert total < 400 * 2**20


def test_it_has_the_resources_of_the_preset(ray_session: RaySession, ray_settings: Settings) -> None:
    resources = ray.cluster_resources()
    assert resources["CPU"] == ray_settings.cluster.logical_cpus == 4
    assert "GPU" not in resources
    assert resources["object_store_memory"] == ray_settings.cluster.object_store_mb * 2**20


def test_a_client_without_the_token_is_rejected(ray_session: RaySession) -> None:
    script = f"import ray; ray.init(address={ray_session.address!r}, configure_logging=False); print('joined')"
    environ = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    stranger = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environ)
    assert stranger.stderr is not None
    try:
        refused = next(line for line in stranger.stderr if "Unauthenticated" in line or "joined" in line)
        assert "InvalidAuthToken" in refused
    finally:
        stranger.kill()
        stranger.wait()
        stranger.stderr.close()


def test_another_process_joins_by_address_and_brings_the_code(
    ray_session: RaySession, ray_settings: Settings, tmp_path: Path
) -> None:
    script = """
with start_ray(settings) as session:
    import ray
    @ray.remote
    def where():
        import records
        return os.path.dirname(os.path.dirname(records.__file__)), os.environ["RAY_USAGE_STATS_ENABLED"]
    root, usage = ray.get(where.remote())
    print(session.owned, root, usage, sorted(os.listdir(root)), sep="|")
"""
    token = str(ray_token_file(open_home(ray_settings.records.home)))
    process = _start(script, tmp_path, RELOOK_RAY_ADDRESS=ray_session.address, RAY_AUTH_TOKEN_PATH=token)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    owned, root, usage, entries = out.strip().splitlines()[-1].split("|")
    assert (owned, usage) == ("False", "0")
    assert "runtime_resources" in root
    assert "'records'" in entries
    assert "'.venv'" not in entries
    assert "'.git'" not in entries
    assert ray.is_initialized()


def test_a_second_session_in_one_process_is_refused(ray_session: RaySession, ray_settings: Settings) -> None:
    with pytest.raises(ContractError, match="already initialised"), start_ray(ray_settings):
        pass


@pytest.mark.slow
@pytest.mark.long
def test_a_node_that_was_too_slow_is_started_again(tmp_path: Path) -> None:
    script = """
import psutil, ray
really, calls, left = ray.init, [], []
WAIT = "import time; time.sleep(600)"  # stands for a raylet that still starts
def slow(**options):
    calls.append(options["address"])
    if len(calls) < 2:
        left.append(subprocess.Popen([sys.executable, "-c", WAIT, options["_temp_dir"]]))
        raise Exception("The current node timed out during startup. This could happen because ...")
    return really(**options)
ray.init = slow
with start_ray(settings) as session:
    print(len(calls), [process.wait(600) for process in left], ray.is_initialized())
ray.init = lambda **options: calls.append("again") or (_ for _ in ()).throw(Exception("no room"))
try:
    with start_ray(settings):
        pass
except Exception as error:
    print(len(calls), type(error).__name__, error)
"""
    process = _start(script, tmp_path / "home")
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert out.splitlines() == ["2 [-9] True", "3 UnavailableError Ray did not start here: no room"]


@pytest.mark.slow
def test_sessions_that_end_by_error_and_by_sigterm_leave_nothing(tmp_path: Path) -> None:
    script = """
import psutil, signal
before = dict(os.environ)
addresses = []
try:
    with start_ray(settings) as session:
        addresses.append(session.address)
        raise ValueError("on purpose")
except ValueError:
    pass
os.environ["RAY_AUTH_TOKEN"] = "another-token-of-the-second-session-0123456789"
try:
    with start_ray(settings) as session:
        addresses.append(session.address)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
except SystemExit as ending:
    addresses.append(ending.code)
del os.environ["RAY_AUTH_TOKEN"]
# Ray itself leaves one variable in its driver.
left = {name for name in os.environ if os.environ[name] != before.get(name)} - {"PYTHONBREAKPOINT"}
assert not left and set(before) <= set(os.environ), left
print(addresses[0] != addresses[1], addresses[2], len(psutil.Process().children(recursive=True)))
"""
    process = _start(script, tmp_path / "home")
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert out.split() == ["True", "143", "0"]
    kept = list((tmp_path / "home" / "logs" / "ray").iterdir())
    assert len(kept) == 1, "logs stay after an error, and only then"
    assert (kept[0] / "gcs_server.out").exists()
    assert not list(Path("/tmp").glob(f"relook-*/session_*_{process.pid}"))


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_takes_down_every_process(tmp_path: Path) -> None:
    body = "\n".join(f"    {line}" for line in BUSY.strip().splitlines())
    process = _start(f"with start_ray(settings):\n{body}\n    time.sleep(600)\n", tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    grandchild = psutil.Process(int(process.stdout.readline()))
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 6
    # Ctrl-C in a terminal reaches the whole group.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(600) == -signal.SIGINT
    _, alive = psutil.wait_procs([*started, grandchild], timeout=600)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    process.stdout.close()
    process.stderr.close()


def test_the_next_session_removes_the_folder_of_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import session

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, owner in (("relook-dead", dead.pid), ("relook-live", os.getpid())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner.pid").write_text(str(owner))
    session._sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["relook-live"]


def test_the_token_is_created_once_and_private(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    path = ray_token_file(home)
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ray_token_file(home).read_text() == token


@pytest.mark.parametrize("mode", ["disabled", "k8s", ""])
def test_an_environment_that_disables_authentication_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=.* opens Ray to everyone.*unset it, or set token"):
        require_token_mode({"RAY_AUTH_MODE": mode})
    require_token_mode({})
    require_token_mode({"RAY_AUTH_MODE": "token"})


def test_a_long_temporary_folder_is_refused(tmp_path: Path) -> None:
    script = """
from records.errors import ConfigError
try:
    with start_ray(settings):
        pass
except ConfigError as error:
    print(error)
"""
    long = "/tmp/" + "x" * MAX_TEMP_DIR_CHARS
    process = _start(script, tmp_path, RELOOK_CLUSTER__TEMP_DIR=long)
    out, errors = process.communicate(timeout=600)
    assert "sockets allow 40; choose a shorter one" in out, errors
    assert not Path(long).exists()


def test_a_cluster_that_does_not_respond_is_named(tmp_path: Path) -> None:
    script = """
from records.errors import UnavailableError
try:
    with start_ray(settings):
        pass
except UnavailableError as error:
    # Ray itself would try to connect for a minute.
    print(error, "Ray was asked" if "ray" in sys.modules else "Ray was not asked")
"""
    process = _start(script, tmp_path, RELOOK_RAY_ADDRESS="127.0.0.1:9")
    out, errors = process.communicate(timeout=600)
    assert "no Ray responds at 127.0.0.1:9; start it" in out, errors
    assert "Ray was not asked" in out


def test_a_long_folder_for_temporary_files_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.session.tempfile.gettempdir", lambda: "/tmp/" + "x" * MAX_TEMP_DIR_CHARS)
    folder = _temp_dir(None)
    shutil.rmtree(folder)
    assert folder.parent == Path("/tmp")


def test_only_sessions_with_logs_leave_some_behind(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home")
    (tmp_path / "ray" / "session_2026-1" / "logs").mkdir(parents=True)
    (tmp_path / "ray" / "session_2026-1" / "logs" / "raylet.out").write_text("it ended")
    (tmp_path / "ray" / "session_2026-2").mkdir()
    _keep_logs(tmp_path / "ray", home)
    assert [path.name for path in (home.logs / "ray").iterdir()] == ["session_2026-1"]
    assert (home.logs / "ray" / "session_2026-1" / "raylet.out").read_text() == "it ended"


def test_the_second_sigterm_of_one_ending_is_ignored() -> None:
    # Without the handlers around it: a Ray session of this process would take it for its own end.
    outside = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def within() -> None:
        with orderly_sigterm():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)

    try:
        with pytest.raises(SystemExit) as ended:
            within()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, outside)
    assert ended.value.code == 128 + signal.SIGTERM


def test_other_threads_leave_the_signals_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def within() -> list[Any]:
        with orderly_sigterm(), _uninterrupted():
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(within).result() == before


def test_unavailable_is_no_user_error() -> None:
    assert not issubclass(UnavailableError, ConfigError)
    assert load_settings().cluster.ray_address is None


def test_processes_that_are_ended_without_patience_are_gone_when_the_call_returns() -> None:
    from cluster.session import _end

    started = [subprocess.Popen(["sleep", "600"]) for _ in range(40)]
    _end([psutil.Process(process.pid) for process in started], timeout_s=0)
    assert {process.poll() for process in started} == {-signal.SIGKILL}
