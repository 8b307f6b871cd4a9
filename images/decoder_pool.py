"""Decoder processes: images whose decoding is costly are decoded apart, with limits of memory and time.

In: a file whose work is within the limits, and what is wanted of it. Out: its pixels, or an ImageError. A decoder
process has one image at a time, so one that is killed, by its own limits or by anybody, takes only that image with it.
It is started when it is needed, and it ends when the process that started it ends, however that happens.
"""

import atexit
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from images.decoder_pillow import Wanted
from images.decoder_process import FAILED, READY, STARTED, receive, send
from images.parallel import num_threads
from images.settings import ImagesSettings
from records.arrays import UInt8Array
from records.errors import ImageError, UnavailableError
from records.frames import Frame
from records.images import too_costly

START_TIMEOUT_S = 60.0
# The time limit counts processor time. On a busy machine that lasts longer; a process that does nothing at all, such
# as a stopped one, is given up after this many times the limit.
WALL_FACTOR = 8
MAX_STARTS = 3
_ROOT = Path(__file__).resolve().parent.parent
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from images.decoder_process import main; main()"


class DecoderPool:
    """The decoder processes of one process. Thread-safe.

    Args:
        limits: of memory, time and the number of processes.
    """

    def __init__(self, limits: ImagesSettings) -> None:
        self._limits = limits
        self._owner = os.getpid()
        self._idle: list[_Decoder] = []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(limits.decoder_processes or num_threads())

    def decode(self, stripped: bytes, wanted: Wanted, pixels: int) -> list[UInt8Array]:
        """Decode an image in a decoder process.

        Args:
            stripped: a file without metadata.
            wanted: what to make of it.
            pixels: number of pixels of the image.
        Returns:
            See `decode_here`.
        Raises:
            ImageError: the file is damaged, or code `too_costly` if it exceeds a limit or its decoder was killed.
            UnavailableError: no decoder process starts.
        """
        frames = [(frame.side_px, frame.crop, frame.squeezed) for frame in wanted.frames]
        asked = {"frames": frames, "max_side_px": wanted.max_side_px}
        document, body = self._reply(stripped, asked, sum(side_px**2 for side_px, _, _ in frames) or pixels)
        return _arrays(document, body, wanted)

    def decode_dicom(self, data: bytes) -> tuple[UInt8Array, dict[str, Any]]:
        """Decode a DICOM file in a decoder process, which also checks its work.

        Args:
            data: the file.
        Returns:
            [H, W, 3], and the tags that are kept.
        Raises:
            ImageError: see `decode`; also if the file holds no image that can be read.
            UnavailableError: no decoder process starts.
        """
        asked = {"dicom": self._limits.model_dump(mode="json")}
        document, body = self._reply(data, asked, int(self._limits.max_megapixels * 1e6))
        return _arrays(document, body, Wanted())[0], dict(document["tags"])

    def _reply(self, data: bytes, asked: dict[str, Any], most_pixels: int) -> "_Reply":
        with self._slots:
            for _ in range(MAX_STARTS):
                # One that ended before it had the image ended for another reason: the next one gets it.
                with contextlib.suppress(_NotStartedError):
                    return self._work(data, asked, most_pixels)
        raise UnavailableError("decoder processes end before they get an image; see the log for the reason")

    def close(self) -> None:
        """End the processes that have no image now."""
        # A forked child runs what its parent registered for the exit, too.
        if os.getpid() != self._owner:
            return
        with self._lock:
            idle, self._idle = self._idle, []
        for decoder in idle:
            decoder.end()

    def process_ids(self) -> list[int]:
        """Return the ids of the processes that wait for an image."""
        with self._lock:
            return [decoder.process.pid for decoder in self._idle]

    def _work(self, data: bytes, asked: dict[str, Any], most_pixels: int) -> "_Reply":
        with self._lock:
            decoder = self._idle.pop() if self._idle else None
        decoder = decoder or _Decoder(self._limits)
        try:
            reply = decoder.work(data, asked, most_pixels)
        except BaseException:
            decoder.end()
            raise
        with self._lock:
            self._idle.append(decoder)
        if isinstance(reply, ImageError):
            raise reply
        return reply


_Reply = tuple[dict[str, Any], memoryview]


class _NotStartedError(Exception):
    """Raised when a decoder process ended before it had read an image."""


class _Decoder:
    """One decoder process and the socket to it."""

    def __init__(self, limits: ImagesSettings) -> None:
        self._limits = limits
        ours, theirs = socket.socketpair()
        self._socket = ours
        # Isolated (-I): neither the working folder nor variables of Python decide what is imported. Of the environment
        # it gets what a process needs to run: a program that breaks out of a decoder must not find passwords there.
        self.process = subprocess.Popen(
            [
                sys.executable, "-I", "-c", _BOOT, str(_ROOT), str(theirs.fileno()),
                str(limits.decoder_memory_mb), str(limits.decoder_time_s),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            cwd="/",
        )  # fmt: skip
        theirs.close()
        try:
            if self._reply(START_TIMEOUT_S)[0] != READY:
                raise EOFError
        except (OSError, EOFError) as error:
            self.end()
            raise _NotStartedError from error

    def work(self, data: bytes, asked: dict[str, Any], most_pixels: int) -> "_Reply | ImageError":
        """Return the reply about an image, or the error that decoding it ended with."""
        try:
            self._socket.settimeout(START_TIMEOUT_S)
            send(self._socket, STARTED, asked, [data])
            kind, _, _ = self._reply(START_TIMEOUT_S)
        except (OSError, EOFError) as error:
            raise _NotStartedError from error
        if kind != STARTED:
            raise _NotStartedError
        wall_s = WALL_FACTOR * self._limits.decoder_time_s
        try:
            kind, document, body = self._reply(wall_s, 3 * most_pixels)
        except TimeoutError as error:
            raise too_costly(f"it took longer than {wall_s:g} s") from error
        except (OSError, EOFError) as error:
            raise self._cause() from error
        if kind == FAILED:
            if document["code"] == "memory":
                return self._memory_error()
            return ImageError(str(document["message"]), str(document["code"]))
        return document, body

    def end(self) -> None:
        """Kill the process, which has nothing to save, and wait for its end."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(START_TIMEOUT_S)

    def _reply(self, timeout_s: float, most_bytes: int = 0) -> tuple[bytes, dict[str, Any], memoryview]:
        return receive(self._socket, most_bytes, time.monotonic() + timeout_s)

    def _memory_error(self) -> ImageError:
        return too_costly(f"it needs more than {self._limits.decoder_memory_mb} MB of memory")

    def _cause(self) -> ImageError:
        """Return why the process ended while it worked on an image."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(START_TIMEOUT_S)
        if self.process.returncode == -signal.SIGXCPU:
            return too_costly(f"it takes more than {self._limits.decoder_time_s:g} s of processor time")
        return too_costly(
            f"its decoder was killed within its limits of {self._limits.decoder_time_s:g} s and "
            f"{self._limits.decoder_memory_mb} MB"
        )


def _arrays(document: Mapping[str, Any], body: memoryview, wanted: Wanted) -> list[UInt8Array]:
    """Cut the reply into arrays; a decoder that was taken over may send anything, so nothing is taken on trust."""
    shapes = [(int(height), int(width), 3) for height, width in document["shapes"]]
    fit = [_fits(height, width, frame) for (height, width, _), frame in zip(shapes, wanted.frames, strict=False)]
    if not all(fit) or len(shapes) != (len(wanted.frames) or 1) or min(min(s) for s in shapes) < 1:
        raise UnavailableError("a decoder process sent pixels of another size than asked for")
    flat = np.frombuffer(body, dtype=np.uint8)
    if len(flat) != sum(height * width * 3 for height, width, _ in shapes):
        raise UnavailableError("a decoder process sent another number of pixels than it said")
    ends = np.cumsum([height * width * 3 for height, width, _ in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def _fits(height_px: int, width_px: int, frame: Frame) -> bool:
    sides_px = (height_px, width_px)
    return min(sides_px) == max(sides_px) == frame.side_px if frame.squeezed else max(sides_px) == frame.side_px


@functools.lru_cache(maxsize=4)
def decoder_pool(limits: ImagesSettings) -> DecoderPool:
    """Return the pool of this process for these limits."""
    pool = DecoderPool(limits)
    atexit.register(pool.close)
    return pool


# A forked child would share the sockets of its parent's decoders and read their replies.
os.register_at_fork(after_in_child=decoder_pool.cache_clear)
