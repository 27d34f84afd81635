"""One writer for a folder: a file lock, and a file that names the process that holds it.

The lock is a POSIX record lock (`fcntl.lockf`). The kernel releases it when its process ends in any way, kill -9
included. Unlike `flock`, it is not inherited by forked data workers, which may live some seconds longer than their
parent. It works between machines on NFS version 4, on version 3 with a lock daemon, and on Lustre or GPFS mounted with
locks. On a file system without locks, `Lease.take` logs a warning, and detects only processes of the same machine.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from selfvil.errors import UserError, redact, shorten
from selfvil.records import LEASE

log = logging.getLogger("selfvil")

# A record lock belongs to a process: it does not exclude a second holder in the same process, and closing another
# descriptor of the same file releases it.
_held: dict[Path, "Lease"] = {}


class Lease:
    """The right to write into a folder, held from `take` to `release`."""

    def __init__(self, path: Path, descriptor: int, made: bool) -> None:
        self.path, self._descriptor, self._made = path, descriptor, made
        self._before = os.pread(descriptor, 10_000, 0)

    @classmethod
    def take(cls, folder: Path, name: str) -> "Lease":
        """Take the lease of an existing folder. name: of the folder in messages, such as "run.out = runs/mine".

        Raises:
            UserError: another process holds it; the message names host, process and time. Nothing was changed.
            OSError: the file of the lease cannot be made or opened.
        """
        path = folder.resolve() / LEASE
        if path in _held:
            raise UserError(_taken(name, _read(path, None)))
        while True:
            made = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _read(path, descriptor)
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(_taken(name, owner)) from None
                if _alive(owner):
                    raise UserError(_taken(name, owner)) from None
                log.warning(
                    "%s: its file system has no locks (%s), so a second launch into it from another machine is not "
                    "detected", name, error.strerror,
                )  # fmt: skip
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _same_file(path, descriptor):  # otherwise its owner removed it between opening and locking
                break
            os.close(descriptor)
        lease = cls(path, descriptor, made)
        _held[path] = lease
        lease._write(cls._owner())
        return lease

    def release(self, *, forget: bool = False) -> None:
        """Release the lease. forget: restore the previous content of its file, or remove the file if there was none."""
        if _held.pop(self.path, None) is None:
            return
        if forget and self._made:
            self.path.unlink(missing_ok=True)
        elif forget:
            self._write(self._before)
        os.close(self._descriptor)

    def _write(self, content: bytes) -> None:
        try:  # in place: after a rename, the lock would be on the old file
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)
            os.fsync(self._descriptor)
        except OSError as error:  # the lock is held nevertheless, without the name of its owner
            log.debug("%s: %s", self.path, error)

    @staticmethod
    def _owner() -> bytes:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shorten(redact(" ".join(sys.argv)), 300),
        }
        return (json.dumps(owner) + "\n").encode()


def in_use(folder: Path) -> bool:
    """Whether a process of this machine holds the lease of a folder, which is only read."""
    try:
        return _alive(json.loads((folder / LEASE).read_bytes()[:10_000]))
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(path: Path, descriptor: int | None) -> dict[str, Any]:
    """The owner in a lease file; {} if it is damaged. A lease of this process is read through its descriptor."""
    try:
        descriptor = _held[path]._descriptor if descriptor is None else descriptor
        owner = json.loads(os.pread(descriptor, 10_000, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the owner is another process of this machine that is running and has been since the lease was taken."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        started = datetime.fromisoformat(str(owner.get("started"))).timestamp()
        return psutil.Process(pid).create_time() <= started + 1
    except (psutil.Error, ValueError, OverflowError):
        return False


def _taken(name: str, owner: dict[str, Any]) -> str:
    if {"host", "pid", "started"} <= owner.keys():
        who = f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    else:
        who = "another process"
    return f"{name} is in use by {who}: stop that run first, or choose another folder"
