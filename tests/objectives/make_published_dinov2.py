"""Makes published_dinov2.safetensors: losses of DINOv2 as published, and of DINOv3's Gram anchoring, on random tensors.

    python tests/objectives/make_published_dinov2.py DINOV2 DINOV3 [OUT]

The arguments are checkouts of facebookresearch/dinov2 and facebookresearch/dinov3. The losses of images are combined
with the factors of the published training code: each pair of a teacher's crop and another crop has the same weight.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

IMAGES, SMALL, PATCHES, PROTOTYPES, TEMPERATURE = 3, 2, 6, 10, 0.05


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    warnings.simplefilter("ignore")  # about an optional package and a deprecated autocast
    from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss

    store = torch.distributed.HashStore()  # the published loss needs a process group
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(0)
    values: dict[str, torch.Tensor] = {}

    # Images: two large crops and some small ones.
    student = (torch.rand(2 + SMALL, IMAGES, PROTOTYPES) * 2 - 1).requires_grad_()
    teacher = torch.rand(2, IMAGES, PROTOTYPES) * 2 - 1
    of_images = DINOLoss(PROTOTYPES)
    of_images.center = torch.randn(1, PROTOTYPES) / 10
    values |= {"images/student": student.detach().clone(), "images/teacher": teacher, "images/center": of_images.center}
    swapped = teacher.flip(0).flatten(0, 1)
    terms = 2 + 2 * SMALL
    for name, probabilities in (
        ("softmax", of_images.softmax_center_teacher(swapped, TEMPERATURE)),
        ("sinkhorn", of_images.sinkhorn_knopp_teacher(swapped, TEMPERATURE)),
    ):
        small = of_images(list(student[2:]), list(probabilities.view(2, IMAGES, -1))) / terms
        large = of_images([student[:2].flatten(0, 1)], [probabilities]) * 2 / terms
        values[f"images/targets/{name}"] = probabilities.view(2, IMAGES, -1).flip(0)
        values[f"images/loss/{name}"] = (small + large).detach()
        (values[f"images/gradient/{name}"],) = torch.autograd.grad(small + large, student)

    # Patches: one of the masks is empty.
    masked = torch.rand(2 * IMAGES, PATCHES) < 0.5
    masked[1] = False
    count = int(masked.sum())
    student = (torch.rand(count, PROTOTYPES) * 2 - 1).requires_grad_()
    teacher = torch.rand(count, PROTOTYPES) * 2 - 1
    of_patches = iBOTPatchLoss(PROTOTYPES)
    values |= {"patches/student": student.detach().clone(), "patches/teacher": teacher, "patches/masked": masked}
    balanced = of_patches.sinkhorn_knopp_teacher(teacher, TEMPERATURE, torch.tensor([count]))
    of_patches.update_center(teacher.unsqueeze(0))
    centred = of_patches.softmax_center_teacher(teacher.unsqueeze(0), TEMPERATURE).squeeze(0)
    values["patches/center"] = of_patches.center.flatten()
    for name, probabilities in (("softmax", centred), ("sinkhorn", balanced)):
        loss = of_patches.forward_masked(student, probabilities, masked, count)
        values |= {f"patches/targets/{name}": probabilities, f"patches/loss/{name}": loss.detach()}
        (values[f"patches/gradient/{name}"],) = torch.autograd.grad(loss, student)

    # KoLeo.
    vectors = torch.randn(7, 5, requires_grad=True)
    loss = KoLeoLoss()(vectors)
    values |= {"koleo/vectors": vectors.detach().clone(), "koleo/loss": loss.detach()}
    (values["koleo/gradient"],) = torch.autograd.grad(loss, vectors)

    # Gram anchoring for each image separately, with negative similarities, as in the paper's equation.
    spec = importlib.util.spec_from_file_location("gram_loss", Path(sys.argv[2]) / "dinov3" / "loss" / "gram_loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patches, anchor = torch.randn(3, 6, 5, requires_grad=True), torch.randn(3, 6, 4)
    loss = module.GramLoss(apply_norm=True, img_level=True, remove_neg=False)(patches, anchor, img_level=True)
    values |= {"gram/patches": patches.detach().clone(), "gram/anchor": anchor, "gram/loss": loss.detach()}
    (values["gram/gradient"],) = torch.autograd.grad(loss, patches)

    out = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).with_name("published_dinov2.safetensors")
    save_file({name: value.contiguous() for name, value in values.items()}, out)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
