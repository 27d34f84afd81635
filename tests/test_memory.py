"""What a step needs is measured on two images and holds for many; what cannot fit is refused before training."""

from contextlib import nullcontext

import pytest
import torch

import runs
from selfvil import memory
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.pretrain import pretrain

CPU = torch.device("cpu")


@pytest.mark.parametrize("objective", ["mae", "dino", "ibot", "dinov2"])
def test_two_images_foretell_nine(digit_shards, tmp_path, objective):
    # Images whose masks differ need different amounts: here all crops hide as many patches.
    even = ["objective.mask_share=1", "objective.mask_ratios=[0.5, 0.5]"] if objective in ("ibot", "dinov2") else []
    subject = build_objective(runs.small(objective, digit_shards, tmp_path / "run", *even))
    before = {key: value.clone() for key, value in subject.state_dict().items()}
    draws = torch.default_generator.get_state()
    one, two, nine = (memory.saved_bytes(subject, count, 1, CPU) for count in (1, 2, 9))
    assert nine == pytest.approx(one + 8 * (two - one), rel=0.01)
    assert nine > 9 * 16 * 32 * 4  # 16 tokens of 32 channels, at the very least
    assert torch.equal(draws, torch.default_generator.get_state())
    assert subject.training
    assert all(torch.equal(value, before[key]) for key, value in subject.state_dict().items())


def test_more_crops_take_more(digit_shards, tmp_path):
    few, many = (
        memory.saved_bytes(
            build_objective(runs.small("dino", digit_shards, tmp_path / "run", f"objective.local_crops={crops}")),
            2, 1, CPU,
        )
        for crops in (2, 20)
    )  # fmt: skip
    assert many > 2 * few


def test_what_cannot_fit_is_refused(digit_shards, tmp_path, monkeypatch):
    subject = build_objective(runs.small("dino", digit_shards, tmp_path / "run"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**27)
    memory.need_memory(subject, 4, 1, CPU, nullcontext())
    with pytest.raises(UserError, match=r"1,000 images with 4 crops of each needs at least .* 0\.1 GiB are free"):
        memory.need_memory(subject, 1000, 1, CPU, nullcontext())


@pytest.mark.parametrize("objective", ["dino", "ibot", "dinov2"])
def test_more_prototypes_than_memory_are_refused(digit_shards, tmp_path, monkeypatch, objective):
    """Before they are made, where they are too many for that; else before the first step."""
    with pytest.raises(
        UserError, match=r"objective\.out_dim = 100000000000 prototypes of 16 numbers take 11,920\.9 GiB"
    ):
        pretrain(runs.small(objective, digit_shards, tmp_path / "run", "objective.out_dim=100000000000"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**22)
    with pytest.raises(UserError, match=r"gradients and moments of .* take a smaller model, or fewer prototypes"):
        pretrain(runs.small(objective, digit_shards, tmp_path / "run", "objective.out_dim=100000"))
    assert not (tmp_path / "run").exists()


def test_state_divided_among_processes_leaves_room(digit_shards, tmp_path, monkeypatch):
    subject = build_objective(runs.small("dino", digit_shards, tmp_path / "run"))
    trained = sum(p.numel() * p.element_size() for p in subject.parameters() if p.requires_grad)
    activations = memory.saved_bytes(subject, 1, 1, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: activations + trained)
    with pytest.raises(UserError, match="GiB are free"):
        memory.need_memory(subject, 1, 1, CPU, nullcontext())
    memory.need_memory(subject, 1, 1, CPU, nullcontext(), parts=4)


def test_more_crops_than_memory_allows_stop_a_run_before_it_begins(digit_shards, tmp_path, monkeypatch):
    many = ["objective.local_crops=64"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**22)
    with pytest.raises(UserError, match=r"66 crops of each .* lower optim\.batch_size or the number of crops"):
        pretrain(runs.small("dino", digit_shards, tmp_path / "run", *many))
    assert not (tmp_path / "run").exists()


def test_processes_share_the_machine(monkeypatch):
    alone = memory.free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == pytest.approx(alone / 4, rel=0.2)
