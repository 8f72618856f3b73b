#!/usr/bin/env python3
"""Count torchvision's classification networks and timm's, one a family, and compare with what torch counts.

    python benchmarks/architectures.py > docs/architectures.md

timm is optional: `pip install timm`; without it, torchvision's alone are counted. `--models` picks some by name. Every
network has its builder's random weights, with no zero among them, and is counted in a process of its own.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rulers

TIMM = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224 convit_tiny convmixer_768_32
    convnext_atto crossvit_tiny_240 cspresnet50 davit_tiny deit3_small_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn68
    edgenext_xx_small efficientformer_l1 efficientnet_lite0 efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_100 hiera_tiny_224 hrnet_w18_small inception_v4 lcnet_050 levit_128s
    mambaout_femto mixer_s32_224 mobilevit_s mvitv2_tiny nest_tiny pit_ti_224 poolformer_s12 pvt_v2_b0 repvit_m1
    res2net50_26w_4s resnest14d resnetv2_50 rexnet_100 sequencer2d_s skresnet18 swinv2_cr_tiny_ns_224 tnt_s_patch16_224
    tresnet_m twins_svt_small vit_relpos_small_patch16_224 visformer_tiny volo_d1_224 xception41 xcit_nano_12_p16_224
""".split()  # one a family
COMMAND = "python benchmarks/architectures.py > docs/architectures.md"
HEADERS = (
    *("network", "multiplications", "less than torch", "parameters", "not used", "uncounted", "by analogy"),
    *("seconds", "MiB", "peak"),
)
REPEATED = ("timm:convit_tiny", "timm:edgenext_xx_small", "timm:sequencer2d_s")  # ahead, but once an image
FEW_VALUES = ("timm:tresnet_m",)
# So that no network pays for what torch imports to trace one.
WARM_UP = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
HEAD = """\
# Architectures

What the `challenge` ruler counts of torchvision's classification networks and of timm's, one a family, for one image:

    {command}

- **multiplications** of convolutions, linear layers and products of features, and how many fewer these are than
  `torch.utils.flop_counter.FlopCounterMode` counts; "ahead" are products that don't depend on the image (position
  biases, the first step of an LSTM from zeros), which are computed ahead of inference. Their number is that of the
  products which torch counts once for two images; ConViT, EdgeNeXt and Sequencer repeat theirs for each image, and
  there it is that of the layers' sizes, by hand. "Few values" are those of TResNet's blurring filters, three in each:
  what they multiply is added up first, so that nine products are three.
- **parameters** of the network, and those that no operation of it reads: classifiers beside the network's end, which
  run in training only.
- **uncounted**: operations that have no rule. **by analogy**: share of the operations that the challenge's rules don't
  name.
- **seconds** of one core, for all rulers together; **MiB** of the network, and the **peak** of memory above it.

Versions: torch {torch}, torchvision {torchvision}{timm}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="such as 'vgg*' 'timm:*'")
    args = parser.parse_args()
    names = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    if importlib.util.find_spec("timm"):
        names += [f"timm:{name}" for name in TIMM]
    else:
        print("timm is not installed: its networks are left out (pip install timm)", file=sys.stderr)
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in args.models)]
    print(HEAD.format(command=COMMAND, **versions()))
    for line in (HEADERS, ["---"] + ["---:"] * (len(HEADERS) - 1)):
        print("|", " | ".join(line), "|")
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            print("|", " | ".join(pool.submit(row, name).result()), "|", flush=True)


def versions() -> dict[str, str]:
    timm = f", timm {importlib.metadata.version('timm')}" if importlib.util.find_spec("timm") else ""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm}


def row(name: str) -> list[str]:
    """Build a network, count it on every ruler, and let torch count it: the cells of its row."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rulers.count(WARM_UP, 8)
    network, side = built(name)
    params = sum(parameter.numel() for parameter in network.parameters())
    size = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    before = memory_now()
    start = time.process_time()
    tally = rulers.count(network, side)["challenge"]
    seconds = time.process_time() - start
    more = memory_at_most() - before
    groups = [group for group in tally.groups if group.name in ("convolutions", "linear layers")]
    mults = int(sum(group.total("mults") for group in groups))
    one, two = (torch_mults(network, side, batch) for batch in (1, 2))
    less = one - mults
    ahead = less == 2 * one - two or name in REPEATED
    note = "" if not less else " (ahead)" if ahead else " (few values)" if name in FEW_VALUES else " (?)"
    return [
        name.rpartition(":")[2],
        f"{mults:,}",
        f"{less:,}{note}",
        f"{params:,}",
        f"{params - tally.numel:,}",
        ", ".join(sorted({one.operation for one in tally.uncounted})) or "none",
        f"{sum(tally.by_analogy.values()) / tally.total_mflop:.1%}",
        f"{seconds:.2f}",
        f"{size / 2**20:,.0f}",
        f"{more / size:+.0%}",
    ]


def built(name: str) -> tuple[nn.Module, int]:
    """A network without zeros among its weights, and the side of its images in pixels."""
    library, _, name = name.partition(":")
    if library == "timm":
        import timm

        network = timm.create_model(name)
        side = network.pretrained_cfg["input_size"][-1]
    else:
        network = torchvision.models.get_model(name, weights=None)
        side = min(weights.transforms().crop_size[0] for weights in torchvision.models.get_model_weights(name))
    for parameter in network.parameters():
        zero = parameter.data == 0
        parameter.data[zero] = torch.rand(int(zero.sum())) + 0.1
    return network.eval().requires_grad_(False), side


def torch_mults(network: nn.Module, side: int, batch: int) -> int:
    """What `FlopCounterMode` counts, which is two operations for each multiplication.

    It sees nothing of torch's fused attention for inference, so that is switched off. Tensors without values, which
    take no time, do unless the network's code looks at them.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    for device in ("meta", "cpu"):
        tensors = {name: tensor.to(device) for name, tensor in network.state_dict().items()}
        images = torch.zeros(batch, 3, side, side, device=device)
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
                torch.func.functional_call(network, tensors, images, tie_weights=False)
            break
        except (RuntimeError, NotImplementedError):
            continue
    return counter.get_total_flops() // 2


def memory_now() -> int:
    """The bytes that this process has; its peak is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def memory_at_most() -> int:
    """The most bytes that it had since then."""
    return status("VmHWM")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
