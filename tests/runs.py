"""Small real runs of each objective for tests: recipes, launches, and their final state."""

import os
import subprocess
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from selfvil import checkpoint
from selfvil.data.pack import pack
from selfvil.recipe import Recipe, load

REPOSITORY = Path(__file__).resolve().parents[1]

PACKAGED = {
    "mae": "demo",
    "simmim": "cifar10_simmim",
    "autoregressive": "cifar10_autoregressive",
    "dino": "cifar10_dino",
    "ibot": "cifar10_ibot",
    "dinov2": "dinov2_vil_b",
    "ijepa": "cifar10_ijepa",
    "lejepa": "cifar10_lejepa",
    "visreg": "cifar10_visreg",
    "distill": "cifar10_distill",
    "supervised": "cifar10_finetune",
}
"""Objective -> the packaged recipe that is made small."""

_GREY = ["model.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]"]
_FEW_CROPS = [
    "objective.local_crop_size=8", "objective.local_crops=2",
    "objective.out_dim=64", "objective.hidden_dim=64", "objective.bottleneck_dim=16",
]  # fmt: skip
_OWN_SIZE = ["model.name=vil_nano_patch4_32", "model.num_registers=null", "model.global_pool=null"]
_SMALL = {
    "mae": ["objective.decoder_dim=32", "objective.decoder_depth=1"],
    "simmim": [*_GREY],
    "autoregressive": [*_GREY, "objective.decoder_dim=32", "objective.decoder_depth=1", "objective.decoder_heads=2"],
    "dino": [*_GREY, *_FEW_CROPS],
    "ibot": [*_GREY, *_FEW_CROPS],
    "dinov2": [
        *_GREY, *_FEW_CROPS, "model.name=vil_nano_patch4_32", "model.init_values=null", "model.drop_path_rate=0",
        "optim.accumulate=1",
    ],
    "lejepa": [
        *_GREY, "objective.local_crop_size=8", "objective.local_crops=2", "objective.out_dim=16",
        "objective.hidden_dim=64", "objective.sigreg_directions=64",
    ],
    "ijepa": [*_GREY, *_OWN_SIZE, "objective.predictor_dim=32", "objective.context_share=0.3"],
    "visreg": [
        *_GREY, *_OWN_SIZE, "objective.local_crop_size=8", "objective.local_crops=2", "objective.out_dim=16",
        "objective.hidden_dim=64", "objective.directions=64",
    ],
    "supervised": [
        *_GREY, "model.start_from=null", "objective.mixup=0.8", "objective.cutmix=1", "objective.randaugment=5",
        "objective.flip=false",
    ],
    "distill": [*_GREY, "objective.teacher=test_vit", "objective.teacher_img_size=48"],
}  # fmt: skip


def overrides(objective: str, shards: Path, out: Path, *more: str) -> list[str]:
    """Overrides of the packaged recipe: 12 steps of 40 of the 200 digits, 30,000 parameters, one thread, no doctor."""
    teacher = [f"objective.teacher_weights={random_teacher(shards)}"] if objective == "distill" else []
    return [
        f"data.train={shards}/digits-*.tar", f"run.out={out}", "data.workers=0", "run.precision=fp32", "run.threads=1",
        "model.img_size=16", "model.patch_size=4", "model.embed_dim=32", "model.depth=1",
        *_SMALL[objective], *teacher,
        "optim.batch_size=40", "budget.epochs=null", "budget.samples=null", "budget.steps=12",
        "monitor.log_every=4", "monitor.tensorboard=false", "monitor.pictures_every=null", "monitor.doctor_every=null",
        "run.checkpoint_every=5", *more,
    ]  # fmt: skip


def pack_digits(folder: Path) -> Path:
    """Folder with digits-000000.tar and digits-000001.tar: 200 real, labelled 8x8 images, packed by our packer."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in range(200):
        path = folder / "images" / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).round().astype("uint8")).save(path)
    pack(str(folder / "images"), folder / "shards", name="digits", samples_per_shard=120, workers=1)
    return folder / "shards"


def random_teacher(folder: Path, name: str = "test_vit") -> Path:
    """A file with random weights of a timm model; nothing is downloaded."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            save_file(timm.create_model(name).state_dict(), path)
    return path


def small(objective: str, shards: Path, out: Path, *more: str) -> Recipe:
    return load(PACKAGED[objective], overrides(objective, shards, out, *more))


def command(objective: str, *arguments: str, processes: int = 1) -> list[str]:
    """Command line of a run; several processes are started by torchrun."""
    script = ["launch/pretrain.py", PACKAGED[objective], *arguments]
    if processes == 1:
        return [sys.executable, *script]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *torchrun, *script]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"} | more


def launch(objective: str, *arguments: str, processes: int = 1, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(objective, *arguments, processes=processes),
        cwd=REPOSITORY, env=environment(**environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen) -> None:
    """Read the output of a run until it has finished two steps, after which it prints the remaining time."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if line.startswith("about "):
            return
    raise AssertionError(f"the run ended before its second step: {read}")


def state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return {f"{part}/{key}": value for part in newest.names() for key, value in newest.tensors(part).items()}


def assert_same_state(one: Path, other: Path) -> None:
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, such as {different[:3]}"
