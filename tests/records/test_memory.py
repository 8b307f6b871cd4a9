"""Freed memory: what a process keeps, and what goes back to the kernel."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")

# Steps that allocate blocks, write to every page and free them, as a network does with its tensors.
STEPS = """
import resource, sys
from records import memory

{first}
def step():
    blocks = [bytearray({block_mb} << 20) for _ in range({blocks})]
    for block in blocks:
        block[::4096] = bytes([1]) * len(range(0, len(block), 4096))

def resident_mb():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() >> 20

step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
kept = resident_mb()
memory.return_freed_memory()
print(faults, kept, resident_mb())
"""
KEEP, KEEP_ALL = "memory.keep_freed_memory()", "memory.keep_freed_memory(of_any_size=True)"


def measure(first: str, block_mb: int, blocks: int) -> tuple[float, float, float]:
    """Return page faults of a step, resident MB after the steps, and after the memory was given back."""
    code = STEPS.format(first=first, block_mb=block_mb, blocks=blocks)
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    faults, kept, left = map(float, run.stdout.split())
    return faults, kept, left


@pytest.mark.parametrize("first", [KEEP, KEEP_ALL])
def test_blocks_of_tensors_are_kept(first: str) -> None:
    pages = 12 * 8 * 256
    assert measure("", 8, 12)[0] > pages / 2, "glibc keeps them by itself: the setting is no longer needed"
    faults, kept, left = measure(first, 8, 12)
    assert faults < pages / 50
    assert kept > 96
    assert left < kept - 80


def test_large_blocks_are_kept_by_training_only() -> None:
    pages = 3 * 100 * 256
    faults, kept, _ = measure(KEEP, 100, 3)
    assert faults > pages / 2
    assert kept < 150
    faults, kept, left = measure(KEEP_ALL, 100, 3)
    assert faults < pages / 50
    assert left < kept - 250


@pytest.mark.parametrize("missing", ["mallopt", "malloc_trim"])
def test_another_c_library_is_left_alone(missing: str) -> None:
    others = f"""
import ctypes
class Other:
    def __getattr__(self, name):
        if name == {missing!r}:
            raise AttributeError(name)
        return lambda *_: 1 / 0
ctypes.CDLL = lambda _: Other()
"""
    faults, _, _ = measure(others + KEEP, 8, 12)
    assert faults > 0
