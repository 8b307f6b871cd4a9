"""`make audit` fails on a pin that is known to be vulnerable, on a pin without hashes, and without the service.

The tools are installed from their lock, as `make audit` does; a local server stands for OSV, since its state of today
is no property of this repository. One test reads the locks and environments as they are; the others plant into locks of
a few pins, and write no bill of materials.
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
PINS = 5
Audit = Callable[..., subprocess.CompletedProcess[str]]


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
    without_bills = folder / "without-bills" / "bin"
    without_bills.mkdir(parents=True)
    (without_bills / "pip-audit").symlink_to(folder / "bin" / "pip-audit")
    (without_bills / "cyclonedx-py").symlink_to("/bin/true")
    return folder


@pytest.fixture
def audit(tools: Path, osv: str, tmp_path: Path) -> Audit:
    """Run the audit on a copy of the files that it reads, with locks of a few pins."""
    for name in (".ci/audit", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in LOCKS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(pins(name)[:PINS]))

    def run(url: str = osv, bills: bool = False) -> subprocess.CompletedProcess[str]:
        programs = tools if bills else tools / "without-bills"
        return subprocess.run(
            [tmp_path / ".ci" / "audit", programs, sys.prefix, tmp_path / "out"],
            env={**os.environ, "RELOOK_OSV_URL": url}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def pins(name: str) -> list[str]:
    """The pins of a lock, each with its hashes."""
    found: list[str] = []
    for line in (ROOT / name).read_text().splitlines(keepends=True):
        if line[:1].isalnum():
            found.append(line)
        elif found and "--hash" in line:
            found[-1] += line
    return found


@pytest.mark.soak
def test_the_locks_as_they_are_pass(audit: Audit, tmp_path: Path) -> None:
    for name in LOCKS:
        shutil.copy(ROOT / name, tmp_path / name)
    done = audit(bills=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no vulnerability is known") == 2
    for name in ("relook", "label-studio"):
        bill = json.loads((tmp_path / "out" / f"{name}.cdx.json").read_text())
        assert bill["bomFormat"] == "CycloneDX"
        assert len(bill["components"]) > 100


@pytest.mark.soak
@pytest.mark.parametrize("lock", LOCKS)
def test_a_vulnerable_pin_fails(lock: str, audit: Audit, tmp_path: Path) -> None:
    planted = f"{VULNERABLE[0]}=={{}} \\\n    --hash=sha256:{'0' * 64}\n"
    text = (tmp_path / lock).read_text()
    (tmp_path / lock).write_text(text + planted.format("3.1.6"))
    assert audit().returncode == 0
    (tmp_path / lock).write_text(text + planted.format(VULNERABLE[1]))
    done = audit()
    assert done.returncode == 1
    assert "1 known vulnerability" in done.stderr
    assert done.stderr.startswith(lock)


@pytest.mark.soak
@pytest.mark.parametrize("lock", LOCKS)
def test_a_pin_without_a_hash_fails(lock: str, audit: Audit, tmp_path: Path) -> None:
    with (tmp_path / lock).open("a") as file:
        file.write("left-pad==1.0\n")
    done = audit()
    assert done.returncode == 1
    assert "hash" in (done.stderr + "".join(path.read_text() for path in (tmp_path / "out").glob("*.log"))).lower()


@pytest.mark.soak
def test_without_the_service_nothing_is_known_and_that_is_a_failure(audit: Audit) -> None:
    done = audit("http://127.0.0.1:9/v1/query")
    assert done.returncode == 1
    assert "cannot be asked" in done.stderr
