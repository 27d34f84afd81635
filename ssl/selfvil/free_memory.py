"""How much memory is free, and a limit that makes too much an error instead of the end of the process."""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of its GPU, or its share of `free_host_bytes`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host_bytes() -> int:
    """Memory of the machine, or of the container or job this is part of, that all processes together may still take."""
    return min([psutil.virtual_memory().available, *_free_in_groups()])


def _free_in_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Free bytes under each limit of Linux's control groups, by which containers and clusters (Slurm) limit a job.

    A limit holds for all groups below it. Files that are cached count as used there, and are dropped when memory is
    needed, so they are free. groups, root: for tests.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, used, cached = root, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):  # version 1
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):  # no such group in this container, or no limit ("max")
                    yield int((folder / limit).read_text()) - int((folder / used).read_text()) + _of(folder, cached)


def _of(group: Path, names: Sequence[str]) -> int:
    """The sum of these figures of a group's memory."""
    rows = (line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    return sum(int(value) for name, value in rows if name in names)


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Within it, MemoryError is raised where more is taken on `device` than is free.

    Linux lends more memory than it has, and ends the process that uses it, without a message. So on a CPU this process
    may not take more than is free, other threads included. There is no new limit where the user has set one, or where
    the system does not tell what is taken.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = _taken_bytes() if device.type == "cpu" else None
    if taken is not None and soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (taken + free_bytes(device), hard))
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError from error
    except RuntimeError as error:  # torch has no error of its own for the memory of a CPU
        if "can't allocate memory" in str(error):
            raise MemoryError from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _taken_bytes() -> int | None:
    """Bytes that count for the limit of this process, or None if this system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    except (OSError, StopIteration, ValueError):
        return None
