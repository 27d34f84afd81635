"""Open shards of a store: their versions and indexes, before anything is trained."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, TypeVar

from selfvil.data.base import Pattern, Progress
from selfvil.data.changes import Change, compare
from selfvil.data.remote import indexes, store
from selfvil.data.remote.cache import Cache
from selfvil.data.remote.fetch import open_whole
from selfvil.data.remote.indexes import Remote
from selfvil.data.remote.urls import Location, Url, expand_braces, is_remote
from selfvil.data.sidecar import ShardIndex
from selfvil.errors import UserError, shorten

WINDOW = 16
"""Shards in a window of the order, unless `data.window` states another number."""

Build = Callable[[BinaryIO, Location, str | None], ShardIndex]
"""Makes the index of a shard: `selfvil.data.shard.build`."""

_THREADS = 16  # requests at a time

_T = TypeVar("_T")
_R = TypeVar("_R")


def find_remote(pattern: Pattern, progress: Progress | None) -> list[Remote]:
    """The shards of a URL with braces (or, except for https, stars), or of a list of them, in their present versions.

    Raises:
        UserError: a URL is not accepted, given twice or does not exist, or the store fails.
    """
    return in_threads(lambda url: Remote(url, store.stat(url)), expand_urls(pattern), _THREADS, progress)


def index_remote(
    files: Sequence[Remote], build: Build, progress: Progress | None, image: str | None, cache: Cache
) -> tuple[list[ShardIndex], dict[Location, Change]]:
    """The index of each shard, and what changed in those that differ from the last time they were indexed.

    An index comes from the user's cache folder, from the store, or from the shard itself, which is then downloaded.

    Raises:
        UserError: the store fails, or a shard is damaged.
    """

    def opened(file: Remote) -> tuple[ShardIndex, Change | None]:
        loaded = indexes.load(file, image)
        if loaded is not None and loaded[1]:
            return loaded[0], None
        index = indexes.from_store(file, image)
        if index is None:
            with open_whole(file, cache) as content:
                index = build(content, file.url, image)
        indexes.save(file, image, index)
        return index, compare(loaded[0], index) if loaded else None

    found = in_threads(opened, files, _THREADS, progress)
    changed: dict[Location, Change] = {file.url: change for file, (_, change) in zip(files, found) if change}
    return [index for index, _ in found], changed


def expand_urls(pattern: Pattern) -> list[Url]:
    """The URLs of a pattern or a list of patterns. Raises UserError."""
    patterns = [pattern] if isinstance(pattern, str) or not isinstance(pattern, Sequence) else list(pattern)
    if local := [each for each in patterns if not is_remote(each)]:
        raise UserError(
            f"{shorten(str(local[0]), 200)} is a path, and other shards are URLs; give only paths, or only URLs"
        )
    urls: list[Url] = []
    for each in patterns:
        for url in expand_braces(str(each)):
            urls += store.glob(url) if "*" in url.text else [url]
    if len(set(urls)) < len(urls):
        twice = next(url for number, url in enumerate(urls) if url in urls[:number])
        raise UserError(f"shard {twice} is given twice; name each shard once")
    return urls


def in_threads(
    action: Callable[[_T], _R], items: Sequence[_T], threads: int, progress: Progress | None = None
) -> list[_R]:
    """The results of `action`, in order. Raises one UserError for all that fail."""
    results: list[_R] = []
    errors: list[str] = []
    with ThreadPoolExecutor(max(1, min(threads, len(items)))) as pool:
        try:
            for number, future in enumerate([pool.submit(action, item) for item in items]):
                try:
                    results.append(future.result())
                except store.StoreFailed:
                    raise
                except UserError as error:
                    errors.append(str(error))
                if progress is not None:
                    progress(number + 1, len(items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if errors:
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise UserError("; ".join(errors[:5]) + more)
    return results
