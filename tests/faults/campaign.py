"""The whole fault campaign and its table: `make faults`, or `python tests/faults/campaign.py --scale 0.2`.

`--scale` multiplies the number of trials: 1 takes about half an hour on two cores. `--only WORDS` runs the kinds whose
name holds one of the words. Exit status 1 if anything did not hold.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `faults` and `runs`, as pytest finds them

import torch

from faults import crashes, flips, processes
from faults.rows import Row, as_table
from runs import pack_digits
from selfvil import runtime

Kind = Callable[[Path, Path], Row]


def kinds(scale: float, seed: int = 0) -> dict[str, Kind]:
    """Every kind of fault by its name; each takes the digits' shards and an empty folder."""

    def of(count: int) -> int:
        return max(1, round(scale * count))

    every = max(1, round(1 / scale))
    return {
        "kills": lambda shards, folder: crashes.random_kills(shards, folder, of(60), seed),
        "kills-dino": lambda shards, folder: crashes.random_kills(shards, folder, of(40), seed, "dino"),
        "crash-points": lambda shards, folder: crashes.crash_points(shards, folder, every),
        "full-disk": lambda shards, folder: crashes.crash_points(shards, folder, every, full_disk=True),
        "writers-crash": lambda shards, folder: crashes.crash_points_of_writers(shards, folder, every),
        "writers-full-disk": lambda shards, folder: crashes.crash_points_of_writers(shards, folder, every, True),
        "damaged-runs": lambda shards, folder: flips.damaged_runs(shards, folder, of(120), seed),
        "damaged-exports": lambda shards, folder: flips.damaged_exports(shards, folder, of(200), seed),
        "damaged-shards": lambda shards, folder: flips.damaged_shards(shards, folder, of(300), seed),
        "damaged-indexes": lambda shards, folder: flips.damaged_indexes(shards, folder, of(200), seed),
        "signals": lambda shards, folder: processes.signals(shards, folder, of(20), seed),
        "two-launches": lambda shards, folder: processes.two_launches(shards, folder, of(30), seed),
        "killed-workers": lambda shards, folder: processes.killed_workers(shards, folder, of(20), seed),
        "stopped-workers": lambda shards, folder: processes.stopped_workers(shards, folder, of(10)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        shards = pack_digits(Path(temporary) / "digits")
        for name, kind in kinds(given.scale, given.seed).items():
            if given.only and not any(word in name for word in given.only):
                continue
            folder = Path(temporary) / name
            folder.mkdir()
            rows.append(kind(shards, folder))
            print(f"{name}: {rows[-1].held} of {rows[-1].tried}", file=sys.stderr, flush=True)
    print(f"seed {given.seed}, commit {runtime.commit()}, {(time.monotonic() - began) / 60:.0f} minutes\n")
    print(as_table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
