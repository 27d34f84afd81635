"""What this process may take of the machine, or of its container or job: cores and memory."""

import os
import resource
from collections.abc import Iterator
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


def usable_cores() -> int:
    """Cores that this process may use, at least 1: by its affinity, as Slurm sets it, and by a container's quota."""
    return max(1, min([len(os.sched_getaffinity(0)), *_cores_of_groups()]))


def _free_in_groups() -> Iterator[int]:
    """Free bytes under each limit. Cached files count as used there; they are dropped when memory is needed."""
    for folder, version in _groups("memory"):
        if version == 1:
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = {"total_inactive_file", "total_active_file"}
        else:
            limit, used, cached = "memory.max", "memory.current", {"inactive_file", "active_file"}
        with suppress(OSError, ValueError):  # no such group in this container, or no limit ("max")
            rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            dropped = sum(int(value) for name, value in rows if name in cached)
            yield int((folder / limit).read_text()) - int((folder / used).read_text()) + dropped


def _cores_of_groups() -> Iterator[int]:
    """Whole cores under each quota, a time in each period."""
    for folder, version in _groups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version == 1 else ("cpu.max",)
        with suppress(OSError, ValueError):  # no such group in this container, or no quota ("max", -1)
            quota, period = (int(each) for name in names for each in (folder / name).read_text().split())
            if quota > 0:
                yield quota // period


def _groups(
    controller: str, membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, int]]:
    """Folders of Linux's control groups that this process is in, from the inmost, with their version, 1 or 2.

    Containers and clusters (Slurm) limit a job by them; a limit holds for all groups below it.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top, version = (root / controller, 1) if controllers else (root, 2)
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, version


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
