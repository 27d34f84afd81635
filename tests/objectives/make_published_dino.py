"""Makes published_dino.safetensors: a tiny published DINO, trained for four steps by the parts of the published code.

    python tests/objectives/make_published_dino.py CHECKOUT [OUT]

CHECKOUT is a checkout of facebookresearch/dino. All crops have one size, because the published ViT and timm's
interpolate positions differently; the optimizer is the published option `sgd`, because AdamW amplifies the rounding
errors of gradients that are zero.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

STEPS_PER_EPOCH, EPOCHS, CROPS, IMAGES = 2, 2, 4, 3


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import main_dino
    import utils
    from vision_transformer import DINOHead, VisionTransformer

    store = torch.distributed.HashStore()  # the published loss needs a process group
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(0)
    values: dict[str, torch.Tensor] = {}

    def network() -> torch.nn.Module:
        backbone = VisionTransformer(
            img_size=[8], patch_size=4, embed_dim=8, depth=1, num_heads=2, qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        return utils.MultiCropWrapper(backbone, DINOHead(8, 12, hidden_dim=16, bottleneck_dim=4))

    student, teacher = network(), network()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "weight_g" not in name:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    teacher.load_state_dict(student.state_dict())
    values |= {f"start/{name}": parameter.detach().clone() for name, parameter in student.named_parameters()}

    loss_of = main_dino.DINOLoss(12, CROPS, 0.02, 0.06, EPOCHS, EPOCHS)
    optimizer = torch.optim.SGD(utils.get_params_groups(student), lr=0.0, momentum=0.9)
    rates = utils.cosine_scheduler(0.1, 0.01, EPOCHS, STEPS_PER_EPOCH)
    momenta = utils.cosine_scheduler(0.9, 1.0, EPOCHS, STEPS_PER_EPOCH)
    images = torch.randn(EPOCHS * STEPS_PER_EPOCH, CROPS, IMAGES, 3, 8, 8)
    losses, centers = [], []
    for step, views in enumerate(images):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        targets = teacher(list(views[:2]))
        loss = loss_of(student(list(views)), targets, step // STEPS_PER_EPOCH)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            with_gradient = ((name, p.grad) for name, p in student.named_parameters() if p.grad is not None)
            values |= {f"gradient/{name}": gradient.clone() for name, gradient in with_gradient}
        utils.clip_gradients(student, 0.3)
        optimizer.step()
        with torch.no_grad():
            for followed, follower in zip(student.parameters(), teacher.parameters()):
                follower.copy_(momenta[step] * follower + (1 - momenta[step]) * followed)
        losses.append(loss.detach())
        centers.append(loss_of.center[0].clone())
    values |= {"images": images, "losses": torch.stack(losses), "centers": torch.stack(centers)}
    values |= {f"student/{name}": parameter.detach().clone() for name, parameter in student.named_parameters()}
    values |= {f"teacher/{name}": parameter.detach().clone() for name, parameter in teacher.named_parameters()}

    head = DINOHead(6, 10, norm_last_layer=False, hidden_dim=8, bottleneck_dim=4)
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.rand(10, 1) + 0.5)
    vectors = torch.randn(5, 6)
    values |= {f"head/{name}": parameter.detach().clone() for name, parameter in head.named_parameters()}
    values |= {"head_in": vectors, "head_out": head(vectors).detach()}

    values |= {
        "momentum 0.996 to 1, 7 epochs of 13": torch.from_numpy(utils.cosine_scheduler(0.996, 1, 7, 13)),
        "weight decay 0.04 to 0.4, 7 epochs of 13": torch.from_numpy(utils.cosine_scheduler(0.04, 0.4, 7, 13)),
        "rate 1 to 0.1, 7 epochs of 13, 2 of warm-up": torch.from_numpy(utils.cosine_scheduler(1, 0.1, 7, 13, 2)),
        "temperature 0.04 to 0.07 over 3 of 7 epochs": torch.from_numpy(
            main_dino.DINOLoss(12, CROPS, 0.04, 0.07, 3, 7).teacher_temp_schedule
        ),
    }
    out = sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("published_dino.safetensors")
    save_file({name: value.contiguous() for name, value in values.items()}, out)


if __name__ == "__main__":
    main()
