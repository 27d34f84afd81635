"""Time of the evaluations on a CPU, and their agreement with scikit-learn.

    python benchmarks/evaluation.py SOURCE --cifar FOLDER [--threads 2] [--only scoring]

SOURCE is an export, run or checkpoint; FOLDER holds cifar10-train-*.tar and cifar10-test-*.tar. Measured:
- cached: each evaluation on stored features of 50,000 + 10,000 images, which torchrun's processes compute;
- agreement: k-NN and logistic regression on the same features in scikit-learn;
- scoring: `selfvil eval knn linear linear_grid` on 10,000 + 10,000 images in one pass, and k-NN alone.

Other work on the machine makes wall times longer: CPU times, and the load average before and after, are in the results.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from about import about
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from selfvil.data.index import open_shards
from selfvil.evaluate import evaluation, settings
from selfvil.evaluate.features import LAST_BLOCKS, TOKENS, Features, choose_readout
from selfvil.evaluate.knn import classify
from selfvil.evaluate.linear import DINOV3_CS, centred, linear_probe
from selfvil.evaluate.processes import Processes, launched
from selfvil.evaluate.score import score
from selfvil.evaluate.task import Task
from selfvil.weights import load_pretrained

RESULTS = Path(__file__).parent / "results" / "evaluation_cpu.json"
CACHED: list[tuple[str, dict[str, Any]]] = [
    ("linear_grid", {}),
    ("knn", {}),
    ("linear", {}),
    ("mae_probe", {}),
    ("few_label", {"labels_per_class": ["1%", "10%", 10], "draws": 5}),
    ("attentive", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--only", choices=["scoring", "cached"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["about"] = about(args, sklearn=sklearn.__version__)
    for name, measure in (("cached", measure_cached), ("scoring", measure_scoring)):
        if args.only in (None, name):
            before = os.getloadavg()[0]
            measure(args, results)
            if os.environ.get("RANK", "0") != "0":  # the other processes computed features
                return
            results[name]["load_average"] = [round(before, 1), round(os.getloadavg()[0], 1)]
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of `work`, its wall time, and the CPU time of this process and its ended children, in seconds.

    On a busy machine, the wall time is mostly that of other programs; CPU time / threads is about that of an idle one.
    """
    began, before = time.monotonic(), os.times()
    result = work()
    wall, after = time.monotonic() - began, os.times()
    used = sum(after[:4]) - sum(before[:4])
    return result, {"wall": round(wall, 1), "cpu": round(used, 1)}


def measure_scoring(args: argparse.Namespace, results: dict) -> None:
    """10,000 training and 10,000 test images: three evaluations in one pass, and k-NN alone, which is hardly faster."""
    names = ("knn", "linear", "linear_grid")
    chosen = {name: settings(name) for name in names}
    shards = [str(args.cifar / f"cifar10-{part}.tar") for part in ("train-{000000..000001}", "test-{000000..000001}")]
    found: dict[str, Any] = {}
    for label, some in (("together", names), ("knn alone", names[:1])):
        rows, seconds = timed(lambda some=some: score(args.source, *shards, {name: chosen[name] for name in some}))
        found[label] = {"seconds": seconds} | {row.metric: [round(row.value, 2), row.interval] for row in rows}
        print(label, found[label], flush=True)
    results["scoring"] = found


def measure_cached(args: argparse.Namespace, results: dict) -> None:
    """50,000 training and 10,000 test images, their features computed in one pass, then each evaluation."""
    network = load_pretrained(args.source)
    usual = choose_readout(network.backbone)
    train, test = (open_shards(str(args.cifar / f"cifar10-{part}-*.tar")) for part in ("train", "test"))
    results["cached"] = found = {}
    with launched() as processes:
        task = Task(
            "pretrained", network, network.normalisation, train, test, lambda **_: network, workers=0,
            processes=processes,
        )  # fmt: skip
        task.want([usual, LAST_BLOCKS, TOKENS])
        _, seconds = timed(lambda: task.features(usual))
    if not processes.is_main:
        return
    found["one pass over the images"] = {"processes": processes.world_size} | seconds
    print(found, flush=True)
    task.processes = Processes()
    for name, values in CACHED:
        scores, seconds = timed(lambda name=name, values=values: list(
            evaluation(name).evaluate(task, settings(name, values))))  # fmt: skip
        found[name] = {"seconds": seconds}
        for each in scores:
            found[name][each.metric] = {
                "value": round(each.value, 2),
                "deviation": None if each.deviation is None else round(each.deviation, 2),
                "interval": [round(end, 2) for end in each.interval or ()],
            }
            found[name] |= {key: value for key, value in each.details.items() if key == "chosen"}
        print(name, found[name], flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")  # what follows may take long on a busy machine
        if name == "linear":
            parts = task.features(usual)
            assert parts is not None
            some = Features(parts.train.x[:10_000], parts.train.y[:10_000])
            results["agreement"] = agreement(some, Features(parts.test.x, parts.test.y))
            print(results["agreement"], flush=True)
    found["peak memory, GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def agreement(train: Features, test: Features) -> dict[str, Any]:
    """Accuracies in percent on the same features, here and in scikit-learn with float64."""
    found: dict[str, Any] = {"train images": len(train), "test images": len(test)}
    x, queries = train.x.double().numpy(), test.x.double().numpy()
    ours = classify(train, test)
    for k, correct in ours.items():
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(x, train.y.numpy())
        same = torch.from_numpy(theirs.predict(queries) == test.y.numpy()) == correct
        found[f"knn_{k}"] = {
            "selfvil": round(100 * float(correct.double().mean()), 2),
            "images judged differently": int((~same).sum()),
        }
    for standardise, cs in ((True, None), (False, DINOV3_CS)):
        probe, seconds = timed(lambda s=standardise, c=cs: linear_probe(train, test, cs=c, standardise=s))
        fit_x, fit_queries = (part.double().numpy() for part in centred(train, test))
        scale = fit_x.std(axis=0) if standardise else 1.0
        c = 1 / (probe.strength * len(train))
        model = LogisticRegression(C=c, tol=1e-8, max_iter=10_000)
        model, theirs_seconds = timed(lambda m=model, x=fit_x / scale: m.fit(x, train.y.numpy()))
        found["linear, standardised" if standardise else "linear, c=dinov3 standardise=false"] = {
            "selfvil": round(probe.accuracy, 2),
            "scikit-learn at the same C": round(100 * model.score(fit_queries / scale, test.y.numpy()), 2),
            "C": c, "seconds of the whole choice": seconds, "seconds of one fit in scikit-learn": theirs_seconds,
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
