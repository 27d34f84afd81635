"""A save that is killed at any moment loses no checkpoint, and a damaged file is never loaded."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from selfvil import checkpoint
from selfvil.errors import UserError


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 6, generator=generator)
    return {
        "objective": {"backbone.weight": weight, "backbone.bias": torch.randn(4, generator=generator)},
        "optimizer": {"exp_avg": torch.randn(4, 6, generator=generator, dtype=torch.float64)},
    }


def save(root: Path, step: int, **kwargs) -> Path:
    return checkpoint.save(root, step, tensors_of(step), {"step": step, "samples": 8 * step}, **kwargs)


def assert_is(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.meta) == (step, {"step": step, "samples": 8 * step})
    for name, group in tensors_of(step).items():
        loaded = found.tensors(name)
        assert loaded.keys() == group.keys()
        for key, tensor in group.items():
            assert loaded[key].dtype == tensor.dtype
            assert torch.equal(loaded[key], tensor)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_saved_checkpoint_is_read_and_an_empty_root_has_none(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert checkpoint.newest(root) is None
    folder = save(root, 500)
    assert folder == root / "step-00000500"
    assert_is(checkpoint.load(folder), 500)
    assert_is(checkpoint.load(str(folder), verify=False), 500)
    assert_is(checkpoint.newest(root), 500)
    assert checkpoint.load(folder).names() == ["objective", "optimizer"]
    with pytest.raises(UserError, match=r"no tensors named 'teacher'; it holds: objective, optimizer"):
        checkpoint.load(folder).tensors("teacher")


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    group = {
        "whole": base,
        "tied": base,
        "transposed": base.t(),
        "slice": base[1:3],
        "strided": base[:, ::2],
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "bf16": base.bfloat16(),
        "empty": torch.empty(0, 3),
        "grad": torch.ones(2, requires_grad=True),
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"objective": group, "optimizer": {}}, {})).tensors(
        "objective"
    )
    assert loaded.keys() == group.keys()
    for key, tensor in group.items():
        assert loaded[key].dtype == tensor.dtype
        assert loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key], tensor)


def test_newest_is_by_step_and_not_by_time_or_name(tmp_path):
    for step in (123456789, 99999999, 5):
        save(tmp_path, step, keep=5)
    assert_is(checkpoint.newest(tmp_path), 123456789)


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    for meta in ({"loss": float("nan")}, {"path": Path("x")}):
        with pytest.raises((TypeError, ValueError)):
            checkpoint.save(tmp_path / "root", 1, {}, meta)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("first_saved_too", [False, True], ids=["new-step", "same-step-again"])
def test_a_save_killed_at_any_operation_loses_nothing(tmp_path, monkeypatch, first_saved_too):
    """A child process dies at its k-th file operation, for every k until a save succeeds."""
    operations = [(os, "fsync"), (os, "rename"), (shutil, "rmtree"), (checkpoint, "save_file"), (Path, "write_text")]
    step = 3 if first_saved_too else 4
    for k in range(1000):
        root = tmp_path / f"killed-at-{k}"
        for older in (1, 2, 3):
            save(root, older)
        child = os.fork()
        if child == 0:
            left = k

            def dying(operation):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    return operation(*args, **kwargs)

                return call

            for owner, name in operations:
                monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
            save(root, step)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = checkpoint.newest(root)
        assert found is not None
        assert_is(found, found.step)
        assert found.step in {3, step}
        if status == 0:
            assert names(root) == (
                ["step-00000002", "step-00000003"] if step == 3 else ["step-00000003", "step-00000004"]
            )
            break
        save(root, 5)
        assert len([name for name in names(root) if name.startswith("step-")]) == len(names(root)) == 2
        for folder in root.iterdir():
            checkpoint.load(folder)
    assert k >= 15  # so many moments were tried


def test_an_unfinished_newer_folder_is_ignored_and_then_removed(tmp_path, caplog):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", checkpoint.partial_folder(tmp_path, 9))
    assert_is(checkpoint.newest(tmp_path), 1)
    assert caplog.text == ""
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("file", ["objective.safetensors", "optimizer.safetensors", "meta.json", "manifest.json"])
def test_any_flipped_bit_is_detected(tmp_path, caplog, file):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    size = (folder / file).stat().st_size
    # a changed entry of the manifest shows as a difference of the file it is about
    named = folder if file == "manifest.json" else folder / file
    for position in range(size) if file == "manifest.json" else [0, 7, size // 2, size - 1]:
        flip_bit(folder / file, position, position % 8)
        with pytest.raises(UserError, match=re.escape(str(named))):
            checkpoint.load(folder)
        flip_bit(folder / file, position, position % 8)
    assert_is(checkpoint.load(folder), 2)
    flip_bit(folder / file, size // 2)
    with caplog.at_level(logging.WARNING):
        assert_is(checkpoint.newest(tmp_path), 1)
    assert str(named) in caplog.text


@pytest.mark.parametrize("file", ["objective.safetensors", "meta.json", "manifest.json"])
def test_cut_empty_and_missing_files_are_named(tmp_path, file):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    whole = (folder / file).read_bytes()
    for content in (whole[:-1], b"", whole + b"\0"):
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=file):
            checkpoint.load(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        checkpoint.load(folder)
    assert_is(checkpoint.newest(tmp_path), 1)


def test_error_messages_contain_sizes_and_digests(tmp_path):
    folder = save(tmp_path, 1)
    path = folder / "objective.safetensors"
    flip_bit(path, 100)
    with pytest.raises(UserError, match=r"its SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        checkpoint.load(folder)
    size = path.stat().st_size
    path.write_bytes(b"short")
    with pytest.raises(UserError, match=f"it has 5 bytes, expected {size}"):
        checkpoint.load(folder)


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        checkpoint.load(tmp_path)
    folder = save(tmp_path, 7)
    folder.rename(tmp_path / "step-00000008")
    with pytest.raises(UserError, match="belongs to step 7"):
        checkpoint.load(tmp_path / "step-00000008")
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "step-00000008").rename(tmp_path / "best")
    assert_is(checkpoint.load(tmp_path / "best"), 7)  # a copy under a name of the user's own


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "null",
        '{"format": 2, "step": 1, "files": {}}',
        "[" * 100000,
        json.dumps({"files": {"../outside": {"bytes": 1, "sha256": ""}}, "format": 1, "step": 1}, indent=1) + "\n",
        json.dumps({"files": {}, "format": 1, "step": 1}, indent=1) + "\n",
        json.dumps({"files": {"meta.json": {"bytes": "a", "sha256": 3}}, "format": 1, "step": 1}, indent=1) + "\n",
        json.dumps({"files": {"meta.json": 3}, "format": 1, "step": 1}, indent=1) + "\n",
    ],
)
def test_hostile_manifests(tmp_path, manifest):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        checkpoint.load(folder)


def test_pruning_keeps_two_undamaged_ones(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=0)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    flip_bit(tmp_path / "step-00000003" / "meta.json", 3)
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    assert "step-00000003" in caplog.text
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    for step in (6, 7, 8):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000006", "step-00000007", "step-00000008"]


def test_the_checkpoint_just_saved_is_never_pruned(tmp_path):
    for step in (7, 8, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000008"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    flip_bit(folder / "objective.safetensors", 50)
    assert_is(checkpoint.newest(tmp_path), 1)
    save(tmp_path, 2)
    assert_is(checkpoint.newest(tmp_path), 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_replaced_checkpoint_is_used_until_the_new_one_is_renamed(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    folder.rename(tmp_path / "step-00000002.replaced")
    assert_is(checkpoint.newest(tmp_path), 2)
    shutil.copytree(tmp_path / "step-00000002.replaced", folder)
    flip_bit(folder / "meta.json", 0)
    assert_is(checkpoint.newest(tmp_path), 2)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_full_disk_keeps_older_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_on_storage_that_damages_files_nothing_is_pruned(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    put_in_place = checkpoint._put_in_place

    def damaging(partial: Path, final: Path) -> None:
        put_in_place(partial, final)
        flip_bit(final / "optimizer.safetensors", 90)

    monkeypatch.setattr(checkpoint, "_put_in_place", damaging)
    with pytest.raises(UserError, match="damages files"):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert_is(checkpoint.newest(tmp_path), 2)


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "root").write_text("")
    with pytest.raises(UserError, match="Could not save"):
        save(tmp_path / "root", 1)
