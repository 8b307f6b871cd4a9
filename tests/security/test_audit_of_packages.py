"""`make audit` fails on a pin that is known to be vulnerable, on a pin without hashes, and without the service.

The tools are installed from their lock, as `make audit` does; a local server stands for OSV, since its state of today
is no property of this repository.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "labeling/label_studio_requirements.lock")
VULNERABLE = ("jinja2", "2.4.1")
Audit = Callable[[str], subprocess.CompletedProcess[str]]


class Osv(BaseHTTPRequestHandler):
    """Knows one vulnerability, in OSV's format."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, version = asked["package"]["name"], asked["version"]
        events = [{"introduced": "0"}, {"fixed": "3.1.6"}]
        affected = {
            "package": {"name": name, "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": events}],
        }
        known = {"id": "PYSEC-0000-1", "details": "made up", "modified": "2026-01-01T00:00:00Z", "affected": [affected]}
        body = json.dumps({"vulns": [known]} if (name.lower(), version) == VULNERABLE else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def osv() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes", "-r"]
    subprocess.run([*install, ROOT / ".ci" / "audit.lock"], check=True)
    return folder


@pytest.fixture
def audit(tools: Path, osv: str, tmp_path: Path) -> Audit:
    """Run the audit on a copy of the files that it reads."""
    for name in (".ci/audit", "pyproject.toml", *LOCKS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def run(url: str = osv) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / ".ci" / "audit", tools, sys.prefix, tmp_path / "out"],
            env={**os.environ, "RELOOK_OSV_URL": url}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.mark.soak
def test_the_locks_as_they_are_pass(audit: Audit, osv: str, tmp_path: Path) -> None:
    done = audit(osv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no vulnerability is known") == 2
    assert json.loads((tmp_path / "out" / "relook.cdx.json").read_text())["bomFormat"] == "CycloneDX"


@pytest.mark.soak
@pytest.mark.parametrize("lock", LOCKS)
def test_a_vulnerable_pin_fails(lock: str, audit: Audit, osv: str, tmp_path: Path) -> None:
    with (tmp_path / lock).open("a") as file:
        file.write(f"{VULNERABLE[0]}-planted==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    assert audit(osv).returncode == 0
    text = (tmp_path / lock).read_text().replace(f"{VULNERABLE[0]}-planted==1.0", "==".join(VULNERABLE))
    # One pin per package: the good one goes.
    lines, skipping = [], False
    for line in text.splitlines():
        starts = "==" in line
        skipping = line.lower().startswith("jinja2==3") if starts else skipping
        if not skipping:
            lines.append(line)
    (tmp_path / lock).write_text("\n".join(lines) + "\n")
    done = audit(osv)
    assert done.returncode == 1
    assert "1 known vulnerability" in done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("lock", LOCKS)
def test_a_pin_without_a_hash_fails(lock: str, audit: Audit, osv: str, tmp_path: Path) -> None:
    with (tmp_path / lock).open("a") as file:
        file.write("left-pad==1.0\n")
    done = audit(osv)
    assert done.returncode == 1
    assert "hash" in (done.stderr + "".join(path.read_text() for path in (tmp_path / "out").glob("*.log"))).lower()


@pytest.mark.soak
def test_without_the_service_nothing_is_known_and_that_is_a_failure(audit: Audit) -> None:
    done = audit("http://127.0.0.1:9/v1/query")
    assert done.returncode == 1
    assert "cannot be asked" in done.stderr
