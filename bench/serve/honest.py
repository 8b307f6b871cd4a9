"""Callers who send an image now and then, for `python -m bench abuse`: a process of their own.

python -m bench.serve.honest        # stdin: a line of JSON, see `Honest`, then its end stops it

Its session comes before all others, as if its callers had cores of their own. Without that, what is measured under
load is above all how long a caller waits for a core before it can read a response that has been there for long.
"""

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from bench.serve.sessions import FIRST, prioritise_session

STOP_TIMEOUT_S = 120.0


@dataclass
class Honest:
    """A process that sends images, one thread for each key.

    Args:
        url: of the service.
        keys: one per thread.
        images: that are sent, in a cycle.
        pause_s: between a response and the next image, so that the cores are not busy while it is quiet.
    Attributes:
        latencies_s: of each request of the latest `calling`, after it.
        refused: a sentence for each request that failed.
        first: whether the kernel lets the process come before all others.
    """

    url: str
    keys: Sequence[str]
    images: Sequence[bytes]
    pause_s: float = 0.5
    latencies_s: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    first: bool = False

    @contextmanager
    def calling(self, warm_s: float = 0.0) -> Iterator[None]:
        """Send during the block.

        Args:
            warm_s: how long responses warm caches and connections up, and are not counted, seconds.
        """
        command = [sys.executable, "-m", "bench.serve.honest"]
        given = {"url": self.url, "keys": list(self.keys), "pause_s": self.pause_s, "warm_s": warm_s}
        given["images"] = [base64.b64encode(image).decode() for image in self.images]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(given) + "\n")
                process.stdin.flush()
                yield
                found = json.loads(process.communicate(timeout=STOP_TIMEOUT_S)[0])
            finally:
                process.kill()
        self.latencies_s, self.refused, self.first = found["latencies_s"], found["refused"], found["first"]


@dataclass
class _Caller:
    url: str
    pause_s: float
    counted_from_s: float
    stop: threading.Event = field(default_factory=threading.Event)
    latencies_s: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def call(self, key: str, images: Sequence[bytes]) -> None:
        """Send images until it is stopped."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "image/jpeg"}
        number = 0
        with httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=60) as client:
            while not self.stop.is_set():
                image = images[number % len(images)]
                number += 1
                began_s = time.perf_counter()
                try:
                    response = client.post("/v1/predictions", content=image)
                    if response.status_code != 200:
                        self.refused.append(f"{response.status_code} {response.text[:200]}")
                except httpx.HTTPError as error:
                    self.refused.append(f"{type(error).__name__}: {error}")
                if began_s >= self.counted_from_s:
                    self.latencies_s.append(time.perf_counter() - began_s)
                self.stop.wait(self.pause_s)


def _main() -> None:
    first = prioritise_session(FIRST)
    given = json.loads(sys.stdin.readline())
    images = [base64.b64decode(image) for image in given["images"]]
    caller = _Caller(given["url"], given["pause_s"], time.perf_counter() + given["warm_s"])
    threads = [
        threading.Thread(target=caller.call, args=(key, images[number:] + images[:number]))
        for number, key in enumerate(given["keys"])
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    caller.stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"latencies_s": caller.latencies_s, "refused": caller.refused, "first": first}), flush=True)


if __name__ == "__main__":
    _main()
