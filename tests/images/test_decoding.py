"""What image files hold: turned, deep and transparent ones."""

import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.images.decoding import Box, White, open_image
from helpers import images
from helpers.images import PHOTO, random_image, refusal, write_grey

KINDS = pytest.mark.parametrize("size, suffix", [((8, 8), "png"), (PHOTO, "jpg")], ids=["small", "photographs"])

load = partial(images.load, image_size=8)


def grey_values(path: Path) -> list[int]:
    return np.asarray(open_image(str(path)))[..., 0].ravel().tolist()


# ------------------------------------------------------------------------------------- turned


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_turned_images_become_upright(orientation, suffix, tmp_path):
    """The upper left corner is bright; `turned` is where a camera held otherwise stores it."""
    upright = Image.new("RGB", (48, 32))
    upright.paste("white", (0, 0, 24, 16))
    t = Image.Transpose
    turns = {2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE, 6: t.ROTATE_90}
    turns |= {7: t.TRANSVERSE, 8: t.ROTATE_270}
    turned = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / f"x.{suffix}", exif=exif)
    image = open_image(str(tmp_path / f"x.{suffix}"))
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(upright)).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_turns_nothing(tmp_path):
    random_image().save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03")
    assert np.array_equal(open_image(str(tmp_path / "x.png")), random_image())


# ------------------------------------------------------------------------------------- a part alone


def smooth(path: Path) -> Image.Image:
    """An image without edges, of 1001 by 803 px, as it is read from the file `path` that it is saved as."""
    random_image((7, 5)).resize((1001, 803), Image.Resampling.BICUBIC).save(path, quality=95)
    return open_image(str(path))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size, reduced", [(401, 1), (400, 2), (201, 2), (200, 4), (100, 8), (1, 8)])
def test_a_jpeg_is_decoded_at_the_least_scale_that_holds_enough_pixels(size, reduced, orientation, tmp_path):
    path, box = tmp_path / "x.jpg", Box(101, 2, 901, 802)
    whole, exif = smooth(path), Image.Exif()
    exif[0x0112] = orientation
    whole.save(path, exif=exif, quality=95)
    part = open_image(str(path), part=lambda image: (box, size))
    assert part.size == pytest.approx((800 / reduced, 800 / reduced), abs=1) and min(part.size) >= size
    expected = whole.crop(box)
    if orientation == 6:
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    expected = expected.resize(part.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(part, dtype=int) - np.asarray(expected)).mean() < 4  # at most half a pixel aside


def test_other_files_are_decoded_whole(tmp_path):
    whole = smooth(tmp_path / "x.png")
    box = Box(101, 2, 901, 802)
    assert np.array_equal(open_image(str(tmp_path / "x.png"), part=lambda image: (box, 8)), whole.crop(box))


# ------------------------------------------------------------------------------------- of more than 8 bit


@KINDS
@pytest.mark.parametrize(
    "dtype, white, bits",
    [
        ("uint16", 255, 8),
        ("uint16", 1023, 10),
        ("uint16", 4095, 12),
        ("uint16", 65535, 16),
        ("int32", 4095, 12),
        ("float32", 1, 1),
        ("float32", 255, 8),
        ("float32", 65535, 16),
    ],
)
def test_deep_values_are_scaled_by_what_all_images_hold(dtype, white, bits, size, suffix, make_folders, capsys):
    path = make_folders(size=size, suffix=suffix)
    bright, dark = path / "train" / "cat" / "0.tif", path / "test" / "cat" / "0.tif"
    for file in (bright, dark):
        file.with_suffix(f".{suffix}").unlink()
        rows = np.full(size[::-1], white / 2 if file is dark else white)
        write_grey(file, rows.tolist(), dtype)
    data = load(path)
    kind = "floating-point values" if dtype == "float32" else "grey of more than 8 bit"
    assert f"{path}: 2 images hold {kind}: 0 to {white:,} becomes 0 to 255\n" in capsys.readouterr().out
    for file, expected in ((bright, 255), (dark, 127)):
        image = np.asarray(open_image(str(file), data.val.white if size == PHOTO else None))
        if size == PHOTO:
            assert abs(int(image.min()) - expected) <= 1 and image.min() == image.max()
    if size != PHOTO:
        assert data.train[0][0].min() == 255 and abs(int(data.val[0][0].max()) - 127) <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_upper_half(suffix, tmp_path):
    write_grey(tmp_path / f"x.{suffix}", [[0, 256, 511, 32768, 65535]], "uint16")
    assert grey_values(tmp_path / f"x.{suffix}")[::3] == [0, 128] and grey_values(tmp_path / f"x.{suffix}")[1:3] == [
        1,
        1,
    ]


@pytest.mark.parametrize("dtype", [">u2", "<u2", "<i4", "<f4"])
def test_the_order_of_bytes_does_not_matter(dtype, tmp_path):
    values = np.array([[0, 0x8000, 0xFFFF]])
    mode = {">u2": "I;16B", "<u2": "I;16", "<i4": "I", "<f4": "F"}[dtype]
    Image.frombytes(mode, (3, 1), values.astype(dtype).tobytes()).save(tmp_path / "x.tif")
    white = White(top=65535)
    assert np.asarray(open_image(str(tmp_path / "x.tif"), white))[0, :, 0].tolist() == [0, 128, 255]


def test_a_negative_of_16_bit_becomes_positive(tmp_path):
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    for photometric, expected in ((1, [0, 255]), (0, [255, 0])):
        image.save(tmp_path / "x.tif", tiffinfo={262: photometric})
        assert grey_values(tmp_path / "x.tif") == expected


@KINDS
@pytest.mark.parametrize(
    "values, dtype, said",
    [
        ([-5, 300], "int32", "holds values from -5 to 300, not from 0 to at most 65535"),
        ([0, 70000], "int32", "holds values from 0 to 70000, "),
        ([-1, 1], "float32", "holds values from -1 to 1, "),
        ([0, float("nan")], "float32", "holds values from nan to nan, "),
        ([0, float("inf")], "float32", "holds values from 0 to inf, "),
        ([0, 1.25], "float32", "holds values from 0 to 1.25, and 1 or 255 should be white"),
    ],
)
def test_values_that_can_not_be_scaled_are_refused_by_name(values, dtype, said, size, suffix, make_folders):
    path = make_folders(size=size, suffix=suffix)
    write_grey(path / "train" / "dog" / "odd.tif", [values], dtype)
    assert refusal(path).startswith(f"{path}/train/dog/odd.tif: {said}")


def png(path: Path, values: np.ndarray) -> None:
    """Write 16-bit colours `[H, W, 3]`, which Pillow can't."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


@KINDS
@pytest.mark.parametrize("white, refused", [(4095, True), (65535, False)])
def test_colours_of_12_bit_in_16_are_refused_and_those_of_16_are_not(
    white, refused, size, suffix, make_folders, capsys
):
    path = make_folders(size=size, suffix=suffix)
    png(path / "train" / "dog" / "deep.png", np.full((*size[::-1], 3), white))
    if refused:
        assert refusal(path).startswith(
            f"{path}/train/dog/deep.png: holds colours of less than 16 bit as 16-bit values"
        )
    else:
        assert load(path).num_train_images == 5
        assert "1 images hold colours of 16 bit: 0 to 65,535 becomes 0 to 255" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- transparent


TRANSPARENT = {
    "rgba.png": lambda path: Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path),
    "rgba.webp": lambda path: Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path, lossless=True),
    "rgba.tif": lambda path: Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path),
    "la.png": lambda path: Image.new("LA", (8, 8), (0, 0)).save(path),
    "palette.png": lambda path: Image.new("P", (8, 8), 0).save(path, transparency=0),
    "colour key.png": lambda path: Image.new("RGB", (8, 8), (1, 2, 3)).save(path, transparency=(1, 2, 3)),
    "grey key.png": lambda path: Image.new("L", (8, 8), 7).save(path, transparency=7),
    "1 bit key.png": lambda path: Image.new("1", (8, 8), 0).save(path, transparency=0),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_white(name, tmp_path):
    TRANSPARENT[name](tmp_path / name)
    assert np.asarray(open_image(str(tmp_path / name))).min() == 255


def test_what_is_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 100, 255, 128)).save(tmp_path / "x.png")
    assert np.asarray(open_image(str(tmp_path / "x.png"))).ravel().tolist() == [127, 177, 255]
