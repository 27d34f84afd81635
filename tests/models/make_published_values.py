"""Makes published_v1.safetensors and published_v2.safetensors: a tiny published Vision-LSTM of each version, with its
outputs and gradients.

    python tests/models/make_published_values.py CHECKOUT

CHECKOUT is a checkout of NX-AI/vision-lstm (needs einops). Every parameter is random, those that start at zero or one
too. Parameters and images are float32 numbers, all that is computed from them is float64.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from vision_lstm import VisionLSTM, VisionLSTM2

    sizes = {"dim": 8, "input_shape": (3, 16, 12), "patch_size": 4, "output_shape": (5,), "legacy_norm": True}
    save_values("published_v1", VisionLSTM(depth=3, stride=2, **sizes))
    save_values("published_v2", VisionLSTM2(depth=1, **sizes))


def save_values(name: str, model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    images = torch.randn(2, 3, 16, 12, generator=generator).double().requires_grad_()
    weight = torch.randn(2, 5, generator=generator).double()
    output = model(images)
    (output * weight).sum().backward()

    values = {"images": images.detach().float(), "weight": weight.float(), "output": output, "d_images": images.grad}
    for key, parameter in model.named_parameters():
        values[f"parameter/{key}"] = parameter.detach().float()
        values[f"gradient/{key}"] = parameter.grad
    save_file({key: value.detach().contiguous() for key, value in values.items()}, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
