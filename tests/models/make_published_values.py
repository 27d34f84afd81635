"""Makes published_v2.safetensors: a tiny published Vision-LSTM, version 2, with its outputs and gradients.

    python tests/models/make_published_values.py CHECKOUT

CHECKOUT is a checkout of NX-AI/vision-lstm (needs einops). Every parameter is random, those that start at zero or one
too. Parameters and images are float32 numbers, all that is computed from them is float64.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

VALUES = Path(__file__).with_name("published_v2.safetensors")


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from vision_lstm import VisionLSTM2

    generator = torch.Generator().manual_seed(0)
    model = VisionLSTM2(
        dim=8, depth=1, input_shape=(3, 16, 12), patch_size=4, output_shape=(5,), legacy_norm=True
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    images = torch.randn(2, 3, 16, 12, generator=generator).double().requires_grad_()
    weight = torch.randn(2, 5, generator=generator).double()
    output = model(images)
    (output * weight).sum().backward()

    values = {"images": images.detach().float(), "weight": weight.float(), "output": output, "d_images": images.grad}
    for name, parameter in model.named_parameters():
        values[f"parameter/{name}"] = parameter.detach().float()
        values[f"gradient/{name}"] = parameter.grad
    save_file({name: value.detach().contiguous() for name, value in values.items()}, VALUES)


if __name__ == "__main__":
    main()
