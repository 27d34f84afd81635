"""The recipe of a run: a YAML file of flat sections, checked completely before any work begins.

    recipe = load("recipes/mae_vil_t.yaml", ["optim.batch_size=512", "run.out=runs/mine"])

Every field is documented here, with its unit; `selfvil schema` prints the JSON schema of this file, for completion in
editors. A recipe contains only values: no import paths, no interpolation, no inheritance.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from selfvil import advice
from selfvil import overrides as command_line
from selfvil.errors import UserError, redact
from selfvil.packaged import find as find
from selfvil.packaged import packaged_recipes as packaged_recipes
from selfvil.safe_yaml import read_mapping
from selfvil.settings import PathText, Section, Size
from selfvil.training_sections import BudgetSection as BudgetSection
from selfvil.training_sections import OptimSection as OptimSection

log = logging.getLogger("selfvil")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelSection(Section):
    """The backbone: any `vil_*` model, or a timm model that the objective supports."""

    name: str
    """Name of a timm model, such as vil_tiny_patch16_224."""
    img_size: Size = (224, 224)
    """Height and width of a training image, in pixels; both divisible by patch_size."""
    patch_size: int | None = Field(16, ge=1)
    """Side of a square patch, in pixels; null for networks without patches, such as convnext_tiny."""
    stride: int | None = Field(None, ge=1)
    """ViL: distance between patches, in pixels; below patch_size they overlap and there are more: 8 with patches of 16
    gives 27 x 27 = 729 tokens at 224 pixels (long-sequence fine-tuning). null: patch_size."""
    in_chans: int = Field(3, ge=1, le=32)
    """Channels of an image: 1 (grey), 3 (RGB), 4 (RGBA), or any other number of TIFF, NPY, DICOM and PNG files."""
    embed_dim: int | None = Field(None, ge=16)
    """Width of a token; null keeps the model's default."""
    depth: int | None = Field(None, ge=1)
    """Layers (for ViL: pairs of blocks); null keeps the model's default."""
    num_heads: int | None = Field(None, ge=1)
    """Heads of a transformer, or of a vil_mlp_* model, which divide embed_dim; null keeps the model's default."""
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    """Probability of skipping a block for a sample during training (stochastic depth)."""
    drop_path_uniform: bool | None = None
    """ViL: the same probability for every block (true, as published), or rising linearly from 0; null: true."""
    init_values: float | None = Field(None, gt=0)
    """Initial value of LayerScale; null leaves LayerScale out."""
    traversal: (
        Literal[
            "alternating",
            "unidirectional",
            "bidirectional",
            "bidirectional_shared",
            "quad",
            "quad_shared",
            "quad_alternating",
        ]
        | None
    ) = None
    """ViL: scan directions of the blocks; null keeps the model's default (alternating)."""
    conv: Literal["2d", "causal1d", "none"] | None = None
    """ViL: convolution before q and k; null keeps the model's default (2d; version 1: causal1d)."""
    global_pool: (
        Literal[
            "bilateral_concat",
            "bilateral_avg",
            "bilateral_patch",
            "avg",
            "middle_patch",
            "middle_cls",
            "registers",
            "token",
        ]
        | None
    ) = None
    """ViL: readout of the image; middle_cls, or token, adds a class token, registers needs num_registers."""
    fc_norm: bool | None = None
    """Norm after the pooling, before a classifier; null keeps the model's default."""
    num_registers: int | None = Field(None, ge=1)
    """ViL: learnable tokens spread evenly through the sequence; null has none."""
    pos_embed: Literal["learn", "sincos"] | None = None
    """ViL: learned or fixed sine-cosine positions; null keeps the model's default (learn)."""
    start_from: PathText | None = None
    """Initial weights, of the same architecture: an export, a run or a checkpoint; or a published file of Vision-LSTM
    (.th) or a safetensors file of the timm model, which need start_heads: new. null initialises them randomly."""
    start_heads: Literal["load", "new"] = "load"
    """With start_from: load heads and teacher too, or load only the backbone and create new heads."""

    @model_validator(mode="after")
    def _image_is_whole_patches(self) -> "ModelSection":
        patch = self.patch_size or 1
        if any(side < patch or side % patch for side in self.img_size):
            raise ValueError(f"img_size {list(self.img_size)} is not divisible by patch_size {self.patch_size}")
        vil = self.name.startswith("vil_")  # other networks have no stride: `_designs_are_of_vil`
        if (
            vil
            and self.stride is not None
            and (self.stride > patch or any((side - patch) % self.stride for side in self.img_size))
        ):
            raise ValueError(
                f"stride {self.stride} does not fit patches of {patch} pixels in images of {list(self.img_size)}: it "
                f"must divide {' and '.join(str(side - patch) for side in dict.fromkeys(self.img_size))}, and be at "
                f"most {patch}"
            )
        return self

    @model_validator(mode="after")
    def _extra_tokens_fit_the_pooling(self) -> "ModelSection":
        if self.global_pool == "registers" and self.num_registers is None:
            raise ValueError("global_pool 'registers' needs num_registers, such as 4")
        if (
            self.global_pool in ("middle_cls", "token")
            and self.num_registers is not None
            and self.name.startswith("vil_")
        ):
            raise ValueError(f"global_pool {self.global_pool!r} leaves no room for num_registers")
        return self

    @model_validator(mode="after")
    def _designs_are_of_vil(self) -> "ModelSection":
        vil = ("stride", "drop_path_uniform", "traversal", "conv", "num_registers", "pos_embed")
        given = [key for key in vil if getattr(self, key) is not None]
        if given and not self.name.startswith("vil_"):
            raise ValueError(f"{', '.join(given)}: only vil_* models have that, and name is {self.name!r}")
        return self

    def create_kwargs(self) -> dict[str, Any]:
        """Arguments for `timm.create_model(self.name, ...)`: a backbone without a classifier."""
        kwargs: dict[str, Any] = {"in_chans": self.in_chans, "num_classes": 0, "drop_path_rate": self.drop_path_rate}
        if self.patch_size is not None:  # a network without patches is built for no size of image
            kwargs = {"img_size": list(self.img_size), "patch_size": self.patch_size} | kwargs
        optional = (
            "embed_dim", "depth", "num_heads", "drop_path_uniform", "init_values", "traversal", "conv", "global_pool",
            "num_registers", "pos_embed", "stride", "fc_norm",
        )  # fmt: skip
        return kwargs | {key: value for key in optional if (value := getattr(self, key)) is not None}


class SourceEntry(Section):
    """One source of a mixture."""

    source: PathText | list[PathText]
    """What data.train may be without a mixture."""
    weight: float = Field(1.0, gt=0, le=1e6)
    """Images taken from this source, in relation to the weights of the others."""


def _sources(value: Any) -> Any:
    """Entries of a mixture are checked here, since the messages of a union do not name the faulty part."""
    if not isinstance(value, list | tuple) or not any(isinstance(each, dict | SourceEntry) for each in value):
        return value
    entries, keys = [], {"data.train": list(SourceEntry.model_fields)}
    for number, each in enumerate(value, 1):
        if not isinstance(each, dict | SourceEntry):
            raise ValueError(
                f"source {number} is {str(each)[:80]!r}; in a mixture, each is {{source: ..., weight: ...}}"
            )
        try:
            entries.append(SourceEntry.model_validate(each))
        except ValidationError as error:
            problems = [sentence for _, sentence in advice.explain_errors(error, SourceEntry, keys, "data.train")]
            raise ValueError(f"source {number}: {'; '.join(problems)[:300]}") from None
    return entries


class DataSection(Section):
    """Where the images come from."""

    train: Annotated[PathText | list[PathText] | list[SourceEntry], BeforeValidator(_sources)]
    """WebDataset shards (a path, a glob, a folder, or a brace pattern such as shards/train-{000000..000009}.tar), their
    URLs (https, s3, gs, hf), a folder of image files, a table of paths (.csv, .parquet), or a Hugging Face data set on
    disk; or a mixture: a list of {source: ..., weight: ...}, from which every window of images takes exact shares."""
    order: Literal["shuffled", "class_balanced"] = "shuffled"
    """shuffled: every image once in each epoch. class_balanced: every class equally often, each with its own epochs;
    needs labels, and window must be null."""
    image: str | None = None
    """Extension of the image if samples have several, such as KEY.jpg with a mask KEY.png; null takes the first of jpg,
    png, webp, tif ... and warns."""
    window: int | None = Field(None, ge=1)
    """Shuffle the images of this many shards at a time, with another order of the shards in each epoch; null: 16 where
    shuffled images are behind a URL, so that each shard is downloaded once an epoch, otherwise all images at once."""
    cache: PathText | None = None
    """Folder for downloaded shards, which several runs may share; null: SELFVIL_REMOTE_CACHE of the environment, or
    selfvil/remote in the user's cache folder."""
    cache_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Size of that folder, in GB: the least recently used shards are removed. Two windows of shards should fit. null:
    SELFVIL_REMOTE_CACHE_GB of the environment, or 50."""
    labels_per_class: int | None = Field(None, ge=1)
    """Train on this many images of each class only, drawn by run.seed; needs labels. null trains on all images."""
    mean: list[Annotated[float, Field(allow_inf_nan=False)]] = list(IMAGENET_MEAN)  # noqa: RUF012 - pydantic copies it
    """Mean of each channel. Integers of 8 and 16 bits without sign are on a scale of 0 to 1, other values in their own
    unit, such as the Hounsfield units of DICOM."""
    std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = list(IMAGENET_STD)  # noqa: RUF012
    """Standard deviation of each channel, on the same scale."""
    stats: Literal["given", "auto"] = "given"
    """given: mean and std are those above. auto: those that `selfvil index SHARDS --stats` has measured on data.train;
    they are written into recipe.yaml of the run."""
    channel_drop: float = Field(0.0, ge=0, lt=1)
    """Probability that a channel of a view is set to its mean, drawn for each channel and view; one always stays. For
    objectives that compare views, or are supervised, on images with many channels."""
    workers: int = Field(8, ge=0, le=128)
    """Processes that decode and augment, for each training process; 0 does it in the training process."""
    augment: Literal["workers", "device"] = "workers"
    """Where augmentation runs: in the workers, or on the device for a whole batch; the latter is for small images (32
    pixels, not 500) and a GPU that is faster than the workers. Both give the same views to the rounding of 8 bits."""
    decode: Literal["scaled", "exact"] = "scaled"
    """scaled: a large JPEG is decoded to 1/2, 1/4 or 1/8 of its size where every crop stays at least twice as large as
    its view, which is faster; views then differ by about 0.5, 0.7 or 1.2 levels of 255 on average. exact: always the
    full size."""
    max_bad: float = Field(0.001, ge=0, le=1)
    """Share of samples that may be damaged before the run saves and stops, but at least 10 samples, counted over all
    processes and launches. They are replaced and listed in ledger*.jsonl. 0 allows none."""

    @property
    def mixture(self) -> list[tuple[str | list[str], float]]:
        """The sources and weights of a mixture; empty for a single source."""
        return [(each.source, each.weight) for each in self.train if isinstance(each, SourceEntry)]

    @property
    def described(self) -> str:
        """data.train as one line, without the secrets of URLs."""

        def line(source: str | list[str]) -> str:
            return redact(source if isinstance(source, str) else " ".join(source))

        parts = [f"{weight:g} x {line(source)}" for source, weight in self.mixture]
        return " + ".join(parts) if parts else line(self.train)  # type: ignore[arg-type]  # it is no mixture

    @model_validator(mode="after")
    def _keys_fit(self) -> "DataSection":
        if self.mixture and self.labels_per_class is not None:
            raise ValueError("labels_per_class is for one source, and train is a mixture: leave one of them out")
        if self.train == []:
            raise ValueError("train is an empty list: give at least one source")
        if self.order == "class_balanced" and self.window is not None:
            raise ValueError("order = class_balanced visits all shards at once, so window must be null")
        return self


class RunSection(Section):
    """Folder, seed, precision, checkpoints and limits of the run."""

    out: PathText
    """Folder of the run: recipe, checkpoints, metrics, ledger."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initialisation, sample order, augmentation and masks."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the matrix products: bf16 autocast, or float32. Weights and optimizer are always float32."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; null keeps the launcher's setting (accelerate launch counts physical cores, which on
    a virtual machine may be half of the useful number)."""
    compile: Literal["none", "default", "max-autotune"] = "none"
    """Compile the blocks of all networks by torch.compile, in this mode; needs a C++ compiler on CPUs, Triton on GPUs;
    not under ZeRO-3. With the native CPU kernels there is nothing left to gain. Checkpoints are the same: a run may
    continue with another choice."""
    profile: int | None = Field(None, ge=1)
    """Trace this many steps of the launch, after 3 warm-up steps, into profile/*.json.gz, which ui.perfetto.dev opens,
    and print the ten operations that take the most time; null traces none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest valid checkpoint in `out`, if there is one; never: `out` must be new."""
    stall_minutes: float | None = Field(10, gt=0)
    """A process that makes no progress for this many minutes (six times as many while one process saves or scores)
    prints where it hangs, saves the state where it can, and ends with exit status 4; null sets no limit."""
    checkpoint_every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep_checkpoints: int = Field(2, ge=2)
    """Number of verified checkpoints to keep."""
    milestone_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints that are also saved, and never removed; null has none."""


class MonitorSection(Section):
    """Metrics, pictures and diagnosis during the run."""

    log_every: int = Field(20, ge=1)
    """Optimizer steps between two lines of metrics.jsonl (means over those steps)."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run's folder."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (needs the extra `wandb`); null disables it."""
    pictures_every: int | None = Field(None, ge=1)
    """Optimizer steps between two pictures of the objective (MAE: reconstructions); null draws none."""
    picture_channels: tuple[int, int, int] = (0, 1, 2)
    """Channels that pictures show as red, green and blue, counted from 0: [3, 2, 1] for the bands of Sentinel-2. Images
    with one or two channels are shown as grey."""
    doctor_every: int | None = Field(50, ge=1)
    """Optimizer steps between two measurements of features, gates, gradients and teacher for signs of collapse; null
    never measures."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """At a sign of collapse: print a warning; or print it, save the state and end with exit status 3."""


class Recipe(Section):
    """All settings of a run. `objective` is the settings model of the named objective, and each entry of `eval` that of
    the named evaluation; both are declared in the file of the objective or evaluation."""

    model: ModelSection
    data: DataSection
    objective: Any
    optim: OptimSection
    budget: BudgetSection
    run: RunSection
    monitor: MonitorSection = MonitorSection()
    eval: tuple[Any, ...] = ()
    """Evaluations during the run, each an entry of `selfvil.evaluate.entries`: name, train, test, every, settings."""

    @model_validator(mode="after")
    def _statistics_fit_channels(self) -> "Recipe":
        channels = self.model.in_chans
        for key in ("mean", "std"):
            length = len(getattr(self.data, key))
            if length != channels and self.data.stats == "given":
                raise ValueError(
                    f"data.{key} has {length} values, but model.in_chans is {channels}: give {channels}, or measure "
                    "them by `selfvil index SHARDS --stats` and set data.stats to auto"
                )
        if channels >= 3 and not all(0 <= channel < channels for channel in self.monitor.picture_channels):
            raise ValueError(
                f"monitor.picture_channels {list(self.monitor.picture_channels)} must be numbers of channels, from 0 "
                f"to {channels - 1}"
            )
        return self

    @model_validator(mode="after")
    def _small_crops_are_smaller(self) -> "Recipe":
        size = getattr(self.objective, "local_crop_size", None)
        if size and self.objective.local_crops and any(a > b for a, b in zip(size, self.model.img_size)):
            half = [max(side // 2 // (patch := self.model.patch_size or 1), 1) * patch for side in self.model.img_size]
            raise ValueError(
                f"objective.local_crop_size {list(size)} is larger than model.img_size {list(self.model.img_size)}: "
                f"small crops must not be larger than the image, such as {half}"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included, in the order of this file."""
        return yaml.safe_dump(self.as_record(), sort_keys=False, width=120)

    def as_record(self) -> dict[str, Any]:
        """Plain values of every field, to be stored: without the secrets of URLs (`errors.redact`)."""
        return _redacted(self.model_dump(mode="json"))

    def identity(self) -> dict[str, Any]:
        """The settings that determine the result: a run may continue another one with an equal identity.

        The budget is compared separately (`selfvil.plan`), and the images by their fingerprint, not by their path.
        optim.accumulate changes only rounding, except for objectives that compare the images of a micro-batch, and
        data.decode only details of views.
        """
        whole = self.model_dump(mode="json")
        whole["run"] = {key: whole["run"][key] for key in ("seed", "precision")}
        for key in ("train", "workers", "max_bad", "stats", "cache", "cache_gb", "decode"):
            whole["data"].pop(key)
        for key in ("accumulate", "on_nonfinite"):
            whole["optim"].pop(key)
        return {key: whole[key] for key in ("model", "data", "objective", "optim", "run")}


def load(source: "str | Path | Recipe", overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe file, or a packaged recipe by its name, and apply `section.key=value` overrides.

    source: may also be a recipe, of which a changed copy is returned. overrides: texts, or values by their keys. An
    override of budget.epochs, samples or steps replaces the others; one of objective.name takes the defaults of that
    objective.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown, a value has the wrong type or does not fit.
    """
    if isinstance(source, Recipe):
        where, tree = "the recipe", source.model_dump(mode="json")
    else:
        where, tree = str(path := find(source)), read_mapping(path)
    tree = _sections(tree, where)
    given = command_line.apply(tree, overrides, list(Recipe.model_fields), TEXTS)
    recipe = parse(tree, where, given)
    _warn_of_old_eval(tree.get("eval"), where)
    return recipe


def read(path: Path) -> Recipe:
    """The recipe in a file such as recipe.yaml of a run. Raises UserError."""
    return parse(read_mapping(path), str(path))


def parse(tree: dict[str, Any], where: str, given: dict[str, str] | None = None) -> Recipe:
    """Check a mapping of sections. Raises UserError.

    where: origin of the tree, for messages. given: key -> the override that set it, named instead of `where`.
    """
    from selfvil.evaluate import entries  # imported only when a recipe is read: the tables import torch
    from selfvil.objectives import settings_model

    given = given or {}
    problems: list[tuple[str, str]] = []
    fields = {name: list(getattr(field.annotation, "model_fields", ())) for name, field in Recipe.model_fields.items()}
    tree = _sections(tree, where)
    objective: Any = tree.get("objective")
    if objective is not None:
        try:
            model = settings_model(objective.get("name"))
        except UserError as error:
            problems.append(("objective.name", str(error)))
            objective = None
        else:
            fields["objective"] = list(model.model_fields)
            try:
                objective = model.model_validate(objective)
            except ValidationError as error:
                problems += advice.explain_errors(error, model, fields, prefix="objective")
        tree = tree | {"objective": objective}
    fields["eval"] = [key for key in entries.Entry.model_fields if key != "name"]
    evaluations, wrong = entries.parse(tree.get("eval"))
    problems += wrong
    try:
        recipe = Recipe.model_validate(tree | {"eval": evaluations})
    except ValidationError as error:
        problems += advice.explain_errors(error, Recipe, fields)
    if problems:
        raise UserError(advice.report(problems, where, given))
    return recipe


def _sections(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy with a new mapping for each section, which is empty for a section without keys.

    `eval` may also be a list of mappings.
    """

    def section(name: str, value: Any) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"{where} is not a recipe: {name[:60]} is not a section of `key: value` lines "
                f"(sections: {', '.join(Recipe.model_fields)})"
            )
        return {str(key): each for key, each in (value or {}).items()}

    sections: dict[str, Any] = {}
    for name, value in tree.items():
        if name == "eval" and isinstance(value, list | tuple):
            sections["eval"] = [section(f"eval, entry {index},", each) for index, each in enumerate(value)]
        else:
            sections[str(name)] = section(str(name), value)
    return sections


def _warn_of_old_eval(section: Any, where: str) -> None:
    if isinstance(section, dict) and os.environ.get("RANK", "0") == "0":
        from selfvil.evaluate.entries import old_form_warning

        if warning := old_form_warning(section, where):
            log.warning("%s", warning)


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_redacted(each) for each in value]
    return redact(value) if isinstance(value, str) else value


TEXTS = frozenset({"model.name", "model.start_from", "data.train", "run.out", "monitor.wandb"})
"""Keys whose values are text, so that run.out=2026 is a folder of that name."""
