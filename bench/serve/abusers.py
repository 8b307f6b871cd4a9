"""Callers who ask for more than their share, for `python -m bench abuse`: a process of their own, seeded.

python -m bench.serve.abusers PORT SEED        # stdin: a line {"key": ..., "kinds": [...]}, then its end stops it

Each kind is a function that abuses the service once, with a socket or an HTTP client; a thread repeats it. At the end
stdout gets how often each kind was done. What is costly to make, large images above all, is made once: the abusers
shall spend the time of the service, not their own.
"""

import contextlib
import functools
import io
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
from PIL import Image

from bench.serve.sessions import LAST, prioritise_session
from serving.session import COOKIE, split_key

Abuse = Callable[[int, str, random.Random], object]

IDLE_SOCKETS = 64
HOLD_S = 3.0
_JPEG = "Content-Type: image/jpeg\r\n"


def silent_sockets(port: int, key: str, draw: random.Random) -> None:
    """Open connections and say nothing, or half of a header, byte by byte."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_connected(port, draw)) for _ in range(IDLE_SOCKETS)]
        end_s = time.monotonic() + HOLD_S
        while time.monotonic() < end_s:
            for raw in opened[::2]:
                with contextlib.suppress(OSError):
                    raw.sendall(b"G")
            time.sleep(0.5)


def slow_bodies(port: int, key: str, draw: random.Random) -> None:
    """Announce images with a valid key and send them byte by byte."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_connected(port, draw)) for _ in range(IDLE_SOCKETS)]
        for raw in opened:
            _send(raw, key, f"{_JPEG}Content-Length: {draw.randint(1000, 20_000_000)}\r\n")
        end_s = time.monotonic() + HOLD_S
        while time.monotonic() < end_s:
            for raw in opened:
                with contextlib.suppress(OSError):
                    raw.sendall(b"\xff")
            time.sleep(0.5)


def huge_headers(port: int, key: str, draw: random.Random) -> None:
    """Send one header of many megabytes, or many headers."""
    with _connected(port, draw) as raw, contextlib.suppress(OSError):
        raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        for _ in range(200):
            raw.sendall(b"X: " + b"a" * 100_000 if draw.random() < 0.5 else b"X: a\r\n" * 10_000)


def json_bombs(port: int, key: str, draw: random.Random) -> None:
    """Send large and deep JSON, with and without a key, declared and chunked."""
    body = b"[" * 2_000_000 if draw.random() < 0.5 else b'{"reason": "' + b"x" * 20_000_000 + b'"}'
    content: Any = iter([body]) if draw.random() < 0.5 else body
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if draw.random() < 0.5 else {})
    _post(port, f"/v1/predictions/{'0' * 32}/flags", content, headers)


def costly_images(port: int, key: str, draw: random.Random) -> None:
    """Send images that are small files and much work: large ones of one colour, cut-off and progressive ones."""
    side_px = draw.choice([2000, 5000, 7000, 12_000])
    kind = "jpeg" if draw.random() < 0.5 else "png"
    data = costly_image(side_px, kind)
    data = data[: len(data) // 2] if draw.random() < 0.2 else data
    headers = {"Content-Type": f"image/{kind}", "Authorization": f"Bearer {key}"}
    for _ in range(4):
        _post(port, "/v1/predictions", data, headers)


def slow_explanations(port: int, key: str, draw: random.Random) -> None:
    """Ask for the most expensive heat maps."""
    buffer = io.BytesIO()
    Image.effect_noise((600, 450), 60).convert("RGB").save(buffer, "JPEG")
    headers = {"Content-Type": "image/jpeg", "Authorization": f"Bearer {key}"}
    method = draw.choice(["occlusion", "integrated_gradients", "gradient_shap"])
    _post(port, f"/v1/explanations?method={method}", buffer.getvalue(), headers)


def page_uploads(port: int, key: str, draw: random.Random) -> None:
    """Upload files to the page, with and without a session."""
    cookie, proof = split_key(key)
    headers = {"Cookie": f"{COOKIE}={cookie}", "X-Relook-Proof": proof} if draw.random() < 0.5 else {}
    files = {"files": ("a.jpg", b"\xff\xd8\xff" + draw.randbytes(5_000_000), "image/jpeg")}
    with _client(port) as client, contextlib.suppress(httpx.HTTPError):
        client.post("/gradio_api/upload", files=files, headers=headers)


def hang_ups(port: int, key: str, draw: random.Random) -> None:
    """Send half of an image and leave."""
    with _connected(port, draw) as raw:
        _send(raw, key, f"{_JPEG}Content-Length: 100000\r\n")
        with contextlib.suppress(OSError):
            raw.sendall(draw.randbytes(50_000))


def guessed_keys(port: int, key: str, draw: random.Random) -> None:
    """Try keys."""
    with _client(port) as client, contextlib.suppress(httpx.HTTPError):
        for _ in range(20):
            client.get("/v1/predictions", headers={"Authorization": f"Bearer rlk_{draw.randbytes(8).hex()}"})
            time.sleep(0.02)


KINDS: dict[str, Abuse] = {
    function.__name__: function
    for function in (
        silent_sockets, slow_bodies, huge_headers, json_bombs, costly_images, slow_explanations, page_uploads,
        hang_ups, guessed_keys,
    )
}  # fmt: skip


def abuse(port: int, key: str, kinds: list[str], seed: int) -> Counter[str]:
    """Start one thread per kind, which lasts as long as the process; return the counts, which grow, of each."""
    done: Counter[str] = Counter(dict.fromkeys(kinds, 0))

    def repeat(name: str) -> None:
        draw = random.Random(f"{seed} {name}")
        while True:
            with contextlib.suppress(OSError, httpx.HTTPError):
                KINDS[name](port, key, draw)
            done[name] += 1
            # Abusers have machines of their own; here they share the cores with what they abuse.
            time.sleep(0.2)

    for name in kinds:
        threading.Thread(target=repeat, args=(name,), daemon=True).start()
    return done


@functools.lru_cache
def costly_image(side_px: int, kind: str) -> bytes:
    """Return an image of one colour: a small file, and much work."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (side_px, side_px), (200, 120, 100))
    image.save(buffer, kind, progressive=True)
    return buffer.getvalue()


def _connected(port: int, draw: random.Random) -> socket.socket:
    source = f"127.0.0.{draw.randint(2, 6)}"
    return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))


def _send(raw: socket.socket, key: str, headers: str) -> None:
    with contextlib.suppress(OSError):
        line = f"POST /v1/predictions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        raw.sendall(f"{line}{headers}\r\n".encode())


def _client(port: int) -> httpx.Client:
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, trust_env=False, timeout=20)


def _post(port: int, path: str, content: Any, headers: dict[str, str]) -> None:
    with _client(port) as client, contextlib.suppress(httpx.HTTPError):
        client.post(path, content=content, headers=headers)


if __name__ == "__main__":
    prioritise_session(LAST)
    given = json.loads(sys.stdin.readline())
    counts = abuse(int(sys.argv[1]), given["key"], given["kinds"], int(sys.argv[2]))
    sys.stdin.read()
    print(json.dumps(counts), flush=True)
    # Some threads wait for responses, and nobody is interested in them any more.
    os._exit(0)
