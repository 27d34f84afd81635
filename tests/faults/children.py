"""Runs in forked children, so that one can be killed, stopped or run out of disk in a fraction of a second.

Starting Python and importing torch takes longer than these runs. A child is a copy of this process, which has imported
everything and has trained nothing.
"""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from selfvil.errors import UserError

FINISHED, REFUSED, TRACEBACK = 0, 2, 1
"""Exit status of a child whose work ended, was refused by a UserError, or failed with any other exception."""

_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (negative: the signal that killed it), what it printed, and its seconds."""

    status: int
    text: str
    seconds: float

    @property
    def one_sentence(self) -> bool:
        """Whether it ended without a traceback."""
        return self.status != TRACEBACK and "Traceback" not in self.text


class Child:
    """`work` in a forked process; its standard output and error go to the file `log`."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.log, self.began = log, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(work, log)

    def signal(self, number: int) -> None:
        """Send a signal, if it has not ended yet."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Ended:
        """Wait for its end; after so many seconds it is killed, and reported as killed by SIGKILL."""
        deadline = time.monotonic() + seconds
        while (found := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                found = os.waitpid(self.pid, 0)
                break
            time.sleep(0.01)
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(os.waitstatus_to_exitcode(found[1]), text, time.monotonic() - self.began)


def run(work: Callable[[], object], log: Path, seconds: float = 120) -> Ended:
    """`work` in a child, to its end."""
    return Child(work, log).wait(seconds)


def _be_child(work: Callable[[], object], log: Path) -> None:
    status = TRACEBACK
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the rest of this process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        work()
        status = FINISHED
    except UserError as error:
        print(f"selfvil: {error}", file=sys.stderr)
        status = REFUSED
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else FINISHED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# --- faults at a chosen file operation, inside a child ---------------------------------------------------------------


def count_writes(folder: Path) -> Callable[[], int]:
    """Count the operations of this process that change files below `folder`; the result returns the count so far."""
    seen = [0]

    def watch(_: str) -> None:
        seen[0] += 1

    _on_write(folder, watch)
    return lambda: seen[0]


def die_at(folder: Path, operation: int) -> None:
    """Let this process end, as by SIGKILL, just before its n-th operation (from 0) on files below `folder`."""
    left = [operation]

    def watch(_: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    _on_write(folder, watch)


def fill_disk_at(folder: Path, operation: int) -> None:
    """Let operations on files below `folder` fail as on a full disk, from the n-th (from 0) on; removing works."""
    left = [operation]

    def watch(event: str) -> None:
        if left[0] <= 0 and event not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        left[0] -= 1

    _on_write(folder, watch)


def _on_write(folder: Path, watch: Callable[[str], None]) -> None:
    """Call `watch(event)` before each change below `folder`. An audit hook stays for the life of the process."""
    prefix = os.path.realpath(folder)
    inside = [False]

    def hook(event: str, args: tuple) -> None:
        if inside[0] or not (event == "open" or event in _WRITES):
            return
        if event == "open" and not _writes(args):
            return
        paths = [os.fsdecode(arg) for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike)]
        inside[0] = True
        try:
            if any(os.path.realpath(path).startswith(prefix) for path in paths):
                watch(event)
        finally:
            inside[0] = False

    sys.addaudithook(hook)


def _writes(args: tuple) -> bool:
    _, mode, flags = args
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
