"""TCP proxies that lose responses, for the tests of clients."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unreliable_way(port: int, cuts: int) -> Iterator[int]:
    """Forward TCP connections to a port; cut the first ones off after the answer was made, before it arrives."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(cuts + 2):
            try:
                near, _ = listening.accept()
            except OSError:
                return
            with near, socket.create_connection(("127.0.0.1", port)) as far:
                near.settimeout(1.0)
                far.settimeout(600.0)
                far.sendall(_message(near))
                response = _message(far)
                if number >= cuts:
                    near.sendall(response)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)  # `close` alone does not wake a thread that waits in `accept`
        listening.close()
        thread.join(timeout=600)


def _message(way: socket.socket) -> bytes:
    """Read one whole HTTP message, in however many pieces it comes."""
    message = way.recv(1 << 20)
    while b"\r\n\r\n" not in message or len(message.partition(b"\r\n\r\n")[2]) < _length(message):
        piece = way.recv(1 << 20)
        if not piece:
            break
        message += piece
    return message


def _length(request: bytes) -> int:
    for line in request.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
