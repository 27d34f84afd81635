"""I-JEPA: predict a teacher's features of hidden blocks of an image from one visible context.

Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture" (2023,
arXiv 2301.08243). The student encodes a few patches of the image, the context; a narrow predictor gets them and mask
tokens at the places of some target blocks, and predicts the features that the teacher, a running mean of the student,
gives these places in the whole image. Nothing is predicted in pixels, and there are no crops to compare.

What differs for batches of equal length and for a backbone with a recurrence:

- The published code cuts the contexts of a batch to the length of the shortest, and drops the last patches of the
  others. Here every context has the same number of patches, `context_share` of the grid, chosen at random among those
  of the context block that no target block covers, so that a mask depends on its image and not on the batch.
- With `predictor: vil`, context and mask tokens stand at their places on the grid, one pass predicts all blocks, and
  the scan passes every place once. `predictor: vit` is the published one: attention over the context and the mask
  tokens of one block at a time. With timm's `VisionTransformer`, loss and gradients then equal the published code's.
- A block may touch every border; the published code never covers the last row and column.

Shapes: B images, N = H·W patches of the grid, K patches of the context, T target blocks of M patches, C channels.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.models.blocks import ViLBlockPair
from selfvil.models.layout import Grid, TokenLayout, gather_tokens, scatter_tokens
from selfvil.models.masking import keep_from_noise
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View, keyed_noise
from selfvil.objectives.colours import feature_picture
from selfvil.objectives.crops import Scale
from selfvil.objectives.mae import fixed_positions
from selfvil.objectives.teacher import Teacher, TeacherSettings, teacher_autocast


def _positive_range(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ends[0] <= ends[1]:
        raise ValueError(f"{list(ends)} is not a range of aspect ratios: expected two ascending numbers above 0")
    return ends


Aspect = Annotated[tuple[float, float], AfterValidator(_positive_range)]
"""Range of height over width."""


class IJEPASettings(TeacherSettings):
    """Settings of I-JEPA; the defaults are those of the published code, except for the ViL predictor."""

    name: Literal["ijepa"] = "ijepa"
    context_share: float = Field(0.25, gt=0, lt=1)
    """Share of the patches that the student gets. The published code ends at 0.2 to 0.3 with batches of 128."""
    context_scale: Scale = (0.85, 1.0)
    """Range of the share of the grid that the context block covers, from which the context is chosen."""
    target_blocks: int = Field(4, ge=1, le=32)
    """Number of target blocks of each image; they may overlap."""
    target_scale: Scale = (0.15, 0.2)
    """Range of the share of the grid that a target block covers. All blocks of a step have the same size."""
    target_aspect: Aspect = (0.75, 1.5)
    """Range of the height of a target block over its width."""
    target_layers: int = Field(1, ge=1)
    """The targets are the mean of the normalised outputs of this many last blocks of the teacher (more than one as in
    Baevski et al., "data2vec", 2022); a ViL block is a pair of layers."""
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """smooth_l1: smooth absolute error with beta 1, of the published code; l2: squared error, of the paper."""
    predictor: Literal["vil", "vit"] = "vil"
    """Blocks of the predictor: pairs of ViL blocks of the backbone's kind, which predict all target blocks in one pass,
    or transformer layers, which predict one target block at a time."""
    predictor_dim: int = Field(384, ge=16, multiple_of=8)
    """Width of the predictor's tokens; narrower than the backbone."""
    predictor_depth: int = Field(6, ge=1)
    """Number of pairs of ViL blocks, or of transformer layers."""
    predictor_heads: int = Field(12, ge=1)
    """Attention heads of a transformer layer; must divide predictor_dim. A ViL block has none."""
    teacher_momentum_schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the momentum changes from teacher_momentum to teacher_momentum_end: cosine, as half a cosine (DINO); linear
    (I-JEPA); constant keeps teacher_momentum and ignores teacher_momentum_end."""
    crop_scale: Scale = (0.3, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = False
    """Flip half of the crops left to right; the published code does not."""


class IJEPA(Objective):
    """I-JEPA around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: the backbone cannot drop tokens; the context has no patch, or the grid has no room for it beside a
            target block; or predictor_heads does not divide predictor_dim.
    """

    networks: Mapping[str, str] = {"student": "backbone.", "teacher": "teacher.backbone."}
    export = "teacher"
    predictor_pos: Tensor

    def __init__(self, backbone: nn.Module, settings: IJEPASettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        adapter, dim = adapt(backbone), settings.predictor_dim
        self.grid = adapter.token_grid(image.size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_keep = round(self.num_patches * settings.context_share)
        largest = _largest_block(self.grid, settings.target_scale[1], settings.target_aspect)
        if not 0 < self.num_keep <= self.num_patches - largest:
            raise UserError(
                f"objective.context_share = {settings.context_share} keeps {self.num_keep} of the {self.num_patches} "
                f"patches of a {image.size[0]}x{image.size[1]} image, of which a target block covers up to {largest}: "
                f"at least one must be kept, and at most {self.num_patches - largest}"
            )
        self.predictor_embed = nn.Linear(adapter.token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        # Fixed, as published; mask tokens differ by their positions alone.
        self.register_buffer("predictor_pos", fixed_positions(self.grid, dim), persistent=False)
        self.predictor = nn.ModuleList(self._predictor_block(layer) for layer in range(1, settings.predictor_depth + 1))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_head = nn.Linear(dim, adapter.token_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for linear in (self.predictor_embed, self.predictor_head):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.teacher = Teacher(backbone=self.backbone)

    def _predictor_block(self, layer: int) -> nn.Module:
        dim, heads = self.settings.predictor_dim, self.settings.predictor_heads
        if self.settings.predictor == "vil":
            return ViLBlockPair(dim, block=adapt(self.backbone).decoder_block)
        if dim % heads:
            raise UserError(f"objective.predictor_heads = {heads} does not divide objective.predictor_dim = {dim}")
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm is annotated with a class, but calls it only
        block = Block(dim, heads, qkv_bias=True, norm_layer=norm)
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for name in ("attn.proj.weight", "mlp.fc2.weight"):
                block.get_parameter(name).div_((2 * layer) ** 0.5)
        return block

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views[0]
        keep, blocks = self.masks(batch.positions, progress, images.device)
        features = self.targets(images)  # (B, N, C)
        targets = gather_tokens(features, blocks.flatten(1))  # (B, T·M, C)
        predicted = self.predict(adapt(self.backbone).encode_kept(images, keep), keep, blocks)
        loss = self.error(predicted, targets)
        logs = {"teacher_momentum": loss.new_full((), self.settings.momentum_at(progress))}
        if len(images) > 1:
            # Between images at the same place: features that depend on the place alone have none.
            logs["target_std"] = features.var(dim=0).mean().sqrt()
        return StepOutput(loss, logs)

    def masks(self, positions: Tensor, progress: Progress, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids of the context (B, K), ascending, and of the target blocks (B, T, M), each ascending.

        The sizes of the blocks depend on the seed and the step, the rest on the seed and the position of the image.
        """
        target, context = self.block_sizes(progress)
        count = self.settings.target_blocks
        noise = keyed_noise(progress.seed, positions, 2 * (count + 1) + self.num_patches, device)
        corners, order = noise.tensor_split([2 * (count + 1)], dim=1)
        corners = corners.unflatten(1, (-1, 2))
        blocks = block_ids(corners[:, :-1], target, self.grid)
        hidden = torch.zeros_like(order, dtype=torch.bool).scatter_(1, blocks.flatten(1), True)
        context_block = block_ids(corners[:, -1:], context, self.grid).flatten(1)
        inside = torch.zeros_like(hidden).scatter_(1, context_block, True)
        # First the patches of the context block that no target covers, then others that none covers. The patches of
        # targets come last: they are reached only where targets leave less than context_share.
        return keep_from_noise(order + ~inside + 2 * hidden, self.num_keep), blocks

    def block_sizes(self, progress: Progress) -> tuple[Grid, Grid]:
        """Rows and columns of a target block and of the context block at this step."""
        settings = self.settings
        size, aspect, context = np.random.default_rng([progress.seed, progress.step]).random(3)
        target = block_size(self.grid, _between(settings.target_scale, size), _between(settings.target_aspect, aspect))
        return target, block_size(self.grid, _between(settings.context_scale, context), 1.0)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of every patch (B, N, C), normalised over channels, float32 or better."""
        adapter = adapt(self.teacher.backbone)
        with teacher_autocast(self.backbone, images.device):
            if self.settings.target_layers == 1:
                layers = [adapter.split_tokens(adapter.forward_features(images))]
            else:
                layers = adapter.last_blocks(images, self.settings.target_layers)
        patches = torch.stack([patches.to(torch.promote_types(patches.dtype, torch.float32)) for _, patches in layers])
        return F.layer_norm(patches, patches.shape[-1:]).mean(dim=0)

    def predict(self, latent: Tensor, keep: Tensor, blocks: Tensor) -> Tensor:
        """From the context's tokens (B, K, C) to the targets of all blocks (B, T·M, C), float32 or better."""
        x = self.predictor_embed(latent)
        positions = self.predictor_pos.to(x.dtype)
        if self.settings.predictor == "vil":
            x = scatter_tokens(x, keep, self.mask_token, self.num_patches) + positions
            for block in self.predictor:
                x = block(x, TokenLayout(self.grid))
            x = gather_tokens(x, blocks.flatten(1))
        else:
            count, size = blocks.shape[1:]
            context = (x + positions[keep]).repeat_interleave(count, dim=0)  # (B·T, K, D)
            masked = (self.mask_token.to(x.dtype) + positions[blocks]).flatten(0, 1)  # (B·T, M, D)
            x = torch.cat([context, masked], dim=1)
            for block in self.predictor:
                x = block(x)
            x = x[:, -size:].unflatten(0, (-1, count)).flatten(1, 2)
        predicted = self.predictor_head(self.predictor_norm(x))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))

    def error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The loss of predictions (..., C), a scalar."""
        if self.settings.loss == "l2":
            return F.mse_loss(predicted, target)
        return F.smooth_l1_loss(predicted, target)

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        """Of the mean over images at every place of the grid, corrected for the number of images."""
        images = batch.views[0]
        if len(images) < 2:
            return None
        targets = self.targets(images)
        constant = targets.mean(dim=0, keepdim=True).expand_as(targets)
        return self.error(constant, targets) * len(images) / (len(images) - 1)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        self.teacher.follow(self, self.settings.momentum_at(progress))

    def schedules(self, progress: Progress) -> dict[str, float]:
        return {"teacher_momentum": self.settings.momentum_at(progress)}

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Rows of four: the image, its context, the targets of its blocks as colours, and their predictions.

        Where blocks overlap, the prediction of one of them is shown.
        """
        images = batch.views[0][:8]
        keep, blocks = self.masks(batch.positions[:8], progress, images.device)
        targets = self.targets(images)
        predicted = self.predict(adapt(self.backbone).encode_kept(images, keep), keep, blocks).to(targets)
        ids = blocks.flatten(1)
        none = torch.zeros_like(targets[..., 0], dtype=torch.bool)
        return feature_picture(
            images,
            none.scatter(1, keep, True),
            targets,
            torch.zeros_like(targets).scatter(1, ids.unsqueeze(-1).expand_as(predicted), predicted),
            none.scatter(1, ids, True),
            self.grid,
            self.image,
        )


def block_size(grid: Grid, share: float, aspect: float) -> Grid:
    """Rows and columns of a block that covers about `share` of the grid, with `aspect` = height / width.

    As published, a block is smaller than the grid along both axes, unless the grid has one row or column.
    """
    area = int(grid[0] * grid[1] * share)
    height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return min(max(height, 1), max(grid[0] - 1, 1)), min(max(width, 1), max(grid[1] - 1, 1))


def _largest_block(grid: Grid, share: float, aspect: tuple[float, float]) -> int:
    """Upper bound of the patches of a target block: both sides are rounded, by up to a half."""
    area = grid[0] * grid[1] * share
    return int(area + max((area * r) ** 0.5 + (area / r) ** 0.5 for r in aspect) / 2 + 0.25)


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + share * (ends[1] - ends[0])


def block_ids(corner: Tensor, size: Grid, grid: Grid) -> Tensor:
    """Ids (B, T, M), ascending, of the patches of blocks of one size.

    Args:
        corner: uniform noise (B, T, 2) in [0, 1) for the row and column of the first patch.
        size: rows and columns of a block, M = rows · columns.
        grid: rows and columns of the grid.
    """
    height, width = size
    top = (corner[..., 0] * (grid[0] - height + 1)).long()
    left = (corner[..., 1] * (grid[1] - width + 1)).long()
    device = corner.device
    inside = torch.arange(height, device=device).unsqueeze(1) * grid[1] + torch.arange(width, device=device)
    return (top * grid[1] + left).unsqueeze(-1) + inside.flatten()
