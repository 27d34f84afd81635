"""`map` over worker processes, in order and with bounded memory, for packing and inspecting."""

import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from selfvil.machine import usable_cores

_T = TypeVar("_T")


def map_processes(
    function: Callable[[int], _T], chunks: Sequence[Sequence[int]], workers: int | None
) -> Iterator[list[_T]]:
    """For each chunk of numbers, the list of the function's results, in the order of the chunks.

    At most four chunks for each worker are in work or in memory. The function may redirect standard error, and a
    decoder that crashes ends a worker only; so a single worker is a process too. Forked workers inherit the function
    and what it refers to, such as a list of files, so it is not sent to them.

    Args:
        workers: processes; None for all cores.

    Raises:
        BrokenProcessPool: a worker died.
    """
    if not chunks:
        return
    workers = min(workers or usable_cores(), len(chunks))
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin_worker, initargs=(function,))
    waiting = iter(chunks)
    try:
        pending = deque(pool.submit(_call_worker, chunk) for chunk in itertools.islice(waiting, 4 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_call_worker, chunk) for chunk in itertools.islice(waiting, 1))
    finally:
        pool.shutdown(cancel_futures=True)


_worker_function: Callable[[int], Any]  # set in worker processes only


def _begin_worker(function: Callable[[int], Any]) -> None:
    global _worker_function
    _worker_function = function
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C interrupts all processes; the main one ends the workers


def _call_worker(chunk: Sequence[int]) -> list[Any]:
    return [_worker_function(i) for i in chunk]
