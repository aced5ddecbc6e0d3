"""Write the weights file that libaliked reads (docs/cpp.md has its format, byte by byte).

    python -m aliked.fused.pack_weights --model aliked-n16rot --output aliked-n16rot.safetensors

The file is safetensors. Its tensors are what the half-precision kernels read, in the order in which
they read it (`fragments.py`): the C++ side copies them to the GPU as they are.
"""

import argparse
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from aliked import cli
from aliked.configs import CONFIGS, get_config
from aliked.errors import InputError
from aliked.files import sha256, whole_file
from aliked.fused.weights import Weights, pack
from aliked.model import ALIKED
from aliked.weights import SAFETENSORS, find_weights

FORMAT = "aliked-fused"
FORMAT_VERSION = 1  # ALIKED_FORMAT_VERSION in aliked.h: what the kernels read has changed with it
TYPES = {torch.float16: "F16", torch.float32: "F32"}


def named_tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """What the half-precision kernels read, and how the file calls it."""
    first, second, third, fourth = weights.convs
    yield "block1.fragments", weights.blocks[0]
    yield "block1.stem_bias", first.bias
    yield "block1.bias", second.bias
    yield "block2.fragments", weights.blocks[1]
    yield "block2.first_bias", third.bias
    yield "block2.bias", fourth.bias
    for i, layer in enumerate(weights.deforms):
        yield f"deform{i + 1}.fragments", layer.fragments
        yield f"deform{i + 1}.offset_bias", layer.offset_bias
        yield f"deform{i + 1}.bias", layer.bias
        if i % 2:  # ends a block: the level's share of the score head
            yield f"deform{i + 1}.score_weight", weights.levels[2 + i // 2].score_weight
    yield "score_head.fragments", weights.score_head.fragments
    yield "score_head.first_bias", weights.score_head.first_bias
    yield "score_head.second_bias", weights.score_head.second_bias
    offsets, samples = weights.descriptor
    yield "descriptor.level_fragments", offsets.level_fragments
    yield "descriptor.patch_fragments", offsets.patch_fragments
    yield "descriptor.patch_bias", offsets.patch_bias
    yield "descriptor.offset_bias", offsets.offset_bias
    yield "descriptor.sample_fragments", samples.sample_fragments


def packed_file(model: ALIKED, source_sha256: str = "") -> bytes:
    """The file's content for a float32 model whose batch norms are folded."""
    config = get_config(model.name)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": model.name,
        "channels": ",".join(map(str, config.channels)),
        "dim": str(config.dim),
        "positions": str(config.num_positions),
        "source_sha256": source_sha256,  # of the PyTorch weights
    }
    header, data = {}, b""
    lines = "".join(f"{key}={value}\n" for key, value in metadata.items())
    for name, tensor in named_tensors(pack(model, torch.float16, torch.device("cpu"))):
        content = tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<")).tobytes()
        kind, shape = TYPES[tensor.dtype], list(tensor.shape)
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        lines += " ".join([name, kind, *map(str, shape)]) + "\n"
        data += content
    metadata["sha256"] = hashlib.sha256(lines.encode() + data).hexdigest()
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text + data


def write_packed(model: str, output: Path, weights: Path | None = None) -> None:
    """Write the file for the variant `model`; `weights` as in `ALIKED.from_pretrained`."""
    network = ALIKED.from_pretrained(model, weights=weights)
    content = packed_file(network, sha256(find_weights(model, weights)))
    with whole_file(output) as partial:
        partial.write_bytes(content)


def main(args: argparse.Namespace) -> None:
    """Write the file and say where it is."""
    output = args.output or Path(f"{args.model}{SAFETENSORS}")
    if output.suffix != SAFETENSORS or output.is_dir():
        raise InputError(f"--output {output} is not the name of a {SAFETENSORS} file; give one")
    write_packed(args.model, output, args.weights)
    print(f"{output}: {args.model}, format version {FORMAT_VERSION}, {output.stat().st_size} bytes")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m aliked.fused.pack_weights", description=__doc__.splitlines()[0])
    p.add_argument("--model", default="aliked-t16-homography", choices=CONFIGS)
    p.add_argument("--output", type=Path, help="the file (default: MODEL.safetensors)")
    p.add_argument("--weights", type=Path, help="PyTorch weights (default: as everywhere)")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
