"""Free memory under the limits of containers and clusters, and the limit of a process."""

import resource
from pathlib import Path

import psutil
import pytest
import torch

from selfvil import free_memory

CPU = torch.device("cpu")
GIB = 2**30
FILES = {
    "0::": ("", "memory.max", "memory.current", "inactive_file {}\nactive_file {}\nanon 7\n"),
    "4:cpu,memory:": (
        "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        "inactive_file 5\ntotal_inactive_file {}\ntotal_active_file {}\n",
    ),
}  # fmt: skip


def group(root: Path, kind: str, path: str, limit: object, used: int, cached: tuple[int, int] = (0, 0)) -> None:
    top, of_limit, of_use, stat = FILES[kind]
    folder = root / top / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / of_limit).write_text(f"{limit}\n")
    (folder / of_use).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat.format(*cached))


def found(tmp_path: Path, *lines: str) -> list[int]:
    (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    return list(free_memory._free_in_groups(tmp_path / "cgroup", tmp_path / "groups"))


@pytest.mark.parametrize("kind", FILES)
def test_every_limit_above_a_job_counts(tmp_path, kind):
    """As of Slurm: the limit of the job is two groups above the process."""
    unlimited = "max" if kind == "0::" else 2**63 - 4096
    group(tmp_path / "groups", kind, "job_7", 8 * GIB, 6 * GIB, cached=(GIB, GIB))
    group(tmp_path / "groups", kind, "job_7/step_0", 20 * GIB, 6 * GIB)
    group(tmp_path / "groups", kind, "job_7/step_0/task_0", unlimited, 6 * GIB)
    lines = ["9:name=systemd:/", "3:cpuset:/job_7", f"{kind}/job_7/step_0/task_0"]
    assert min(found(tmp_path, *lines)) == 4 * GIB, "8 less 6, of which 2 are cached files"
    assert 14 * GIB in found(tmp_path, *lines)


@pytest.mark.parametrize("kind", FILES)
def test_a_container_sees_its_own_group_as_the_top(tmp_path, kind):
    group(tmp_path / "groups", kind, "", 3 * GIB, GIB)
    assert found(tmp_path, f"{kind}/") == [2 * GIB]
    assert found(tmp_path, f"{kind}/a/group/of/the/host") == [2 * GIB], "whose folder is not in the container"


def test_without_groups_the_machine_is_the_limit(tmp_path):
    assert found(tmp_path, "0::/", "4:memory:/none") == []
    assert list(free_memory._free_in_groups(tmp_path / "missing", tmp_path)) == []


def test_the_least_limit_holds(monkeypatch):
    available = psutil.virtual_memory().available
    assert 0 < free_memory.free_host_bytes() < 1.2 * available
    monkeypatch.setattr(free_memory, "_free_in_groups", lambda: iter([GIB, 2 * GIB]))
    assert free_memory.free_host_bytes() == min(GIB, psutil.virtual_memory().available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory.free_bytes(CPU) == free_memory.free_host_bytes() // 4


def test_more_memory_than_is_free_is_an_error_instead_of_the_end_of_the_process(monkeypatch):
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2**28)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    for take in (lambda: torch.empty(2**29, dtype=torch.uint8), lambda: bytearray(2**29)):
        with pytest.raises(MemoryError), free_memory.memory_limit(CPU):
            take()
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
        take()
    with pytest.raises(RuntimeError, match="size"), free_memory.memory_limit(CPU):
        torch.zeros(2) @ torch.zeros(3)
    with free_memory.memory_limit(torch.device("meta")):
        torch.empty(2**29, dtype=torch.uint8)
    with pytest.raises(MemoryError), free_memory.memory_limit(torch.device("meta")):
        raise torch.OutOfMemoryError("CUDA out of memory")
