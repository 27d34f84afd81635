"""One of two gloo processes: collectives on its part of some tensors, for test_dinov2.py; started by torchrun.

    torchrun --nproc_per_node 2 tests/objectives/two_processes.py TENSORS OUT

TENSORS holds `KEY-RANK` for each process; each writes its results to OUT-RANK.safetensors.
"""

import sys

import torch
from lightly.loss import KoLeoLoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from selfvil.objectives.distributed import gather_rows
from selfvil.objectives.sinkhorn import sinkhorn_knopp
from selfvil.objectives.teacher import Center, Teacher


def follow_sharded(weight: Tensor) -> dict[str, Tensor]:
    """A teacher that starts at 0 and follows a student with that weight, both sharded by FSDP2: its full parameters."""
    student = nn.ModuleDict({"backbone": nn.Linear(weight.shape[1], weight.shape[0])})
    nn.init.zeros_(student["backbone"].weight)
    teacher = Teacher(backbone=student["backbone"])
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with torch.no_grad():
        student["backbone"].weight.copy_(weight)
    for module in (student["backbone"], teacher.backbone):
        fully_shard(module, mesh=mesh)
    names = [name for name, _ in teacher.named_parameters()]
    assert names == ["backbone.weight", "backbone.bias"]
    assert all(isinstance(teacher.get_parameter(name), DTensor) for name in names)
    teacher.follow(student, 0.75)
    return {"teacher": teacher.get_parameter("backbone.weight").full_tensor()}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    tensors = {k.removesuffix(f"-{rank}"): v for k, v in load_file(sys.argv[1]).items() if k.endswith(f"-{rank}")}
    found = {name: sinkhorn_knopp(tensors[name], 0.05) for name in ("uneven", "empty")}

    center = Center(tensors["uneven"].shape[1], 0.9)
    for name in ("uneven", "empty"):
        center.add(tensors[name])
    center.update()

    vectors = tensors["vectors"].requires_grad_()
    loss = KoLeoLoss()(gather_rows(vectors))
    loss.backward()
    gradient = vectors.grad / torch.distributed.get_world_size()  # as DDP takes the mean over processes
    save_file(
        found
        | follow_sharded(tensors["student"])
        | {"center": center.value, "loss": loss.detach(), "gradient": gradient},
        f"{sys.argv[2]}-{rank}.safetensors",
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
