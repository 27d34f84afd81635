"""Commands for networks: `selfvil export`, `push`, `verify`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of one of its checkpoints, or of an export.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    network: Annotated[str | None, typer.Option(help="Which network, if the objective has several.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Also write the rest of the objective, to continue.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx.")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Also write model.pt2.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Also weights for the code of NX-AI.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write model.onnx and model.int8.onnx.")] = False,
    images: Annotated[
        str | None, typer.Option(help="Images that measure int8's cost; default: --test, or those of pretraining.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="Labelled images, for int8's k-NN accuracy.")] = None,
    test: Annotated[str | None, typer.Option(help="Labelled images, for int8's k-NN accuracy.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 2,
    licence: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
) -> None:
    """Export the pretrained backbone: a folder that selfvil.load_backbone and timm load, and further formats.

    Of an existing export, only the further formats are written. Each is read again and compared with the network.
    """
    from selfvil.export import export

    wanted = {"onnx": onnx, "torch-export": torch_export, "published": published, "int8": int8}
    formats = [name for name, chosen in wanted.items() if chosen]
    export(
        run, out, network=network, heads=heads, formats=formats, images=images, train=train, test=test,
        workers=workers, licence=licence,
    )  # fmt: skip
    files = ", ".join(sorted(path.name for path in out.expanduser().iterdir()))
    if (out.expanduser() / "model.safetensors").exists():
        print(f"exported {run} to {out}; in Python: import selfvil; backbone = selfvil.load_backbone({str(out)!r})")
    else:
        print(f"exported formats of {run} to {out}")
    print(f"files: {files}")


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an export.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: OWNER/NAME.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    licence: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
) -> None:
    """Upload an export to the Hugging Face hub; timm.create_model("hf-hub:REPO", pretrained=True) then loads it.

    The token is that of the environment variable HF_TOKEN, or of `hf auth login`.
    """
    from selfvil.export import require_licence
    from selfvil.exporting import hub

    require_licence(licence)
    upload = hub.prepare(folder, repo, licence)
    sizes = upload.sizes()
    for name, size in sizes.items():
        print(f"{size:>14,} bytes  {name}")
    print(f"{sum(sizes.values()):>14,} bytes  in {len(sizes)} files, {'private, ' if private else ''}to {repo}")
    if dry_run:
        print("dry run: nothing was sent")
        return
    print(f"pushed to {hub.send(upload, private=private or None)}")
    load = f'timm.create_model("hf-hub:{repo}", pretrained=True)'
    print(f"in Python: import selfvil, timm; backbone = {load}")


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of an export, of a run, or of one of its checkpoints.")],
) -> None:
    """Compare every file with its digest; exit with status 2 if one is damaged."""
    from selfvil.verification import verify

    for sentence in verify(folder):
        print(sentence)
