"""What networks learn in equal processor time: labels, MAE and LeJEPA on CIFAR-10, MAE on photographs.

    python benchmarks/equal_time.py supervised mae lejepa photos --data ../shared/data --seconds 150 --json equal.jsonl
    python benchmarks/equal_time.py mae --rows forms --data ../shared/data --seconds 50 --json forms.jsonl

All rows train in one process, interleaved in turns of one second of processor time, on one thread and in float32, so
that other work on the machine slows all of them equally. Only steps are timed, not decoding. The learning rate follows
the fraction of the time that is used: a warm-up of a twentieth, then a cosine. Then each network is evaluated, and the
figures are added to the file of --json; rows that are in it are not run again. --table FILE only prints such a file.

CIFAR-10: 10,000 training images, patch 4, 64 tokens. Supervised: accuracy on 5,000 test images. MAE and LeJEPA: linear
probe and k-NN (k = 20) of frozen features, 5,000 training and 5,000 test images. Photos: MAE at 112 px, patch 8, 196
tokens, on 600 photographs and the training frames of CamVid; linear probe and k-NN of patches of CamVid by their most
frequent class, 32 patches of each training and 64 of each validation image.
"""

import argparse
import io
import json
import math
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.evaluate.features import Features, choose_readout
from selfvil.evaluate.knn import knn
from selfvil.evaluate.linear import linear_probe
from selfvil.models import VisionLSTM
from selfvil.models.adapter import adapt
from selfvil.objectives import objective_class
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.optim import adamw, parameter_groups, set_rates
from selfvil.recipe import load

Network = Callable[..., nn.Module]
TURN = 1.0
"""Seconds of processor time that a row trains before the next row continues."""
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def vil(**options: Any) -> Network:
    return partial(VisionLSTM, **{"embed_dim": 96, "num_classes": 0, "depth": 3, **options})


def mlp(**options: Any) -> Network:
    return vil(**{"block": "mlp", "depth": 2, **options})


def vit(**sizes: Any) -> nn.Module:
    layers = {"embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **layers, **sizes)


def registers(count: int) -> dict[str, Any]:
    return {"num_registers": count, "global_pool": "registers"}


NETWORKS: dict[str, Network] = {
    "vil, 3 pairs": vil(),
    "vil, 3 pairs, 4 registers": vil(**registers(4)),
    "vil-mlp, 4 blocks": mlp(),
    "vil-mlp, 4 blocks, 4 registers": mlp(**registers(4)),
    "vit, 4 layers": vit,
}
FORMS: dict[str, Network] = {
    "as it is": mlp(),
    "1 head": mlp(num_heads=1),
    "3 heads": mlp(num_heads=3),
    "q, k full width, MLP 3.5": mlp(qk_ratio=1.0, mlp_ratio=3.5),
    "q, k full width": mlp(qk_ratio=1.0),
    "no convolution": mlp(conv="none"),
    "no cap": mlp(gate_cap=None),
    "input bias 0": mlp(input_bias=0.0),
    "input bias -10": mlp(input_bias=-10.0),
    "MLP 3": mlp(mlp_ratio=3.0),
    "SwiGLU": mlp(mlp="swiglu"),
    "SiLU output gate": mlp(output_gate="silu"),
    "both directions, shared": mlp(traversal="bidirectional_shared"),
    "both directions": mlp(traversal="bidirectional"),
    "LayerScale 1e-2": mlp(init_values=1e-2),
    "depth-scaled start": mlp(depth_scaled_init=True),
    "1 register": mlp(**registers(1)),
    "2 registers": mlp(**registers(2)),
    "4 registers": mlp(**registers(4)),
    "8 registers": mlp(**registers(8)),
    "4 registers, read at both ends": mlp(num_registers=4),
}
GROUPS = {"networks": NETWORKS, "forms": FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], metavar="TASK", help=f"any of: {', '.join(TASKS)}")
    parser.add_argument("--data", type=Path, help="folder with the folders cifar10, photos and camvid")
    parser.add_argument("--seconds", type=float, default=60, help="of processor time, for each row")
    parser.add_argument("--rows", choices=list(GROUPS), default="networks")
    parser.add_argument("--only", nargs="+", help="of these rows, those whose names contain one of the words")
    parser.add_argument("--without", nargs="+", default=[], help="leave out rows with one of these words")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file with one figure per line; new figures are appended")
    parser.add_argument("--table", type=Path, help="only print this file as a table")
    args = parser.parse_args()
    if args.table:
        print_table(read_lines(args.table))
        return
    torch.set_num_threads(1)
    for seed in args.seeds:
        for task in args.tasks:
            for record in run(args, task, seed):
                print(record, flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(record) + "\n")


def run(args: argparse.Namespace, task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Train all rows, interleaved, then evaluate them one after the other."""
    known = read_lines(args.json) if args.json and args.json.exists() else []
    done = {(line["task"], line["row"], line["seconds"], line["seed"], line["rate"]) for line in known}
    make_step, score, sizes, learning_rate = TASKS[task]
    rows = {
        name: network
        for name, network in GROUPS[args.rows].items()
        if (task, name, args.seconds, seed, learning_rate * args.rate) not in done
        and (not args.only or any(word in name for word in args.only))
        and not any(word in name for word in args.without)
    }
    if not rows:
        return
    trainings = {}
    for name, network in rows.items():
        torch.manual_seed(seed)
        backbone = network(**sizes)
        trained, step = make_step(args.data, backbone, seed)
        trainings[name] = backbone, Training(trained, step, args.seconds, learning_rate * args.rate)
    while any(not training.finished for _, training in trainings.values()):
        for _, training in trainings.values():
            training.turn()
    for name, (backbone, training) in trainings.items():
        parameters = sum(p.numel() for p in backbone.parameters())
        yield {"task": task, "row": name, "seconds": args.seconds, "seed": seed,
               "rate": learning_rate * args.rate, "parameters": parameters,
               "images": training.images, "loss": training.loss, "torch": torch.__version__,
               **score(args.data, backbone.eval(), training.model.eval())}  # fmt: skip


class Training:
    """One network and its optimizer; trains for one turn per call.

    Args:
        model: everything that is trained.
        step: loads the next batch, and returns a function that computes its loss and its number of images.
        seconds: processor time in total.
        learning_rate: its peak.
    """

    def __init__(self, model: nn.Module, step: Callable, seconds: float, learning_rate: float) -> None:
        self.model, self.step, self.seconds, self.learning_rate = model.train(), step, seconds, learning_rate
        self.optimizer = adamw(parameter_groups(model), (0.9, 0.95))
        self.spent, self.images, self.loss = 0.0, 0, math.nan

    @property
    def finished(self) -> bool:
        return self.spent >= self.seconds

    def turn(self) -> None:
        until = min(self.spent + TURN, self.seconds)
        while self.spent < until:
            compute = self.step()
            began, share = time.process_time(), self.spent / self.seconds
            rate = self.learning_rate * min(1, share / 0.05) * (1 + math.cos(math.pi * share)) / 2
            set_rates(self.optimizer, rate, weight_decay=0.05)
            loss, count = compute()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.loss, self.images = loss.item(), self.images + count
            self.spent += time.process_time() - began


# --- tasks -----------------------------------------------------------------------------------------------------------


@cache
def cifar(data: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32), normalised, and their labels."""
    images, labels = [], []
    for path in sorted((data / "cifar10").glob(f"cifar10-{part}-*.tar")):
        for members in samples(path):
            if len(images) < count:
                images.append(pil_to_tensor(Image.open(io.BytesIO(members["jpg"])).convert("RGB")))
                labels.append(int(members["cls"]))
    return (torch.stack(images) / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), torch.tensor(labels)


def samples(path: Path) -> Iterator[dict[str, bytes]]:
    """For each sample, its members by extension."""
    with tarfile.open(path) as tar:
        found: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    yield from found.values()


class Classifier(nn.Module):
    """The usual readout of frozen features, and a linear classifier on it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.readout = backbone, choose_readout(backbone)
        with torch.no_grad():
            width = adapt(backbone.eval()).read_out(torch.zeros(1, 3, 32, 32), self.readout).shape[1]
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(adapt(self.backbone).read_out(images, self.readout))


def supervised(data: Path, backbone: nn.Module, seed: int) -> tuple[nn.Module, Callable]:
    images, labels = cifar(data, "train", 10_000)
    model, dice = Classifier(backbone), torch.Generator().manual_seed(seed)

    def step() -> Callable:
        chosen = torch.randint(0, len(images), (128,), generator=dice)
        down, right, flip = torch.randint(0, 5, (3,), generator=dice).tolist()
        x = F.pad(images[chosen], (2, 2, 2, 2), mode="reflect")[:, :, down : down + 32, right : right + 32]
        x = x.flip(3) if flip % 2 else x
        return lambda: (F.cross_entropy(model(x), labels[chosen], label_smoothing=0.1), len(x))

    return model, step


@torch.no_grad()
def accuracy(data: Path, backbone: nn.Module, model: nn.Module) -> dict[str, float]:
    images, labels = cifar(data, "test", 5_000)
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250)))
    return {"accuracy": 100 * hits / len(labels)}


def pretraining(
    recipe: str,
    shards: Sequence[str],
    batch: int,
    changes: Sequence[str],
    data: Path,
    backbone: nn.Module,
    seed: int,
) -> tuple[nn.Module, Callable]:
    """The objective of a packaged recipe on any backbone."""
    if not isinstance(backbone, VisionLSTM) and "mae" in recipe:
        changes = (*changes, "objective.decoder=vit", "objective.decoder_heads=4")
    settings = load(recipe, changes)
    size = settings.model
    image = ImageSpec(size.img_size, size.patch_size or 1, 3, settings.data.mean, settings.data.std)
    objective = objective_class(settings.objective.name)(backbone, settings.objective, image)
    index = open_shards([str(data / name) for name in shards], image="jpg")
    batches = train_batches(index, objective.views(), seed=seed, batch_size=batch, stop_step=10**6)
    progress = iter(Progress(step, 10**6, len(index) / batch, seed=seed) for step in range(10**6))

    def step() -> Callable:
        views = next(batches)
        return lambda: (objective(views, next(progress)).loss, batch)

    return objective, step


@torch.no_grad()
def frozen(data: Path, backbone: nn.Module, model: nn.Module) -> dict[str, float]:
    readout = choose_readout(backbone)

    def features(part: str) -> Features:
        images, labels = cifar(data, part, 5_000)
        return Features(torch.cat([adapt(backbone).read_out(x, readout) for x in images.split(100)]), labels)

    return judge(features("train"), features("test"))


@torch.no_grad()
def patches(data: Path, backbone: nn.Module, model: nn.Module) -> dict[str, float]:
    """Scores of frozen features of CamVid's patches; the class of a patch is that of most of its pixels."""

    def features(part: str, of_each: int) -> Features:
        rows, classes, dice = [], [], torch.Generator().manual_seed(0)
        for path in sorted((data / "camvid").glob(f"*{part}*.tar")):
            for members in samples(path):
                image, mask = (Image.open(io.BytesIO(members[kind])) for kind in ("jpg", "png"))
                box = (18, 0, 130, 112)  # the middle of 149 × 112, which has the frames' shape
                x = pil_to_tensor(image.convert("RGB").resize((149, 112), Image.Resampling.BICUBIC).crop(box)) / 255
                y = pil_to_tensor(mask.resize((149, 112), Image.Resampling.NEAREST).crop(box))[0].long()
                counts = F.one_hot(y, 12).view(14, 8, 14, 8, 12).sum((1, 3)).view(-1, 12)
                share, label = counts[:, :11].max(1)
                usable = (share > 32).nonzero()[:, 0]
                chosen = usable[torch.randperm(len(usable), generator=dice)[:of_each]]
                x = (x - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
                tokens = backbone.get_intermediate_layers(x[None], 1, norm=True)[0][0]
                rows.append(tokens[chosen])
                classes.append(label[chosen])
        return Features(torch.cat(rows), torch.cat(classes))

    return judge(features("train", 32), features("val", 64))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def judge(train: Features, test: Features) -> dict[str, float]:
    return {"linear": linear_probe(train, test).accuracy, "knn": knn(train, test, [20])[20]}


CIFAR = ("cifar10/cifar10-train-000000.tar", "cifar10/cifar10-train-000001.tar")
SMALL = {"img_size": 32, "patch_size": 4}
PHOTOS = ("objective.mask_ratio=0.75", "model.img_size=112", "model.patch_size=8",
          "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]")  # fmt: skip
LEJEPA = ("objective.local_crops=2",)
TASKS: dict[str, tuple[Callable, Callable, dict[str, int], float]] = {
    "supervised": (supervised, accuracy, SMALL, 2e-3),
    "mae": (partial(pretraining, "cifar10_mae", CIFAR, 128, ()), frozen, SMALL, 4e-3),
    "lejepa": (partial(pretraining, "cifar10_lejepa", CIFAR, 64, LEJEPA), frozen, SMALL, 1e-3),
    "photos": (
        partial(pretraining, "cifar10_mae", ("photos", "camvid/camvid-train-*.tar"), 64, PHOTOS),
        patches, {"img_size": 112, "patch_size": 8}, 2e-3,
    ),
}  # fmt: skip
"""Name -> training, evaluation, sizes of the backbone, and peak learning rate."""


# --- figures ---------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print means and deviations over seeds in Markdown, and the difference to the first row with the same seeds."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for line in lines:
        group = groups.setdefault((line["task"], line["seconds"], line["rate"]), {})
        group.setdefault(line["row"], []).append(line)
    for (task, seconds, rate), rows in groups.items():
        measures = [key for key in ("accuracy", "linear", "knn") if key in lines_of(rows)[0]]
        print(
            f"\n{task}, {seconds:g} s, learning rate {rate:g}\n\n| row | parameters | images | seeds | "
            + " | ".join(measures)
            + " |"
        )
        print("|---" * (4 + len(measures)) + "|")
        first = {line["seed"]: line for line in next(iter(rows.values()))}
        for name, found in rows.items():
            cells = [
                name,
                f"{found[0]['parameters'] / 1e6:.2f} M",
                f"{statistics.mean(f['images'] for f in found):,.0f}",
            ]
            for key in measures:
                values = [line[key] for line in found]
                gains = [line[key] - first[line["seed"]][key] for line in found if line["seed"] in first]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                gain = f" ({statistics.mean(gains):+.1f})" if gains and name != next(iter(rows)) else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}{gain}")
            cells.insert(3, str(len(found)))
            print("| " + " | ".join(cells) + " |")


def lines_of(rows: dict[str, list[dict]]) -> list[dict]:
    return [line for found in rows.values() for line in found]


if __name__ == "__main__":
    main()
