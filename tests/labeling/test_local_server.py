"""The local Label Studio: loopback only, its secrets, starting and finding it, and that it really stops."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from labeling.environment import DATABASE
from labeling.local_server import LocalLabelStudio, ServerInfo
from labeling.settings import LabelingSettings
from records.errors import ConfigError, IntegrityError, LabelStudioError
from records.home import Home, open_home


@pytest.fixture
def own_home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "own")


@pytest.fixture
def own(own_home: Home, settings: LabelingSettings, server: ServerInfo) -> Iterator[LocalLabelStudio]:
    """A second server with a home of its own; `server` is asked for so that the environment exists."""
    local = LocalLabelStudio(own_home, settings)
    yield local
    local.down()


def test_it_listens_on_loopback_only_and_keeps_its_secrets(server: ServerInfo, home: Home) -> None:
    process = psutil.Process(server.pid)
    listening = [c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert os.getsid(server.pid) == server.pid, "a session of its own outlasts the caller's terminal"
    assert Path(process.cwd()) == home.label_studio, "the caller's folder may be removed"

    password, token = server.password.get_secret_value(), server.token.get_secret_value()
    assert len(token) == 40
    shown = f"{server!r} {server} {server.model_dump_json()} {' '.join(process.cmdline())}"
    assert password not in shown
    assert token not in shown
    keys = home.keys / "label-studio.json"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.label_studio.stat().st_mode) == 0o700
    log = (home.logs / "label-studio.log").read_text()
    assert password not in log
    assert token not in log


def test_sign_up_is_closed_and_calls_need_a_token(server: ServerInfo) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/api/projects/").status_code == 401
        form = {"email": "stranger@example.org", "password": "a-long-password"}
        page = http.get("/user/signup/")
        token = page.cookies.get("csrftoken") or http.cookies.get("csrftoken") or ""
        response = http.post(
            "/user/signup/", data={**form, "csrfmiddlewaretoken": token}, headers={"Referer": f"{server.url}/"}
        )
        assert response.status_code in (403, 405), response.text[:200]


def test_up_finds_what_runs(server: ServerInfo, home: Home, settings: LabelingSettings) -> None:
    local = LocalLabelStudio(home, settings)
    assert local.up() == server
    assert local.status() == server


@pytest.mark.long
def test_a_killed_server_is_started_again_with_its_account_and_down_stops_it(own: LocalLabelStudio) -> None:
    first = own.up()
    os.kill(first.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first.pid)] if psutil.pid_exists(first.pid) else [], timeout=600)
    assert own.status() is None
    second = own.up()
    assert second.pid != first.pid
    assert (second.token, second.password) == (first.token, first.password)
    assert own.down()
    assert not psutil.pid_exists(second.pid)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(second.url.rsplit(":", 1)[1]))) != 0
    assert own.status() is None
    assert not own.down()


def test_a_recycled_process_id_is_never_stopped(own: LocalLabelStudio, own_home: Home) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        state = {"url": "http://127.0.0.1:1", "pid": stranger.pid}
        state |= {"started_at": "2026-01-01T00:00:00Z", "version": "1"}
        (own_home.label_studio / "server.json").write_text(json.dumps(state))
        assert own.status() is None
        assert not own.down()
        assert stranger.poll() is None
        stranger.kill()


def test_a_taken_port_is_one_sentence_that_names_the_setting(own_home: Home, settings: LabelingSettings) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        local = LocalLabelStudio(own_home, settings.model_copy(update={"port": port}))
        with pytest.raises(ConfigError, match=rf"labeling\.port {port} cannot be used .*--set labeling\.port="):
            local.up()
    assert not local.existed


def test_a_server_that_does_not_come_up_shows_its_last_log_line(own: LocalLabelStudio, own_home: Home) -> None:
    own.keys_file.write_text(json.dumps({"username": "a@b.c", "password": "p" * 12, "token": "t" * 40}))
    (own_home.label_studio / DATABASE).write_bytes(b"not a database" * 100)
    with pytest.raises(LabelStudioError, match=r"stopped while it started: .*not a database.*label-studio\.log"):
        own.up()
    assert own.status() is None


def test_a_start_that_takes_too_long_is_stopped(
    own: LocalLabelStudio, own_home: Home, settings: LabelingSettings
) -> None:
    hasty = LocalLabelStudio(own_home, settings.model_copy(update={"start_timeout_s": 0.3}))
    with pytest.raises(LabelStudioError, match=r"within 0\.3 s \(labeling\.start_timeout_s\)"):
        hasty.up()
    assert not (own_home.label_studio / "server.json").exists()


def test_a_lost_account_and_damaged_files_say_what_to_do(own: LocalLabelStudio, own_home: Home) -> None:
    (own_home.label_studio / DATABASE).touch()
    with pytest.raises(LabelStudioError, match="restore it from a backup"):
        own.up()
    own.keys_file.write_text("{")
    with pytest.raises(IntegrityError, match="is damaged"):
        own.up()
    (own_home.label_studio / "server.json").write_text("{")
    with pytest.raises(IntegrityError, match="is damaged"):
        own.status()
    (own_home.label_studio / "server.json").unlink()
