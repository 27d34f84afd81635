"""Indexes of remote shards: the sidecar `SHARD.index.npz` beside the shard in the store, and the copy in the user's
cache folder.

The copy belongs to one version of the shard: its size and ETag. A sidecar from a store belongs to a shard of its size;
that it belongs to these bytes is seen when the shard arrives, by the CRC-32 of every image.
"""

import logging
import os
import tempfile
import zlib
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from selfvil.data import sidecar
from selfvil.data.remote import store
from selfvil.data.remote.access import Denied, Missing, Version
from selfvil.data.remote.urls import Url
from selfvil.data.sidecar import ShardIndex, Stamp
from selfvil.data.tar import BLOCK

_log = logging.getLogger(__name__)


class Remote(NamedTuple):
    """A file of a store, in one version."""

    url: Url
    version: Version

    @property
    def name(self) -> str:
        """In the cache; another version has another name."""
        return sha256(f"{self.url.text}\0{self.version.tag}".encode()).hexdigest()[:32]

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.version.size, int(sha256(self.version.tag.encode()).hexdigest()[:15], 16))


def load(file: Remote, image: str | None) -> tuple[ShardIndex, bool] | None:
    """The copy in the cache folder, and whether it belongs to this version. None if there is none."""
    path = sidecar.in_cache(file.url.text.encode(), image)
    loaded = None if path is None else sidecar.load(path, file.version.size)
    return None if loaded is None else (loaded[0], loaded[1] == file.stamp)


def save(file: Remote, image: str | None, index: ShardIndex) -> None:
    path = sidecar.in_cache(file.url.text.encode(), image)
    try:
        if path is None:
            raise OSError("there is no home folder")
        sidecar.save(path, file.stamp, index)
    except OSError as error:
        _log.warning("the index of %s could not be saved (%s) and will be made again", file.url, error)


def from_store(file: Remote, image: str | None) -> ShardIndex | None:
    """The sidecar beside a shard, if it fits a shard of this size. Raises UserError if the store fails."""
    url = file.url.beside(sidecar.ending(image))
    try:
        version = store.stat(url)
        if not 0 < version.size <= sidecar.most_bytes(file.version.size):
            return None
        data = store.read(url, version, 0, version.size)
    except (Missing, Denied):
        return None
    with tempfile.TemporaryDirectory(prefix="selfvil-") as folder:
        path = Path(folder, "index")
        path.write_bytes(data)
        loaded = sidecar.load(path, file.version.size)
    if loaded is None or loaded[1].size != file.version.size:
        _log.info("%s does not belong to the shard beside it; building it again", url)
        return None
    return loaded[0]


def damaged(index: ShardIndex, descriptor: int) -> int:
    """How many images of a downloaded shard have another CRC-32 than its index states."""
    rows = zip(index.blocks.tolist(), index.sizes.tolist(), index.crcs.tolist())
    return sum(zlib.crc32(os.pread(descriptor, size, block * BLOCK)) != crc for block, size, crc in rows)
