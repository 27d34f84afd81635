"""Memory and multiply-adds of a step: measured on few images, predicted for many, refused if they do not fit."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import runs
from selfvil import build, footprint, machine, memory, ops
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.models.layers import GatedScan
from selfvil.models.layout import TokenLayout
from selfvil.objectives.base import Progress
from selfvil.ops.cpu import fused as cpu_fused
from selfvil.pretrain import pretrain

CPU = torch.device("cpu")


@pytest.mark.parametrize("objective", ["mae", "dino", "ibot", "dinov2"])
def test_saved_bytes_are_linear_in_the_images(digit_shards, tmp_path, objective):
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


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_measuring_releases_all_that_it_allocates(digit_shards, tmp_path, objective):
    subject = build_objective(runs.small(objective, digit_shards, tmp_path / "run"))
    memory.saved_bytes(subject, 2, 1, CPU)  # the first pass also makes constants, which stay
    levels, _ = footprint.allocated(lambda: memory.saved_bytes(subject, 2, 1, CPU), CPU)
    assert max(levels) > 100_000 > 100 * levels[-1]


def test_more_crops_take_more_memory(digit_shards, tmp_path):
    few, many = (
        memory.saved_bytes(
            build_objective(runs.small("dino", digit_shards, tmp_path / "run", f"objective.local_crops={crops}")),
            2, 1, CPU,
        )
        for crops in (2, 20)
    )  # fmt: skip
    assert many > 2 * few


def test_a_step_that_does_not_fit_in_memory_is_refused(digit_shards, tmp_path, monkeypatch):
    subject = build_objective(runs.small("dino", digit_shards, tmp_path / "run"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**27)
    memory.require_memory(subject, 4, 1, CPU, nullcontext())
    with pytest.raises(UserError, match=r"1,000 images with 4 crops of each needs at least .* 0\.1 GiB are free"):
        memory.require_memory(subject, 1000, 1, CPU, nullcontext())


def test_two_images_that_do_not_fit_are_refused(digit_shards, tmp_path, monkeypatch):
    """As of a very large size; a run of one image at a time needs only one."""
    subject = build_objective(runs.small("mae", digit_shards, tmp_path / "run"))
    taken = memory.saved_bytes

    def measured(objective, count, channels, device):
        if count > 1:
            torch.empty(2**29, dtype=torch.uint8)
        return taken(objective, count, channels, device)

    monkeypatch.setattr(machine, "free_bytes", lambda device: 2**28)
    monkeypatch.setattr(memory, "saved_bytes", measured)
    with pytest.raises(UserError, match=r"even 2 image\(s\) with 1 crops of each need more .*: lower model\.img_size"):
        memory.require_memory(subject, 2, 1, CPU, nullcontext())
    memory.require_memory(subject, 1, 1, CPU, nullcontext())


@pytest.mark.parametrize("objective", runs.PACKAGED)
def test_weights_are_counted_without_creating_them(digit_shards, tmp_path, objective):
    recipe, _ = build.open_training(runs.small(objective, digit_shards, tmp_path / "run"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    counted = build._weight_sizes(recipe)
    assert torch.equal(torch.get_rng_state(), before)
    found = build_objective(recipe)
    if objective == "distill":  # its teacher is in a file
        found = found.backbone
    assert counted == {name: parameter.nbytes for name, parameter in found.named_parameters()}


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("mae", ["model.embed_dim=200000"], r"mae on \S+ has .* GiB of weights \(backbone\.blocks\S+ alone"),
        ("mae", ["objective.decoder_dim=200000"], r"\(decoder\S+ alone"),
        ("dino", ["objective.out_dim=100000000000"], r"\(head\.last_layer alone 5,960\.5 GiB\), which are held 2"),
        ("lejepa", ["objective.hidden_dim=200000"], r"\(head\.mlp\.3\.weight alone 149\.0 GiB\)"),
        ("distill", ["model.embed_dim=200000"], r"distill on \S+ has .* GiB of weights \(blocks\S+ alone"),
    ],
)
def test_more_weights_than_memory_are_refused_before_they_are_created(
    digit_shards, tmp_path, monkeypatch, objective, changes, message
):
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 2**30)
    with pytest.raises(UserError, match=message):
        pretrain(runs.small(objective, digit_shards, tmp_path / "run", *changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("processes", "copies"), [(1, 2), (2, 2), (8, 8)])
def test_each_process_creates_the_weights(digit_shards, tmp_path, monkeypatch, processes, copies):
    recipe = runs.small("dino", digit_shards, tmp_path / "run")
    needed = copies * sum(build._weight_sizes(recipe).values())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(machine, "free_host_bytes", lambda: needed)
    build_objective(recipe)
    monkeypatch.setattr(machine, "free_host_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=f"held {copies} times"):
        build_objective(recipe)


@pytest.mark.parametrize("objective", ["dino", "ibot", "dinov2"])
def test_more_prototypes_than_a_step_can_hold_are_refused(digit_shards, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**22)
    with pytest.raises(UserError, match=r"gradients and moments of .* take a smaller model, or fewer prototypes"):
        pretrain(runs.small(objective, digit_shards, tmp_path / "run", "objective.out_dim=100000"))
    assert not (tmp_path / "run").exists()


def test_state_divided_among_processes_takes_less_memory(digit_shards, tmp_path, monkeypatch):
    subject = build_objective(runs.small("dino", digit_shards, tmp_path / "run"))
    trained = sum(p.numel() * p.element_size() for p in subject.parameters() if p.requires_grad)
    activations = memory.saved_bytes(subject, 1, 1, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: activations + trained)
    with pytest.raises(UserError, match="GiB are free"):
        memory.require_memory(subject, 1, 1, CPU, nullcontext())
    memory.require_memory(subject, 1, 1, CPU, nullcontext(), parts=4)


@pytest.mark.parametrize(("device", "processes"), [("cpu", 1), ("cpu", 3), ("meta", 1)])
def test_the_copy_for_a_checkpoint_must_fit(digit_shards, tmp_path, monkeypatch, device, processes):
    """On a GPU (here: meta), only the copy is in the memory of the machine."""
    subject = build_objective(runs.small("dino", digit_shards, tmp_path / "run"))
    copy, trained = footprint.state_bytes(subject), footprint.trained_bytes(subject)
    needed = copy + (2 * trained * processes if device == "cpu" else 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(memory, "free_host_bytes", lambda: needed)
    memory._require_copy(subject, torch.device(device), 1)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=r"a checkpoint is copied to memory before it is written, which needs 0\.0 GiB"):
        memory._require_copy(subject, torch.device(device), 1)


def test_the_copy_is_checked_before_the_first_step(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    with pytest.raises(UserError, match="a checkpoint is copied to memory"):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_has_the_bytes_that_were_predicted(digit_shards, tmp_path):
    recipe = runs.small("dino", digit_shards, tmp_path / "run", "budget.steps=1", "budget.epochs=null")
    pretrain(recipe)
    files = (tmp_path / "run" / "checkpoints").glob("*/*.safetensors")
    tensors = [x for file in files for x in load_file(file).values()]
    assert sum(x.nbytes for x in tensors) == footprint.state_bytes(build_objective(recipe))


def test_a_run_with_more_crops_than_memory_is_refused_before_its_first_step(digit_shards, tmp_path, monkeypatch):
    many = ["objective.local_crops=64"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**22)
    with pytest.raises(UserError, match=r"66 crops of each .* lower optim\.batch_size or the number of crops"):
        pretrain(runs.small("dino", digit_shards, tmp_path / "run", *many))
    assert not (tmp_path / "run").exists()


def test_processes_share_the_machine(monkeypatch):
    alone = memory.free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == pytest.approx(alone / 4, rel=0.2)


# --- the predicted peak ----------------------------------------------------------------------------------------------


def peak(objective, count):
    """Peak memory of a forward and backward pass over `count` images."""
    batch = memory.blank_batch(objective.views(), count, 1)
    progress = Progress(0, 1, 1.0, 0)
    levels, _ = footprint.allocated(lambda: objective(batch, progress).loss.backward(), CPU)
    return max(levels)


@pytest.mark.parametrize("objective", ["mae", "dino", "dinov2"])
def test_the_peak_of_many_images_is_predicted_from_few(digit_shards, tmp_path, objective):
    even = ["objective.mask_share=1", "objective.mask_ratios=[0.5, 0.5]"] if objective == "dinov2" else []
    subject = build_objective(runs.small(objective, digit_shards, tmp_path / "run", *even))
    before = {key: value.clone() for key, value in subject.state_dict().items()}
    draws = torch.default_generator.get_state()
    for count in (1, 3, 40):
        found = memory.step_memory(subject, count, 1, CPU, nullcontext())
        assert all(part >= 0 for part in vars(found).values())
        passed = found.activations + found.gradients + found.temporary
        with torch.random.fork_rng():
            measured = peak(subject, count)
        subject.zero_grad()
        subject.discard_step()
        assert passed == pytest.approx(measured, rel=0.02)
    trained = sum(p.nbytes for p in subject.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in subject.parameters() if not p.requires_grad)
    assert (found.moments, found.teacher, found.buckets) == (2 * trained, frozen, 0)
    assert found.total == sum(vars(found).values())
    assert torch.equal(draws, torch.default_generator.get_state())
    assert subject.training
    assert all(parameter.grad is None for parameter in subject.parameters())
    assert all(torch.equal(value, before[key]) for key, value in subject.state_dict().items())


def test_gradients_of_earlier_micro_batches_and_buckets_are_counted(digit_shards, tmp_path):
    subject = build_objective(runs.small("mae", digit_shards, tmp_path / "run"))
    trained = sum(p.nbytes for p in subject.parameters() if p.requires_grad)
    alone = memory.step_memory(subject, 8, 1, CPU, nullcontext())
    several = memory.step_memory(subject, 8, 1, CPU, nullcontext(), processes=2, accumulate=2)
    assert (several.gradients, several.buckets) == (trained, trained)
    assert alone.gradients < trained
    assert several.activations == pytest.approx(alone.activations, rel=0.01)


def test_the_step_of_the_peak_may_depend_on_the_number_of_images():
    """For few images, it is where a large constant is in memory; for many, where the growing part is: 10 x 30 + 5."""
    few, more = (memory._Pass([0, 100, 5 + 30 * count, 5], [0, 0, 0, 0], 3) for count in (1, 2))
    held, _, end = memory._extrapolate([few, more], (1, 2), 10)
    assert (max(few.held), max(more.held), max(held), end) == (100, 100, 305, 5)


def test_for_passes_of_unequal_length_the_peaks_are_extrapolated():
    few, more = memory._Pass([0, 10, 12, 0], [0] * 4, 1), memory._Pass([0, 10, 20, 24, 0], [0] * 5, 2)
    held, _, end = memory._extrapolate([few, more], (1, 2), 10)
    assert (max(held), end) == (120, 100)


def test_memory_of_the_chunkwise_operator_is_extrapolated(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFVIL_MLSTM", "chunkwise")
    monkeypatch.setattr("selfvil.ops.chunkwise.TOKENS_AT_ONCE", 64)
    subject = build_objective(runs.small("mae", digit_shards, tmp_path / "run"))
    found = memory.step_memory(subject, 24, 1, CPU, nullcontext())
    assert found.activations + found.gradients + found.temporary == pytest.approx(peak(subject, 24), rel=0.1)


def test_allocations_inside_an_operator_count():
    q = torch.randn(1, 2, 200, 16)
    gates = torch.randn(1, 2, 200)
    with torch.no_grad():
        levels, marks = footprint.allocated(lambda: ops.mlstm(q, q, q, gates, gates, backend="reference"), CPU)
    assert max(levels) > 2 * 200 * 200 * 4 > 10 * levels[-1] >= 0
    assert marks == []


def test_marks_have_the_memory_of_their_position():
    def work():
        kept = torch.empty(1000)
        footprint.mark("one")
        del kept
        footprint.mark("none")

    levels, marks = footprint.allocated(work, CPU)
    assert [(name, levels[index]) for name, index in marks] == [("one", 4000), ("none", 0)]


# --- multiply-adds ---------------------------------------------------------------------------------------------------


def test_multiply_adds_of_forward_and_backward_are_counted():
    linear, x = nn.Linear(6, 5), torch.randn(7, 6, requires_grad=True)
    assert footprint.multiply_adds(lambda: linear(x)) == 7 * 6 * 5
    assert footprint.multiply_adds(lambda: linear(x).sum().backward()) == 3 * 7 * 6 * 5
    depthwise, image = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 4, 4, requires_grad=True)
    assert footprint.multiply_adds(lambda: depthwise(image)) == 16 * 8 * 9
    assert footprint.multiply_adds(lambda: depthwise(image).sum().backward()) == 3 * 16 * 8 * 9


def test_wide_linear_layers_of_float32_are_counted():
    x, weight = torch.randn(3, 1024), torch.randn(1024, 1024)
    assert footprint.multiply_adds(lambda: ops.linear(x, weight, None)) == 3 * 1024 * 1024


def test_native_operators_around_the_mlstm_are_counted():
    scan, layout = GatedScan(64), TokenLayout((2, 5))
    x = torch.randn(3, 10, 64, requires_grad=True)
    if not cpu_fused.applies(x, 4):
        pytest.skip("the CPU kernels cannot be built here")
    conv = lambda: cpu_fused.conv_silu(x, scan.conv.weight, scan.conv.bias, layout.grid, False)  # noqa: E731
    assert footprint.multiply_adds(conv) == 30 * 64 * 9
    assert footprint.multiply_adds(lambda: conv().sum().backward()) == 3 * 30 * 64 * 9
    maps, gates = (scan.q_proj, scan.k_proj, scan.v_proj), [t.detach() for t in scan.gate_weights()]

    def project():
        return cpu_fused.project(x, x, [p.weight for p in maps], [p.bias for p in maps], *gates)

    of_token = 64 * (3 * 4 + 2 * 8)
    assert footprint.multiply_adds(project) == 30 * of_token
    assert footprint.multiply_adds(lambda: sum(y.sum() for y in project()).backward()) == 3 * 30 * of_token


@pytest.mark.parametrize("backend", ["parallel", "chunkwise", "native"])
@pytest.mark.parametrize("tokens", [5, 128, 300])
def test_the_mlstm_operator_is_counted(backend, tokens):
    q, v = (torch.randn(2, 3, tokens, width, requires_grad=True) for width in (8, 16))
    gates = torch.randn(2, 3, tokens)

    def forward():
        return ops.mlstm(q, q, v, gates, gates, backend=backend)

    found, both = footprint.multiply_adds(forward), footprint.multiply_adds(lambda: forward().sum().backward())
    if backend == "parallel" or (backend == "native" and tokens == 5):
        pairs = 6 * tokens * (tokens + 1) // 2
        assert (found, both - found) == (pairs * (8 + 16), pairs * (3 * 8 + 2 * 16))
    elif backend == "native":
        pairs = 6 * tokens * (64 + 1) // 2
        assert found == pairs * (8 + 16) + 6 * tokens * 2 * 8 * 16
        assert both - found == pairs * (3 * 8 + 2 * 16) + 6 * tokens * 5 * 8 * 16
    else:
        size = {5: 5, 128: 64, 300: 60}[tokens]
        assert found == 6 * tokens * (size * (8 + 16) + 2 * 8 * 16)
        assert both - found == 6 * tokens * (size * (3 * 8 + 2 * 16) + 6 * 8 * 16)


def test_multiply_adds_of_attention_are_counted():
    """Torch counts none for its own attention on CPUs, so that a transformer would look cheaper than it is."""
    q, k, v = (torch.randn(2, 3, count, 8, requires_grad=True) for count in (5, 7, 7))

    def attention() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    pairs = 2 * 3 * 5 * 7
    assert footprint.multiply_adds(attention) == pairs * 2 * 8
    assert footprint.multiply_adds(lambda: attention().sum().backward()) == pairs * (2 + 5) * 8
