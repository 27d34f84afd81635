"""Accuracy of a network's own classifier: ranks against plain loops, labels, runs, and what is refused."""

import json

import pytest
import torch
from torch import Tensor, nn

import runs
from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.evaluate import accuracy, settings
from selfvil.evaluate.score import score
from selfvil.evaluate.task import Task
from selfvil.pretrain import pretrain
from selfvil.weights import Network, Normalisation

FAST = {"workers": 0, "device": "cpu"}
OWN = {"accuracy": settings("accuracy")}


class Pixels(nn.Module):
    """Scores that are pixels of the image, rounded, so that many are equal."""

    def __init__(self, num_classes: int, broken: bool = False) -> None:
        super().__init__()
        self.num_classes, self.broken = num_classes, broken

    def forward(self, images: Tensor) -> Tensor:
        scores = (4 * images.flatten(1)[:, 20 : 20 + self.num_classes]).round()
        return scores / 0 if self.broken else scores


def a_task(parts, outputs: int = 10, labels: tuple[int, ...] = (), broken: bool = False) -> Task:
    shown = Normalisation((0.0,), (1.0,), (8, 8))
    train, test = (open_shards(part) for part in parts)
    network = Network(Pixels(outputs, broken), shown, 0)
    return Task("pretrained", network, shown, train, test, lambda: network, workers=0, source="x", labels=labels)


@pytest.fixture
def parts(digit_shards):
    return str(digit_shards / "digits-000000.tar"), str(digit_shards / "digits-000001.tar")


@pytest.mark.parametrize("labels", [tuple(range(10)), (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)])
def test_ranks_are_those_of_a_sorted_list(parts, labels):
    """By plain Python; of equal scores the first counts, as argmax has it."""
    task = a_task(parts, labels=labels)
    ranks = accuracy.rank_of_truth(task, task.network, labels)
    from selfvil.data.read import decode_image

    pixels = [torch.tensor(list(decode_image(task.test.read(i), 1).tobytes())) / 255 for i in range(len(task.test))]
    scores = [(4 * image[20:30]).round().tolist() for image in pixels]
    for rank, row, label in zip(ranks.tolist(), scores, task.test.labels.tolist(), strict=True):
        order = sorted(range(10), key=lambda output, row=row: (-row[output], output))
        assert order.index(labels.index(label)) == rank
    top1, top5 = accuracy.evaluate(task, OWN["accuracy"])
    assert top1.value == pytest.approx(100 * sum(rank == 0 for rank in ranks.tolist()) / 80)
    assert top5.value == pytest.approx(100 * sum(rank < 5 for rank in ranks.tolist()) / 80)
    assert (top1.measure, top5.measure) == ("top-1", "top-5")


def test_what_has_no_accuracy_is_refused(parts):
    with pytest.raises(UserError, match="x has no classifier: fine-tune it"):
        accuracy.check(a_task(parts, outputs=0), OWN["accuracy"])
    with pytest.raises(
        UserError, match=r"the test images have the label 8, and the classifier knows 8 classes without"
    ):
        accuracy.check(a_task(parts, outputs=8, labels=tuple(range(8))), OWN["accuracy"])
    with pytest.raises(UserError, match="gives NaN or infinity"):
        list(accuracy.evaluate(a_task(parts, labels=tuple(range(10)), broken=True), OWN["accuracy"]))


def test_accuracy_during_a_run_is_that_of_the_command(parts, tmp_path, digit_shards):
    entry = [f"eval.accuracy.train={parts[0]}", f"eval.accuracy.test={parts[1]}", "eval.accuracy.every=6"]
    with pytest.raises(UserError, match=r"eval.accuracy: the objective of this run trains no classifier"):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run", *entry))
    pretrain(runs.small("supervised", digit_shards, tmp_path / "run", *entry, "objective.ema_decay=0.5"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["accuracy"] for line in lines if line["kind"] == "eval"}
    own = score(tmp_path / "run", *parts, OWN, **FAST)
    assert scores.keys() == {6, 12}
    assert scores[12] == pytest.approx(own[0].value)
