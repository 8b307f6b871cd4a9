"""Other servers around the same network, each in an environment of its own under one folder.

In: a folder that `bench/peers/install.py` made, and the network's file. Out: the address of each. All of them run at
the same time; all but the measured one are stopped by SIGSTOP, so that none uses the others' cores.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.serve.load import Images, Target, ask

SCRIPTS = Path(__file__).resolve().parents[2] / "bench" / "peers"
START_TIMEOUT_S = 300.0
RATE_TIMEOUT_S = 300.0
_BOUNDARY = uuid.uuid4().hex


def form(field: str) -> Callable[[bytes], bytes]:
    """Return what makes a multipart form with one image of an image."""

    def body(image: bytes) -> bytes:
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="image.jpg"\r\n'
        return head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + f"\r\n--{_BOUNDARY}--\r\n".encode()

    return body


@dataclass(frozen=True)
class _Kind:
    """Command and request format of a peer."""

    command: tuple[str, ...]
    body: Callable[[bytes], bytes] = bytes
    content_type: str = "image/jpeg"


_FORM = f"multipart/form-data; boundary={_BOUNDARY}"
SERVERS = {
    "litserve": _Kind(("bin/python", "litserve_server.py", "{port}"), form("image"), _FORM),
    "bentoml": _Kind(
        ("bin/python", "-m", "bentoml", "serve", "bentoml_server:Classifier", "--port", "{port}"),
        form("images"), _FORM,
    ),
    "fastapi": _Kind(("bin/python", "fastapi_server.py", "{port}")),
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A peer that runs.

    Args:
        name: of it.
        target: its address.
        process: of its command; others may be below it.
    """

    name: str
    target: Target
    process: psutil.Process

    @contextlib.contextmanager
    def awake(self) -> Iterator[Target]:
        """Resume it for the length of a block."""
        self._signal(signal.SIGCONT)
        try:
            yield self.target
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Terminate it with all its processes."""
        ended = [self.process, *self._children()]
        for process in ended:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ended, timeout=10)

    def _signal(self, number: signal.Signals) -> None:
        for process in [self.process, *self._children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.process.children(recursive=True)
        return []


class Peers:
    """The peers of one measurement.

    Args:
        folder: with an environment per peer; None measures none.
        model_file: of `write_for_peers`.
        logs: folder for what they print.
    """

    def __init__(self, folder: Path | None, model_file: Path, logs: Path) -> None:
        self.reasons: dict[str, str] = {}
        self._folder = folder
        self._logs = logs
        cleared = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "RAY_", "PYTHON"))}
        self._environ = {
            **cleared,
            "RELOOK_PEER_MODEL": str(model_file),
            "PYTHONPATH": str(SCRIPTS),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(logs / "bentoml"),
        }

    @contextlib.contextmanager
    def running(self, images: Images) -> Iterator[dict[str, Peer]]:
        """Run all servers that can be run for the length of a block, each stopped until it is woken.

        Args:
            images: to send until they reply.
        Yields:
            Those that reply, by name; why others do not is in `reasons`.
        """
        found: dict[str, Peer] = {}
        try:
            for name, kind in SERVERS.items():
                peer = self._started(name, kind, images)
                if peer is not None:
                    found[name] = peer
            yield found
        finally:
            for peer in found.values():
                peer.end()

    def gradcam_rate(self, batch_size: int, seconds: float) -> float | None:
        """Return the maps per second of pytorch-grad-cam; None with a reason if it cannot run."""
        name = "pytorch_grad_cam"
        if (python := self._python(name)) is None:
            return None
        command = [str(python), "gradcam_rate.py", "--batch", str(batch_size), "--seconds", str(seconds)]
        try:
            done = subprocess.run(
                command, env=self._environ, cwd=SCRIPTS, capture_output=True, text=True, timeout=RATE_TIMEOUT_S,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            self.reasons[name] = f"bench/peers/gradcam_rate.py did not run ({type(error).__name__})"
            return None
        if done.returncode:
            self.reasons[name] = f"bench/peers/gradcam_rate.py failed: {_last_line(done.stderr)}"
            return None
        return float(json.loads(done.stdout.strip().splitlines()[-1])["maps_s"])

    def _python(self, name: str) -> Path | None:
        """Return the interpreter of a peer's environment; None with a reason if there is none."""
        if self._folder is None:
            self.reasons[name] = "not measured unless --peers names a folder that bench/peers/install.py made"
        elif not SCRIPTS.is_dir():
            self.reasons[name] = "bench/peers is part of a working copy, and this is none"
        elif not (python := self._folder.absolute() / name / "bin" / "python").exists():
            self.reasons[name] = f"the folder of --peers has no environment {name!r}; bench/peers/install.py makes it"
        else:
            return python
        return None

    def _started(self, name: str, kind: _Kind, images: Images) -> Peer | None:
        if (python := self._python(name)) is None:
            return None
        port = free_port()
        script = [part.format(port=port) for part in kind.command[1:]]
        log = self._logs / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(python), *script], env=self._environ, cwd=SCRIPTS, stdout=out, stderr=out, start_new_session=True
            )
        peer = Peer(name, Target(port, "/predict", kind.body, kind.content_type), psutil.Process(process.pid))
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and process.poll() is None:
            if ask(peer.target, images, 1, 1).answered:
                peer._signal(signal.SIGSTOP)
                return peer
            time.sleep(0.5)
        peer.end()
        self.reasons[name] = f"it did not reply within {START_TIMEOUT_S:g} s: {_last_line(log.read_text())}"
        return None


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]
