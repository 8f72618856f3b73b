"""Image files decoded: whatever they hold, as RGB."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from engine.program.errors import UserError


def open_image(path: str) -> Image.Image:
    """Decode an image file as RGB; UserError with its path where that fails."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if image.mode.startswith("I"):  # 16 bit of grey, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode == "P":  # Pillow warns of a palette with transparency unless that is kept at first
                image = image.convert("RGBA")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: is gone; restore it, or begin a run without it") from None
    except Exception as error:  # decoders raise whatever the damaged bytes lead to
        raise UserError(f"{path}: does not decode as an image ({error}); mend or remove it") from None


def decode_all(files: list[tuple[str, int]], size: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Image files as uint8 `[N, size, size, 3]`, and their labels."""

    def decode(file: tuple[str, int]) -> np.ndarray:
        image = open_image(file[0])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    with ThreadPoolExecutor(threads) as pool:
        images = np.stack(list(pool.map(decode, files)))
    return images, np.array([label for _, label in files])
