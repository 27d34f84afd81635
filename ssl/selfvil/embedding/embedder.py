"""`Embedder`: a pretrained backbone as a scikit-learn transformer, for notebooks and pipelines.

pipeline = make_pipeline(selfvil.Embedder("exported"), StandardScaler(), LogisticRegression())
pipeline.fit(paths, labels).score(test_paths, test_labels)
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from torch import Tensor

from selfvil.data.images import open_images
from selfvil.data.loader import ordered_batches
from selfvil.data.read import DamagedImage, Loaded, convert_image, decode_image, turn_upright
from selfvil.embedding.encoder import Encoder, load_encoder
from selfvil.errors import UserError, shorten

_OF_THE_MODEL = ("source", "readout", "network", "img_size", "precision", "device")


class Embedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Images to embeddings, float32 (N, D), with a frozen backbone. `fit` learns nothing.

    The model is loaded at the first use, and again if a parameter changes: a serialised object, like a clone, holds
    the parameters and no weights.

    Args:
        source: an export, a run, a checkpoint: what `selfvil.load_backbone` accepts.
        readout: how tokens become one vector; None: the architecture's usual one for frozen features.
        network: which network of a run that has several; None: its default.
        img_size: pixels, or (height, width); None: as in pretraining.
        batch_size: images in a forward pass; None: 64 on a CPU, 256 elsewhere.
        workers: processes that decode a folder or shards, threads that decode a list; 0: none.
        precision: "fp32" or "bf16".
        device: None: a GPU if there is one.
    """

    def __init__(
        self,
        source: Any,
        readout: str | None = None,
        *,
        network: str | None = None,
        img_size: Any = None,
        batch_size: int | None = None,
        workers: int = 2,
        precision: Any = "fp32",
        device: Any = None,
    ) -> None:
        self.source = source
        self.readout = readout
        self.network = network
        self.img_size = img_size
        self.batch_size = batch_size
        self.workers = workers
        self.precision = precision
        self.device = device

    def fit(self, X: Any = None, y: Any = None) -> "Embedder":
        """Load the model, so that a wrong source or readout is reported here. X and y are not used."""
        self._encoder()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embeddings of images, float32 (N, D), in their order.

        X: a list of paths, PIL images and arrays; or the path of a folder of images, or of shards. Arrays are uint8,
        (height, width) or (height, width, channels); an array (N, height, width, channels) is N of them.

        Raises UserError: X is none of these, or an image cannot be read. No row is left out, since rows belong to
        labels; to leave out damaged images, use `selfvil.embed`.
        """
        encoder = self._encoder()
        batch_size = self.batch_size or (64 if encoder.device.type == "cpu" else 256)
        if isinstance(X, (str, os.PathLike)):
            batches = _from_files(X, encoder, batch_size, self.workers)
        else:
            batches = _from_list(_as_list(X), encoder, batch_size, self.workers)
        rows = [encoder.encode(batch).features for batch in batches]
        features = np.concatenate(rows) if rows else np.zeros((0, encoder.dim), np.float32)
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise UserError(
                f"the features of image {row} hold NaN or infinity: the weights of {self.source} are broken"
            )
        return features

    @property
    def _n_features_out(self) -> int:
        return self._encoder().dim

    def _encoder(self) -> Encoder:
        wanted = {name: getattr(self, name) for name in _OF_THE_MODEL}
        loaded = self.__dict__.get("_loaded")
        if loaded is None or loaded[0] != wanted:
            self._loaded = loaded = wanted, load_encoder(**wanted)
        return loaded[1]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_loaded", None)
        return state

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True  # images are no table of numbers
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags


def _from_files(images: Any, encoder: Encoder, batch_size: int, workers: int) -> Iterator[Tensor]:
    opened = open_images(images)
    for batch in ordered_batches(
        opened, encoder.view, batch_size=batch_size, workers=workers, channels=encoder.normalisation.channels,
        skip_damaged=True,
    ):  # fmt: skip
        if batch.bad:
            bad = batch.bad[0]
            raise UserError(
                f"the image {shorten(bad.key, 300)} in {bad.shard} cannot be read ({bad.reason}): remove it, or use "
                "selfvil.embed, which leaves out such images"
            )
        yield batch.views[0]


def _as_list(images: Any) -> Sequence[Any]:
    if isinstance(images, Image.Image) or not isinstance(images, Iterable):
        raise UserError(
            f"Embedder got one {type(images).__name__}; expected a list of paths, PIL images or arrays, or the path "
            "of a folder or of shards"
        )
    if isinstance(images, np.ndarray) and images.dtype != object and images.dtype.kind not in "US" and images.ndim < 3:
        raise UserError(
            f"Embedder got an array of shape {list(images.shape)}; expected uint8 images (N, height, width, channels), "
            "or a list of paths, PIL images or arrays"
        )
    return list(images)


def _from_list(images: Sequence[Any], encoder: Encoder, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Batches; while one is in the network, threads decode the next one. (Pillow releases the GIL.)"""
    view, channels = encoder.view, encoder.normalisation.channels

    def prepare(item: tuple[int, Any]) -> Tensor:
        return view(_decode(*item, channels))

    numbered = list(enumerate(images))
    chunks = [numbered[i : i + batch_size] for i in range(0, len(numbered), batch_size)]
    if not workers:
        yield from (torch.stack([prepare(item) for item in chunk]) for chunk in chunks)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(prepare, item) for chunk in chunks[:1] for item in chunk]
        for number in range(len(chunks)):
            now = ahead
            ahead = [pool.submit(prepare, item) for chunk in chunks[number + 1 : number + 2] for item in chunk]
            yield torch.stack([future.result() for future in now])


def _decode(number: int, item: Any, channels: int) -> Image.Image:
    """An image with 8 bits in each of `channels`. Raises UserError."""
    try:
        if isinstance(item, (str, os.PathLike)):
            name = os.fspath(item)
            return decode_image(Path(item).expanduser().read_bytes(), channels)
        name = f"image {number}"
        if isinstance(item, Image.Image):
            return convert_image(Loaded(turn_upright(item, item), None), channels)
        if isinstance(item, np.ndarray):
            return convert_image(Loaded(_from_array(item, name), None), channels)
    except (OSError, DamagedImage) as error:
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raise UserError(f"image {number} is a {type(item).__name__}; expected a path, a PIL image or a uint8 array")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    if (
        array.dtype != np.uint8
        or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)))
        or not array.size
    ):
        raise UserError(
            f"{name} is an array of {array.dtype}, shape {list(shape)}; expected uint8, (height, width) or "
            "(height, width, channels) with 1, 3 or 4 channels"
        )
    return Image.fromarray(array[:, :, 0] if len(shape) == 3 and shape[2] == 1 else array)
