"""CPU seconds, wall seconds and resident memory of this process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from time import perf_counter, process_time

PROC = Path("/proc/self")


def resident(field: str = "VmRSS") -> int:
    """Bytes; ``VmHWM`` is the most there have been since the process or :func:`restart_peak`."""
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{PROC}/status has no {field}")


def restart_peak() -> None:
    """Give memory of the set-up back, and let the peak begin at what is left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (PROC / "clear_refs").write_text("5")


def die_first() -> None:
    """Should memory run out, let it be this process that is ended, and no one else's."""
    (PROC / "oom_score_adj").write_text("900")


class Clock:
    """CPU seconds of this process with all its threads, and wall seconds, since the last look."""

    def __init__(self) -> None:
        self.cpu, self.wall = process_time(), perf_counter()

    def look(self) -> tuple[float, float]:
        before = self.cpu, self.wall
        self.cpu, self.wall = process_time(), perf_counter()
        return self.cpu - before[0], self.wall - before[1]
