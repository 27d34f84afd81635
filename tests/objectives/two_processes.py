"""What one of several gloo processes makes of its part of some tensors, for test_dinov2.py; started by torchrun.

    torchrun --nproc_per_node 2 tests/objectives/two_processes.py TENSORS OUT

TENSORS holds `KEY-RANK` for each process; OUT-RANK.safetensors what each made of them.
"""

import sys

import torch
from lightly.loss import KoLeoLoss
from safetensors.torch import load_file, save_file

from selfvil.objectives.dino import Center
from selfvil.objectives.processes import join
from selfvil.objectives.sinkhorn import sinkhorn_knopp


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
    loss = KoLeoLoss()(join(vectors))
    loss.backward()
    gradient = vectors.grad / torch.distributed.get_world_size()  # as DDP takes the mean over processes
    save_file(
        found | {"center": center.value, "loss": loss.detach(), "gradient": gradient},
        f"{sys.argv[2]}-{rank}.safetensors",
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
