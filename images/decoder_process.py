"""What a decoder process runs: it reads an image from its socket, decodes it and writes the pixels back, one at a time.

The limits are the kernel's: memory by RLIMIT_AS, processor time by RLIMIT_CPU, set anew for each image. The process
writes no file and no core dump. It ends with its parent: the end of the socket ends it, also amid an image.
"""

import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

READY, STARTED, PIXELS, FAILED = b"R", b"S", b"P", b"F"
NICENESS = 10
_HEAD = struct.Struct("<cIQ")
_MAX_DOCUMENT_BYTES = 2**16
_LARGEST_BYTES = 2**34


def main() -> None:
    """Decode images until the parent ends; arguments: root of the code, socket, memory in MB, time in s."""
    connection = socket.socket(fileno=int(sys.argv[2]))
    memory_bytes, time_s = int(sys.argv[3]) * 2**20, float(sys.argv[4])
    # Ctrl-C and a supervisor's SIGTERM reach the whole process group; when to end is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    os.nice(NICENESS)
    # Everything else is imported before the limits are set and before any byte of an image is read.
    from PIL import Image

    from images.decoder_pillow import decode_here

    Image.preinit()
    Image.init()
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    _limit(memory_bytes)
    send(connection, READY, {}, ())
    while True:
        try:
            _, document, body = receive(connection, _LARGEST_BYTES)
        except (EOFError, OSError):
            return
        if "dicom" in document and "images.decoder_dicom" not in sys.modules:
            # Imported now and not at the start, because few images are DICOM files; outside the limits all the same.
            _set_limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
            importlib.import_module("images.decoder_dicom")
            _limit(memory_bytes)
        send(connection, STARTED, {}, ())
        _limit_time(time_s)
        _work(connection, decode_here, document, bytes(body))


def send(connection: socket.socket, kind: bytes, document: dict[str, Any], parts: Sequence[Any]) -> None:
    """Write one message: its kind, a JSON document, and bytes."""
    text = json.dumps(document).encode()
    connection.sendall(_HEAD.pack(kind, len(text), sum(memoryview(part).nbytes for part in parts)) + text)
    for part in parts:
        connection.sendall(part)


def receive(
    connection: socket.socket, most_bytes: int, deadline_s: float | None = None
) -> tuple[bytes, dict[str, Any], memoryview]:
    """Read one message.

    Args:
        connection: of the two processes.
        most_bytes: more bytes than this are an error.
        deadline_s: of `time.monotonic`; None waits for ever.
    Returns:
        Kind, document and bytes.
    Raises:
        EOFError: the other process ended, or sent something else.
        TimeoutError: the deadline has passed.
    """
    kind, text_bytes, body_bytes = _HEAD.unpack(_read(connection, _HEAD.size, deadline_s))
    if text_bytes > _MAX_DOCUMENT_BYTES or body_bytes > most_bytes:
        raise EOFError("a message is larger than it may be")
    try:
        document = json.loads(bytes(_read(connection, text_bytes, deadline_s)))
    except ValueError as error:
        raise EOFError("a message cannot be read") from error
    return kind, document, _read(connection, body_bytes, deadline_s)


def _read(connection: socket.socket, count: int, deadline_s: float | None) -> memoryview:
    buffer = memoryview(bytearray(count))
    at = 0
    while at < count:
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the decoder process did not reply in time")
            connection.settimeout(left_s)
        received = connection.recv_into(buffer[at:])
        if received == 0:
            raise EOFError("the other process ended")
        at += received
    return buffer


def _work(connection: socket.socket, decode_here: Any, document: dict[str, Any], data: bytes) -> None:
    from images.decoder_pillow import Wanted
    from records.errors import ImageError
    from records.frames import Crop, Frame

    tags: dict[str, Any] = {}
    try:
        if "dicom" in document:
            from images.decoder_dicom import decode_dicom
            from images.settings import ImagesSettings

            pixels, tags = decode_dicom(data, ImagesSettings.model_validate(document["dicom"]))
            arrays = [pixels]
        else:
            arrays = decode_here(
                data,
                Wanted(
                    tuple(Frame(side_px, Crop(crop), squeezed) for side_px, crop, squeezed in document["frames"]),
                    document["max_side_px"],
                ),
            )
    except ImageError as error:
        send(connection, FAILED, {"message": str(error), "code": error.code}, ())
    except MemoryError:
        send(connection, FAILED, {"message": "", "code": "memory"}, ())
    else:
        shapes = [array.shape[:2] for array in arrays]
        send(connection, PIXELS, {"shapes": shapes, "tags": tags}, [array.reshape(-1) for array in arrays])


def _limit(memory_bytes: int) -> None:
    # What the process needs to exist, libraries above all, does not count.
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _set_limit(resource.RLIMIT_AS, used_bytes + memory_bytes)
    # A core dump would hold a patient's image.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _limit_time(time_s: float) -> None:
    """Let the kernel kill this process once it has used `time_s` more of processor time, rounded up to a second."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + time_s) + 1)


def _set_limit(kind: int, value: int) -> None:
    # The limit that this process was started with may be lower, and only root could raise it.
    _, hard = resource.getrlimit(kind)
    if value == resource.RLIM_INFINITY or (hard != resource.RLIM_INFINITY and hard < value):
        value = hard
    resource.setrlimit(kind, (value, hard))


def _end_with_parent(connection: socket.socket) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    os._exit(0)
