"""What a file is, told by its content: what is read as a checkpoint, and what other programs' files are called."""

import re
import tarfile
import zipfile
from pathlib import Path

PACKED = "ec2t-packed"  # the metadata entry by which `model_scoring.packing` knows its files
START = 512  # bytes that tell most formats

SAVE = "where its program is, save the weights alone: torch.save(network.state_dict(), FILE)"
UNPACK = "unpack it, and pass the checkpoint that is in it"
STARTS = {  # of files: what they are, and the way out
    b"\x89HDF\r\n\x1a\n": f"is an HDF5 file, as Keras and TensorFlow write it; {SAVE} of the same network in PyTorch",
    b"\x93NUMPY": f"is a NumPy array; {SAVE}",
    b"GGUF": f"is a GGUF file of quantized weights; {SAVE}",
    b"\x1f\x8b": f"is compressed by gzip; {UNPACK}",
    b"BZh": f"is compressed by bzip2; {UNPACK}",
    b"\xfd7zXZ": f"is compressed by xz; {UNPACK}",
    b"\x28\xb5\x2f\xfd": f"is compressed by zstd; {UNPACK}",
    b"7z\xbc\xaf": f"is a 7-Zip archive; {UNPACK}",
    b"Rar!": f"is a RAR archive; {UNPACK}",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run git lfs pull where it was cloned",
}
WEB_PAGE = re.compile(rb"\s*(<\?xml|<!--|<!doctype|<html|<head|<body)", re.IGNORECASE)
ONNX = re.compile(
    rb"\x08[\x01-\x1f](\x12|\x1a|\x22|\x3a|\x42)", re.DOTALL
)  # ir_version, then the producer or the graph


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as the safetensors format does, packed or not; it may still be damaged."""
    return _start(path)[8:9] == b"{"


def is_packed(path: Path) -> bool:
    """Whether the file begins as a packed one does, whatever its name; it may still be damaged."""
    return is_safetensors(path) and f'"{PACKED}"'.encode() in _start(path)[:256]


def foreign(path: Path) -> str | None:
    """What another program's file is, and the way out, as a phrase that follows its name; None where nothing tells."""
    start = _start(path)
    if start.startswith(b"PK"):
        return _zip(path)
    for beginning, phrase in STARTS.items():
        if start.startswith(beginning):
            return phrase
    if WEB_PAGE.match(start):
        return "is a web page, not the file that its link promised; download that again, with its raw address"
    if start.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    if path.suffix == ".onnx" or ONNX.match(start):
        return f"is an ONNX file; {SAVE}"
    if start[4:8] == b"TFL3" or path.suffix in (".pb", ".index", ".meta") or ".data-0000" in path.name:
        return f"is a file of TensorFlow; {SAVE} of the same network in PyTorch"
    if start[257:262] == b"ustar" and tarfile.is_tarfile(path):
        return f"is a tar archive; {UNPACK}"
    return None


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(START)
    except OSError:
        return b""


def _zip(path: Path) -> str | None:
    """Likewise of zip archives; None of those that torch.save writes, and of damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    last = {name.rpartition("/")[2] for name in names}
    load = f"save its weights: torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
    if "constants.pkl" in last or any("/code/__torch__" in name for name in names):
        return f"is a TorchScript archive, a program with its weights; {load}, and pass that file"
    if "data.pkl" in last:
        return None
    if "archive_format" in last or "serialized_exported_program.json" in last:
        load = f"save its weights: torch.save(torch.export.load({path.name!r}).state_dict, 'weights.pt')"
        return f"is a program of torch.export; {load}, and pass that file"
    if names and all(name.endswith(".npy") for name in names):
        return (
            f"is a NumPy archive (.npz); save its arrays as tensors: torch.save({{name: torch.from_numpy(array) "
            f"for name, array in numpy.load({path.name!r}).items()}}, 'weights.pt'), and pass that file"
        )
    if "model.weights.h5" in last:
        return f"is a Keras archive; {SAVE} of the same network in PyTorch"
    listed = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"is a zip archive of other files ({listed or 'none'}); {UNPACK}"


def _json(path: Path) -> str:
    with open(path, "rb") as file:
        is_index = b'"weight_map"' in file.read(2**20)
    if is_index:
        return (
            "is the index of a network in several .safetensors files, not their weights; put these into one: "
            "safetensors.torch.save_file({**load_file(first), **load_file(second)}, FILE), and pass that file"
        )
    return "is a JSON text, not weights; pass the file beside it that holds them"
