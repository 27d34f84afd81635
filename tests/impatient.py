"""`launch/pretrain.py` for tests of failing stores: this is what torchrun starts.

The environment says after how many seconds a store is given up (PATIENCE), and which process loses its network after
how many reads of images (LOSES_NETWORK=RANK:READS). Each process leaves what `run_many.recorded` writes.
"""

import os
import sys
from types import SimpleNamespace

import run_many
from selfvil.cli import main
from selfvil.data.remote import store


def lose_network_after(reads: int) -> None:
    read, done = store.read, []

    def counting(url, *arguments, **more):
        done.append(url)
        if len(done) == reads:
            os.environ["http_proxy"] = "http://127.0.0.1:9"  # nobody answers there
        return read(url, *arguments, **more)

    store.read = counting


if __name__ == "__main__":
    store.PATIENCE = store.PATIENCE_AT_START = float(os.environ["PATIENCE"])
    store._FIRST_PAUSE = 0.05
    rank, _, reads = os.environ.get("LOSES_NETWORK", "").partition(":")
    if rank == os.environ["RANK"]:
        lose_network_after(int(reads))
    out = next(word.removeprefix("run.out=") for word in sys.argv if word.startswith("run.out="))
    with run_many.recorded(SimpleNamespace(run=SimpleNamespace(out=out))):
        main(["pretrain", *sys.argv[1:]])
