"""Checks under torchrun with two processes, since starting them takes longer than all checks: `test_processes` runs it.

torchrun --nproc_per_node 2 two_processes.py RUN TRAIN TEST OUT
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from selfvil.cli import main
from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.evaluate.features import extract
from selfvil.evaluate.processes import Processes, launched
from selfvil.monitor.evaluations import run_evaluations
from selfvil.recipe import parse, read
from selfvil.stop import Interrupted
from selfvil.weights import load_pretrained


def check_collectives(processes: Processes) -> None:
    """Rows of uneven parts are gathered in order; a failure of one process is known to all; buffers are shared."""
    for counts in ((3, 2), (0, 4), (4, 0), (0, 0)):
        own = torch.arange(counts[processes.rank] * 2.0).view(-1, 2) + 10 * processes.rank
        own = own if len(own) else torch.zeros(0, 0)
        rows = processes.gather_rows(own)
        expected = [torch.arange(count * 2.0).view(-1, 2) + 10 * rank for rank, count in enumerate(counts)]
        assert (rows is None) == (processes.rank == 1)
        assert rows is None or rows.tolist() == torch.cat(expected).tolist()

    for error in (UserError("no room"), Interrupted()):
        caught = None
        try:
            processes.together(lambda error=error: fail(error) if processes.rank == 1 else "done")
        except (UserError, Interrupted) as raised:
            caught = raised
        assert str(caught) == str(error) if processes.rank == 1 else "process 1: " in str(caught)
    assert processes.together(lambda: processes.rank) == processes.rank

    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(processes.rank)
    with processes.same_buffers(norm):
        assert norm.running_mean.tolist() == [0, 0]
    assert norm.running_mean.tolist() == [processes.rank] * 2


def fail(error: BaseException) -> None:
    raise error


def check_features(processes: Processes, run: str, shards: str) -> None:
    """Features equal those of one process bit for bit, for 120 images in 8 batches, and in 1 (one process has none)."""
    backbone, normalisation, _ = load_pretrained(run)
    options = {
        "img_size": normalisation.img_size,
        "mean": normalisation.mean,
        "std": normalisation.std,
        "workers": 0,
        "device": "cpu",
    }
    for batch_size in (16, 256):
        alone = extract(backbone, open_shards(shards), batch_size=batch_size, **options)
        shared = extract(backbone, open_shards(shards), batch_size=batch_size, processes=processes, **options)
        assert (shared is None) == (processes.rank == 1)
        assert shared is None or torch.equal(shared.x, alone.x)
        assert shared is None or torch.equal(shared.y, alone.y)


def check_run(processes: Processes, run: str, train: str, test: str) -> dict[str, float]:
    """In a training loop: an entry whose shards one process cannot open fails on both; the others have scores."""
    entries = [{"name": name, "train": train, "test": test} for name in ("knn", "linear", "few_label")]
    missing = f"{test}.none" if processes.rank == 1 else test
    entries.insert(0, {"name": "knn", "train": train, "test": missing})
    recipe = parse(read(Path(run, "recipe.yaml")).model_dump(mode="json") | {"eval": entries}, "recipe")
    failed = []

    @contextmanager
    def guard(what: str):
        try:
            yield
        except UserError as error:
            failed.append(f"{what}: {error}")

    backbone = load_pretrained(run).backbone.eval()
    scores = run_evaluations(recipe, [0, 1, 2, 3], backbone, torch.device("cpu"), guard=guard)
    assert len(failed) == 1
    assert ("process 1: " in failed[0]) == (processes.rank == 0)
    assert "the evaluation 0/knn: " in failed[0]
    return scores


if __name__ == "__main__":
    run, train, test, out = sys.argv[1:]
    with launched() as processes:
        assert processes.world_size == 2
        check_collectives(processes)
        check_features(processes, run, train)
        scores = check_run(processes, run, train, test)
        assert bool(scores) == processes.is_main
        if processes.is_main:
            Path(out, "loop.json").write_text(json.dumps(scores))
        words = ["--train", train, "--test", test, "--workers", "0", "--baselines", "--json", f"{out}/command.json"]
        words += ["draws=2", "epochs=2"]
        main(
            ["eval", "knn", "few_label", "linear_grid", "mae_probe", "attentive", run, *words]
        )  # exits with its status
