"""Builds the CPU kernels on first use, and loads them.

The C++ files of this folder need a compiler and no header of torch. They are compiled for the instruction set of this
processor, once for each version of sources, compiler and torch, into the user's cache folder:
$SELFVIL_CACHE, or selfvil/kernels in $XDG_CACHE_HOME or ~/.cache. Without a compiler, or if anything else fails, the
operators use torch; the log has the reason once.

Threads are those of torch: the kernels start them through the OpenMP library that torch has loaded.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from selfvil.errors import UserError
from selfvil.files import user_cache

log = logging.getLogger(__name__)

SWITCH = "SELFVIL_NATIVE"
"""Environment variable: 0 uses torch instead of the CPU kernels; a name from `LEVELS` limits the instruction set."""

LEVELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "amx": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma", "amx_tile", "amx_bf16"),
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mamx-tile", "-mamx-bf16"),
    ),
    "avx512_bf16": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma"),
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
    ),
    "avx512": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    ),
    "avx2": (("avx2", "fma"), ("-mavx2", "-mfma")),
    "plain": ((), ()),
}
"""Instruction sets, the best first: what /proc/cpuinfo must list, and the flags of the compiler."""

FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-Wno-psabi")
SOURCES = ("mlstm.cpp", "neighbours.cpp", "norms.cpp", "products.cpp", "hue.cpp")
HEADERS = ("tiles.h", "vector.h", "maps.h", "mlstm.h")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 300
"""A compiler that takes longer is stopped."""


class BuildError(Exception):
    """Why the kernels cannot be used, as the end of a sentence."""


class UnusableError(BuildError):
    """The compiler reports an error, or the operating system does not allow the instruction set."""


class Kernels:
    """The loaded library, and how it starts threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._parallel = _openmp_entry()

    def call(self, function: str, *members: int | Tensor | None) -> None:
        """Call a function of the library with the members of its structure after `parallel` and `threads`.

        A tensor is given as its address, None as a null pointer.

        Raises:
            MemoryError: there is not enough memory for the working buffers.
        """
        values = [m.data_ptr() if isinstance(m, Tensor) else 0 if m is None else m for m in members]
        structure = struct.pack(f"{len(values) + 2}q", self._parallel, torch.get_num_threads(), *values)
        if getattr(self._library, f"selfvil_{function}")(structure):
            raise MemoryError(f"the CPU kernel {function} could not allocate its working memory")


@functools.cache
def kernels() -> Kernels | None:
    """The CPU kernels, built now if this is their first use on this machine; None if they cannot be used.

    Raises:
        UserError: $SELFVIL_NATIVE has an unknown value.
    """
    reason: Exception | None = None
    for level in _levels(os.environ.get(SWITCH, "")):
        try:
            return Kernels(_load(level))
        except UnusableError as error:  # by an old compiler or system, which may not know the best instruction set
            reason = error
        except (BuildError, OSError) as error:
            reason = error
            break
    if reason:
        log.warning("CPU kernels are not used, and torch computes instead, which is slower: %s", reason)
    return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the CPU kernels can be used. While a graph is compiled, the answer becomes a constant of it."""
    return kernels() is not None


def cache_folder() -> Path:
    """Where compiled kernels are stored. Raises BuildError if no folder can be found."""
    if chosen := os.environ.get("SELFVIL_CACHE"):
        return Path(chosen).absolute() / "kernels"
    if (cache := user_cache("kernels")) is None:
        raise BuildError("there is no home folder for the compiled kernels; set SELFVIL_CACHE to a folder")
    return cache


def _levels(switch: str) -> list[str]:
    """The instruction sets to compile for, the best first; none if the kernels are turned off."""
    if switch == "0":
        return []
    names = list(LEVELS)
    if switch not in ("", "1", *names):
        raise UserError(f"{SWITCH}={switch!r} is unknown; choose one of: 0, 1, {', '.join(names)}")
    best = names.index(switch) if switch in names else 0
    supported = _processor_features()
    return [name for name in names[best:] if supported.issuperset(LEVELS[name][0])]


def _processor_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def _load(level: str) -> ctypes.CDLL:
    compiler = _compiler()
    folder, flags = cache_folder(), (*FLAGS, *LEVELS[level][1])
    here = Path(__file__).parent
    identity = [torch.__version__, platform.machine(), _version(compiler), *compiler, *flags]
    contents = [(here / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    key = hashlib.sha256(b"\0".join([*(part.encode() for part in identity), *contents])).hexdigest()[:32]
    library = folder / f"{level}-{key}.so"
    if library.exists() and (loaded := _open(library)):
        return _started(loaded)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{level}-{key}.lock", "w") as lock:
            with contextlib.suppress(OSError):  # some network file systems have no locks: then several may compile
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also if the process is killed
            if library.exists() and (loaded := _open(library)):  # built by another process in the meantime
                return _started(loaded)
            _compile(compiler, flags, here, library)
    except OSError as error:
        raise BuildError(
            f"cannot write to {folder} ({error.strerror or error}); set SELFVIL_CACHE to a folder"
        ) from None
    if loaded := _open(library):
        return _started(loaded)
    raise BuildError(f"{library} was compiled but cannot be loaded")


def _started(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, after the operating system was asked for what its instructions need, which is AMX's tiles."""
    if library.selfvil_start():
        raise UnusableError("the operating system does not allow this process to use AMX")
    return library


def _compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first that is installed."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(chosen[0]):
            raise BuildError(f"the compiler of CXX={os.environ['CXX']!r} does not exist")
        return chosen
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)}); install one, or set CXX")


def _version(compiler: list[str]) -> str:
    """Where the compiler is, and its version: a new one compiles again."""
    path = os.path.realpath(shutil.which(compiler[0]) or compiler[0])
    try:
        status = os.stat(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be examined ({error.strerror})") from None
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _compile(compiler: list[str], flags: tuple[str, ...], sources: Path, library: Path) -> None:
    """Compile into `library`, which appears only when it is complete."""
    start = time.perf_counter()
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [*compiler, *flags, *(str(sources / name) for name in SOURCES), "-o", temporary]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
                timeout=COMPILE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler[0]} took more than {COMPILE_SECONDS} s") from None
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise UnusableError(f"{compiler[0]} failed: {first or f'exit status {done.returncode}'}")
        contents = Path(temporary).read_bytes()
        with open(temporary, "ab") as file:  # the loader ignores what follows a library
            file.write(hashlib.sha256(contents).digest())
        os.chmod(temporary, 0o755)
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    log.info("building CPU kernels, once for this machine: %.1f s", time.perf_counter() - start)


def _open(library: Path) -> ctypes.CDLL | None:
    """The library, or None if it cannot be loaded or its file is damaged, which would crash the process."""
    try:
        contents = library.read_bytes()
        if hashlib.sha256(contents[:-32]).digest() != contents[-32:]:
            return None
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _openmp_entry() -> int:
    """Address of the function that starts threads, in the OpenMP library that torch is linked with."""
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        entry = torch_library.GOMP_parallel  # found in the libraries that it depends on
    except (OSError, AttributeError):
        raise BuildError("torch's OpenMP library was not found") from None
    return ctypes.cast(entry, ctypes.c_void_p).value or 0
