"""How much memory is free on a device, and memory that was freed handed back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # cgroup 2 and 1


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take there; of a container's limit, where there is one."""
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min([int(psutil.virtual_memory().available), *_left_to_container()])


def _left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    for limit, used in _GROUPS:
        try:
            return [max(0, int((folder / limit).read_text()) - int((folder / used).read_text()))]
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return []


def free_for_files() -> int:
    """Bytes that are free for temporary files; 0 where these would lie in memory, or where a file in use cannot be deleted."""
    folder = Path(tempfile.gettempdir()).resolve()
    return 0 if os.name != "posix" or _in_memory(folder) else int(psutil.disk_usage(str(folder)).free)


@cache
def _in_memory(folder: Path) -> bool:
    """Whether a folder lies on a file system that has no disk."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (folder, *folder.parents) if path in mounts), "") in ("tmpfs", "ramfs")


def hand_back() -> None:
    """Hand memory that was freed back to the system, where the C library is glibc.

    It keeps what was taken in pieces of up to 32 MiB, and tensors that stay lie in between.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
