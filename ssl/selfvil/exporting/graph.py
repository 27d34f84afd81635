"""The graph that ONNX and torch.export files hold: from images to pooled features and a map of patch features.

    input    images   (B, in_chans, height, width), normalised
    outputs  pooled   (B, D): what `backbone(images)` returns without a classifier
             patches  (B, C, H, W): the map of patch features after the final norm
             logits   (B, classes): only of a network with a classifier

The graph takes plain operations of torch only, no operator of this package. The batch is dynamic, and so is the size of
the images where the architecture allows it. Every written file is read again and compared with the network at several
sizes and batches: `require_equal`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.adapter import READOUTS, PatchlessAdapter, ViLAdapter, adapt
from selfvil.weights import Normalisation

INPUT = "images"
TOLERANCE = 1e-4
"""Largest allowed difference of an output, relative to the largest entry of that output if that is above 1."""
BATCHES = (1, 3)
LARGEST_BATCH = 2**16
_DIVISIBLE = re.compile(r"\(L\['images'\]\.size\(\)\[[23]\] % \d+\) == 0")

Outputs = Callable[[Tensor], Sequence[Tensor]]
"""From images (B, in_chans, height, width) to the outputs of the graph."""


class Graph(nn.Module):
    """The network with the outputs of an exported graph. `names` are those of the outputs."""

    def __init__(self, backbone: Any, img_size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.img_size = img_size
        with torch.no_grad():
            features = backbone.forward_features(torch.zeros(1, in_channels(backbone), *img_size, device=_device(self)))
        adapter = adapt(backbone)
        self.has_map = adapter.patch_grid(features, torch.empty(1, 1, *img_size)) is not None
        self.has_classifier = bool(getattr(backbone, "num_classes", 0))
        self.names = ["pooled", *(["patches"] if self.has_map else []), *(["logits"] if self.has_classifier else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_chans, height, width) to the outputs with `names`."""
        adapter = adapt(self.backbone)
        features = self.backbone.forward_features(images)
        pooled = self.backbone.forward_head(features, pre_logits=True)
        if pooled.ndim != 2:  # a network without pooling
            pooled = READOUTS[adapter.default_readout](*adapter.split_tokens(features))
        outputs = [pooled]
        if self.has_map:
            grid = adapter.patch_grid(features, images)
            assert grid is not None  # as when the graph was made
            outputs.append(adapter.split_tokens(features)[1].mT.unflatten(2, grid))
        if self.has_classifier:
            outputs.append(self.backbone.forward_head(features))
        return tuple(outputs)

    @property
    def multiple(self) -> tuple[int, int] | None:
        """Numbers that height and width of the images must be multiples of; None if only `img_size` is possible."""
        adapter = adapt(self.backbone)
        if isinstance(adapter, ViLAdapter):
            height, width = self.backbone.patch_embed.patch_size
            return height, width
        if isinstance(adapter, PatchlessAdapter):
            side = self.backbone.feature_info[-1]["reduction"]
            return side, side
        return None

    def other_sizes(self) -> list[tuple[int, int]]:
        """Image sizes besides `img_size` at which files are compared: one larger, and one that is taller but narrower,
        for which positions are resampled in another way. None if the size is fixed."""
        if self.multiple is None:
            return []
        (height, width), (rows, columns) = self.img_size, self.multiple
        return [(height + rows, width + 2 * columns), (height + rows, max(2 * columns, width - columns))]


class Traced(NamedTuple):
    """A graph as torch.export records it. dynamic: the image size is dynamic. note: why it is not, or None."""

    program: torch.export.ExportedProgram
    dynamic: bool
    note: str | None


def trace(graph: Graph) -> Traced:
    """Record the graph with a dynamic batch, and a dynamic image size where the architecture allows it.

    Raises UserError if torch.export cannot record the network.
    """
    # Sides that differ from each other and from the positions' own grid, so that no relation is taken for a constant.
    size = graph.other_sizes()[0] if graph.multiple else graph.img_size
    images = torch.randn(2, in_channels(graph.backbone), *size)
    batch = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    fixed = f"its image size is fixed at {graph.img_size[0]} x {graph.img_size[1]} pixels"
    note = None
    if graph.multiple is None:
        note = f"{fixed}: {adapt(graph.backbone).name} has positions for one grid only"
    else:
        rows, columns = (
            multiple * torch.export.Dim(f"{name}_div_{multiple}", min=2, max=2**12)
            for name, multiple in zip(("height", "width"), graph.multiple)
        )
        try:
            program = torch.export.export(graph, (images,), dynamic_shapes=({**batch, 2: rows, 3: columns},))
            return Traced(_portable(program), True, None)
        except Exception as error:  # torch raises many classes, most of them private
            if isinstance(adapt(graph.backbone), ViLAdapter):
                raise _not_recorded(graph, error) from error
            note = f"{fixed}: torch.export could not record this network with any other"
            images = torch.randn(2, in_channels(graph.backbone), *graph.img_size)
    try:
        program = torch.export.export(graph, (images,), dynamic_shapes=(batch,))
    except Exception as error:
        raise _not_recorded(graph, error) from error
    return Traced(_portable(program), False, note)


def _not_recorded(graph: Graph, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"torch.export {torch.__version__} cannot record {adapt(graph.backbone).name}: {reason}")


def _portable(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove the lines of source that each node was recorded from, which name files of this machine, and some guards.

    torch refuses a batch of 1 by guards on strides, which no node of the graph depends on: `require_equal` compares a
    batch of 1. The guards that sides are multiples of the patch's remain.
    """
    program._guards_code = [guard for guard in program._guards_code if _DIVISIBLE.fullmatch(guard)]
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "from_node"):
                    node.meta.pop(key, None)
    return program


def require_equal(graph: Graph, dynamic: bool, file: str, outputs: Outputs) -> float:
    """Compare a file's outputs with the network's, at each size and batch; return the largest absolute difference.

    dynamic: compare also at other sizes than `img_size`. Raises UserError, which names output, size and batch, if one
    differs by more than TOLERANCE or is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for height, width in [graph.img_size, *(graph.other_sizes() if dynamic else [])]:
        for batch in BATCHES:
            images = torch.randn(batch, in_channels(graph.backbone), height, width, generator=generator)
            with torch.inference_mode():
                expected = graph(images)
            where = f"at {height} x {width} pixels and a batch of {batch}"
            try:
                found = outputs(images)
            except Exception as error:  # each runtime raises classes of its own
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"{file} was written, but does not run {where}: {reason}") from error
            for name, ours, theirs in zip(graph.names, expected, found, strict=True):
                if ours.shape != theirs.shape:
                    raise UserError(f"{file}: {name} has shape {list(theirs.shape)} {where}, not {list(ours.shape)}.")
                difference = float((ours - theirs).abs().max())
                allowed = TOLERANCE * max(1.0, float(ours.abs().max()))
                if not difference <= allowed:
                    raise UserError(
                        f"{file} does not return what the network does: {name} differs by {difference:.2g} {where}, "
                        f"more than {allowed:.2g}. Nothing was exported."
                    )
                largest = max(largest, difference)
    return largest


def in_channels(backbone: nn.Module) -> int:
    """Channels of the images of a timm network."""
    channels = getattr(backbone, "in_chans", None)
    if channels is None:
        first: Any = next(p for p in backbone.parameters() if p.ndim == 4)
        channels = first.shape[1]
    return int(channels)


def describe_input(graph: Graph, dynamic: bool, normalisation: Normalisation) -> dict[str, Any]:
    """What a user of the file must know: sizes and normalisation of the images, names of input and outputs."""
    return {
        "input": INPUT,
        "outputs": graph.names,
        "img_size": list(graph.img_size),
        "img_size_multiple": list(graph.multiple) if dynamic and graph.multiple else None,
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
    }


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
