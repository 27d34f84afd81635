"""Views rendered for a whole batch by torch, compared with the same draws applied by Pillow, in levels of 8 bits.

Changes of colour, grey, solarisation, flips and crops without resizing are equal. Resampled pixels may differ by one
level where the sum is between two levels, and later changes magnify the difference.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from selfvil.data import render, views
from selfvil.data.render import Drawn, require_renderable
from selfvil.data.views import CenterCrop, DINOCrop, Draw, RandomCropFlip, seed_randomness
from selfvil.errors import UserError

SIZE = (24, 32)
WHOLE = (0, 0, 32, 24)


def levels(channels: int) -> dict:
    """Statistics that keep the levels 0 to 255."""
    return {"mean": (0.0,) * channels, "std": (1 / 255,) * channels}


def picture(number: int, height: int, width: int, channels: int, soft: bool = True) -> Image.Image:
    """Noise of single pixels or, with `soft`, of patches of 4; from 40 to 215, so bicubic stays within 0 to 255."""
    rng, coarse = np.random.default_rng(number), 4 if soft else 1
    shape = (-(-height // coarse), -(-width // coarse), channels)
    pixels = rng.integers(40, 216, shape, dtype=np.uint8).repeat(coarse, 0).repeat(coarse, 1)[:height, :width]
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def pictures(channels: int, count: int = 60, source: tuple[int, int] | None = None) -> list[Image.Image]:
    """Of one size (height, width), or of sizes from 8 to 70 a side."""
    sizes = np.random.default_rng(9).integers(8, 71, (count, 2)).tolist() if source is None else [source] * count
    return [picture(number, *size, channels, soft=number % 2 == 0) for number, size in enumerate(sizes)]


def difference(view: RandomCropFlip, images: list[Image.Image], draws: list[Draw] | None = None) -> torch.Tensor:
    """Absolute differences (B, C, h, w) between Pillow and torch, for `draws` or the draws of the keys (1, row, 0)."""
    if draws is None:
        draws, expected = [], []
        for row, image in enumerate(images):
            seed_randomness(1, row, 0)
            draws.append(view.draw(*image.size, image.mode))
            seed_randomness(1, row, 0)
            expected.append(view(image))
    else:
        expected = [view.apply(image, draw) for image, draw in zip(images, draws)]
    (found,) = Drawn.collate(images, [draws], [view]).render("cpu")
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    return (found - torch.stack(expected)).abs()


def colourful(channels: int) -> list[Image.Image]:
    """All levels, pure colours, greys, black and white."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, *SIZE, channels), dtype=np.uint8)
    pixels[8:] = pixels[8:] // 64 * 85
    pixels[14] = pixels[14, :, :, :1]
    return [Image.fromarray(each[:, :, 0] if channels == 1 else each) for each in pixels]


@pytest.mark.parametrize("amount", [-0.4, -0.1, 0.0, 0.03, 0.4, 0.5])
@pytest.mark.parametrize(
    ("kind", "channels"), [(kind, channels) for kind in range(4) for channels in (1, 3, 4) if kind < 2 or channels > 1]
)
def test_a_change_of_colour_is_pillows(kind, amount, channels):
    view = DINOCrop(SIZE, (0.4, 1), **levels(channels), blur=0)
    draws = [Draw(WHOLE, bool(row % 2), ((kind, amount),)) for row in range(16)]
    assert difference(view, colourful(channels), draws).max() == 0


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_changes_are_applied_in_order_and_to_their_rows(channels):
    """Rows of one batch with none, some and all changes, in many orders, grey and solarised or not."""
    view, rng = DINOCrop(SIZE, (0.4, 1), **levels(channels), blur=0), np.random.default_rng(3)
    images, kinds = colourful(channels) * 4, 2 if channels == 1 else 4
    draws = [
        Draw(
            WHOLE,
            bool(rng.integers(2)),
            tuple((int(kind), float(rng.uniform(-0.4, 0.4))) for kind in rng.permutation(kinds)[: rng.integers(5)]),
            grey=channels > 1 and bool(rng.random() < 0.3),
            solarise=bool(rng.random() < 0.3),
        )
        for _ in images
    ]
    assert difference(view, images, draws).max() == 0


@pytest.mark.parametrize("deviation", [0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [(24, 32), (5, 3), (1, 1)])
def test_blur_is_pillows_gaussian(deviation, size):
    height, width = size
    view, whole = DINOCrop(size, (0.4, 1), **levels(3), blur=0), (0, 0, width, height)
    draws = [Draw(whole, bool(row % 2), blur=deviation if row % 3 else 0.0) for row in range(30)]
    found = difference(view, [picture(row, height, width, 3, soft=False) for row in range(30)], draws)
    assert found[::3].max() == 0
    assert found.max() <= 3
    assert found.mean() < 0.25


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_without_resizing_and_flips_are_exact(channels):
    """Without resizing no level may change, for any sizes of the other images."""
    view, images = RandomCropFlip((6, 8), (0.1, 1), **levels(channels)), pictures(channels)
    draws = [
        Draw((row % (image.width - 7), row % (image.height - 5), 8, 6), bool(row % 2))
        for row, image in enumerate(images)
    ]
    assert difference(view, images, draws).max() == 0


SOURCES = {"smaller": (12, 14), "equal": (32, 32), "larger": (90, 70), "mixed": None}


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "scale"), [(32, (0.2, 1.0)), ((16, 24), (0.05, 0.4))])
def test_crops_equal_pillows_within_one_level(size, scale, channels, source):
    found = difference(RandomCropFlip(size, scale, **levels(channels)), pictures(channels, source=SOURCES[source]))
    assert found.max() <= 2
    shrinks = source in ("larger", "mixed") or size != 32  # and so may have been resized in the other order
    assert found.mean() < (0.12 if shrinks else 0.01)


@pytest.mark.parametrize("source", list(SOURCES))
def test_crops_with_alpha_equal_pillows(source):
    """Pillow resizes colour times alpha, so an error of one level grows as alpha decreases."""
    images = pictures(4, source=SOURCES[source])
    found = difference(RandomCropFlip(32, (0.2, 1.0), **levels(4)), images)
    assert found[:, 3].max() <= 2
    assert found.max() <= 2 * 255 / 40 + 2
    assert found.mean() < 0.05


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "scale", "settings"),
    [
        (32, (0.4, 1), {"blur": 0.0}),
        (32, (0.4, 1), {"blur": 1.0}),
        (16, (0.05, 0.4), {"blur": 0.5, "solarise": 0.2}),
    ],
    ids=["sharp", "blurred", "small"],
)
def test_crops_with_changes_of_colour_equal_pillows(size, scale, settings, channels, source):
    """HSV of 8 bits, saturation and alpha magnify single levels, and solarisation maps 127 and 128 to one level."""
    view = DINOCrop(size, scale, **levels(channels), **settings)
    found = difference(view, pictures(channels, source=SOURCES[source]))
    assert found.mean() < 0.12
    assert (found > 3).float().mean() < 0.004
    assert found.max() <= (16 if channels == 4 else 8)


def test_clamping_between_width_and_height():
    """Bicubic exceeds 0 to 255 on noise, and Pillow 13 resizes a decreasing height first, in contrast to `render`."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)) for _ in range(40)]
    wide = [Draw((5, 10, 40, 20), False)] * 40
    assert difference(RandomCropFlip(32, (0.2, 1), **levels(3)), images, wide).max() <= 2
    tall = [Draw((5, 0, 20, 60), False)] * 40
    assert difference(RandomCropFlip(32, (0.2, 1), **levels(3)), images, tall).mean() < 1


def test_normalisation_is_that_of_the_workers():
    images, mean, std = colourful(3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    assert difference(RandomCropFlip(SIZE, (0.2, 1), mean, std), images, [Draw(WHOLE, False)] * 16).max() == 0
    with pytest.raises(ValueError, match="channels"):
        Drawn.collate(images, [[Draw(WHOLE, False)] * 16], [RandomCropFlip(SIZE, (0.2, 1), (0.5,), (0.5,))]).render(
            "cpu"
        )


def drawn(images: list[Image.Image], crops: list[RandomCropFlip], first: int = 0) -> Drawn:
    draws: list[list[Draw]] = [[] for _ in crops]
    for row, image in enumerate(images):
        for number, crop in enumerate(crops):
            seed_randomness(4, first + row, number)
            draws[number].append(crop.draw(*image.size, image.mode))
    return Drawn.collate(images, draws, crops)


CROPS = [
    DINOCrop(32, (0.4, 1), **levels(3), blur=1.0),
    DINOCrop((16, 24), (0.1, 0.4), **levels(3), blur=0.5, solarise=0.2),
    RandomCropFlip(32, (0.2, 1), **levels(3)),
    DINOCrop((16, 24), (0.1, 0.4), (0.5,) * 3, (0.25,) * 3, blur=0.5),
]


def test_views_of_several_sizes_keep_their_order():
    images = pictures(3, 10)
    together = drawn(images, CROPS).render("cpu")
    assert [view.shape for view in together] == [(10, 3, *size) for size in [(32, 32), (16, 24)] * 2]
    for number, view in enumerate(CROPS):
        for row, image in enumerate(images):
            seed_randomness(4, row, number)
            assert ((together[number][row] - view(image)).abs() / view.normalise.factor.item(0)).mean() < 1


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_view_does_not_depend_on_its_batch(precision):
    """Bit for bit: rows alone, with images of other sizes, and with reduced precision of the run's products."""
    images = pictures(3, 12)
    together = drawn(images, CROPS).render("cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [drawn(images[row : row + 1], CROPS, first=row).render("cpu") for row in range(12)]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for number, view in enumerate(together):
        assert torch.equal(view, torch.cat([part[number] for part in parts]))


def test_products_have_full_precision(monkeypatch):
    """By the settings of torch, since this hardware may not round."""
    seen = []

    def noted(pixels, weights):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return product(pixels, weights)

    product = render._product
    monkeypatch.setattr(render, "_product", noted)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        drawn(pictures(3, 2), CROPS).render("cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("ieee", "ieee")}


@pytest.mark.parametrize("size", [2, 17, 32, 64, 500])
def test_sums_are_exact_in_float32(size):
    """Weights are integers, and with pixels of 255 no partial sum of their products reaches 2^24."""
    first, length = torch.tensor([0.0, 1.0, size // 4]), torch.tensor([size, 1, size // 2])
    kinds = [render._bicubic(first, length, out, size, first * 0) for out in (1, 7, 16, 32, 96)]
    kinds += [render._box(torch.linspace(0, 3, 50).view(-1, 1, 1), size)]
    for weights in kinds:
        assert torch.equal(weights, weights.round())
        assert 255 * weights.abs().sum(-1).max() < 2**24
        assert ((weights.sum(-1) / 2**15 - 1).abs() < 2e-3).all()


def test_rendering_does_not_synchronise_with_the_device(monkeypatch):
    """A meta tensor has no values, so a synchronisation fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    alpha = DINOCrop(16, (0.4, 1), **levels(4), blur=0.5)
    for batch in (drawn(pictures(3, 8), CROPS), drawn(pictures(4, 8), [alpha])):
        there = batch.render("meta")
        assert [view.shape for view in there] == [view.shape for view in batch.render("cpu")]
        assert {view.device.type for view in there} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_views():
    batch = drawn(pictures(3), CROPS).pin_memory()
    for ours, theirs in zip(batch.render("cuda"), batch.render("cpu")):
        assert ((ours.cpu() - theirs).abs() > 1e-3).float().mean() < 1e-3


def test_hues_of_all_colours():
    """Against Pillow for every second level of red, green and blue; float32 may truncate a few differently."""
    wrong = 0
    for red in range(0, 256, 15):
        pixels = np.stack(np.broadcast_arrays(red, *np.ogrid[0:256:2, 0:256:2]), -1).astype(np.uint8)
        amount = (red - 128) / 256
        expected = torch.from_numpy(np.array(views._hue(Image.fromarray(pixels), amount))).permute(2, 0, 1)
        turn = torch.tensor(float(int(amount * 255) % 256)).view(1, 1, 1, 1)
        found = render._turn_hue(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), turn)[0]
        wrong += (found != expected).sum().item()
    assert wrong < 10


def test_other_views_are_refused():
    class Own(RandomCropFlip):
        pass

    assert require_renderable(CROPS) == CROPS
    for view in (CenterCrop(32, **levels(3)), Own(32, (0.2, 1), **levels(3))):
        with pytest.raises(
            UserError, match=rf"data\.augment = device: {type(view).__name__} .* set data\.augment to workers"
        ):
            require_renderable([*CROPS, view])


def test_thin_images_do_not_increase_the_padding_without_limit():
    """A strip of 1 x 20,000 pixels beside one of 20,000 x 1 would pad every image of a batch to 400 million pixels."""
    images = [picture(0, 1, 20_000, 3), picture(1, 20_000, 1, 3), picture(2, 40, 30, 3)]
    view = RandomCropFlip(24, (0.2, 1), **levels(3))
    draws = []
    for row, image in enumerate(images):
        seed_randomness(1, row, 0)
        draws.append(view.draw(*image.size, image.mode))
    drawn = Drawn.collate(images, [draws], [view])
    assert max(drawn.images.shape[2:]) <= 1024
    (found,) = drawn.render("cpu")
    assert found.isfinite().all()
    assert abs(found.mean() - 127) < 30
    assert (found[2] - view.apply(images[2], draws[2])).abs().max() < 2, "an image of a usual size is not reduced"


def test_a_reduced_image_gives_nearly_the_same_views():
    image = picture(3, 900, 3000, 3).resize((3000, 900), Image.Resampling.BICUBIC, (0, 0, 300, 90))
    view = RandomCropFlip(24, (0.2, 1), **levels(3), flip=False)
    for seed in range(5):
        seed_randomness(seed, 0, 0)
        draw = view.draw(*image.size, image.mode)
        (found,) = Drawn.collate([image], [[draw]], [view]).render("cpu")
        assert (found[0] - view.apply(image, draw)).abs().mean() < 3
