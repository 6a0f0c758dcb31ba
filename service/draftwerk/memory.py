"""How much memory there is, how much this process used, and sizes as people write them."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as "512MiB", "1.5G" or "1000000".

    Raises:
        ValueError: the text is not a size, or one that no memory has.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is too large: write a size of less than 8 EiB")
    return int(size)


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated without swapping: of the machine, or of the control group if that has less.

    Args:
        group: where the control group's figures are.
    """
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            available = int(match[1]) * 1024
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            # Of files that were read, what nobody has asked for lately is given back before anything is refused.
            cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            available = min(available, max(0, int(limit) - used + (int(cached[1]) if cached else 0)))
    except (OSError, ValueError):
        pass  # no such files on this system: the figure so far stands
    return available


def resident_bytes() -> int:
    """Memory that this process has resident now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most memory that this process had resident so far, in bytes."""
    try:
        # getrusage would count what the parent had resident when it forked.
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
