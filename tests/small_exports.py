"""A run's folder with one checkpoint of a small random network, for tests of exports."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from selfvil import checkpoint
from selfvil.recipe import load

SMALL = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 1}


def make_run(root: Path, pattern: str = "x.tar", name: str = "vil_nano_patch4_32", **arguments: Any) -> nn.Module:
    """Write the folder of a run as the loop does, and return its network, whose parameters are all random."""
    kwargs = SMALL | arguments
    backbone = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    channels = kwargs["in_chans"]
    meta = {
        "format": 1, "step": 5, "samples": 640, "seconds": 90.0, "seed": 3, "export": "student",
        "networks": {"student": "backbone."}, "objective": {"name": "mae", "mask_ratio": 0.75},
        "model": {"name": name, "kwargs": kwargs},
        "data": {"pattern": pattern, "mean": [0.3] * channels, "std": [0.4] * channels, "fingerprint": "f",
                 "num_samples": 160, "img_size": kwargs["img_size"]},
    }  # fmt: skip
    tensors = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    checkpoint.save(root / "checkpoints", 5, {"objective": tensors}, meta)
    (root / "recipe.yaml").write_text(load("cifar10_mae").to_yaml())
    launch = {"device": "a CPU", "processes": 2, "commit": "0123abc", "versions": {"selfvil": "0.1"}}
    summary = {"run": "r", "finished": True, "step": 5, "total_steps": 5, "samples": 640, "seconds": 90.0,
               "images_per_second": 7.0, "loss": 0.123, "checkpoint": None}  # fmt: skip
    (root / "run.json").write_text(json.dumps({"launches": [launch], "summary": summary}))
    return backbone
