"""Write a model repository for Triton Inference Server.

Models: `aliked`, any extractor of this project behind Triton's Python backend, which takes files'
bytes or pixels; `aliked_pair`, two images to features and matches; and with --onnx and --engine the
network alone, in Triton's own runtimes.
"""

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aliked import cli
from aliked.backends import check_runs, get_backend
from aliked.cli import cosine, whole
from aliked.configs import get_config
from aliked.errors import InputError
from aliked.files import open_regular, read_file, real_path, writable_folder
from aliked.options import (
    add_device_option,
    add_model_options,
    add_selection_options,
    extractor_spec,
)
from aliked.weights import find_weights

ROOT = Path(__file__).resolve().parents[1]
MOST_ONNX_BYTES = 2**31  # protobuf's limit
FEATURES = (("keypoints", [-1, 2]), ("scores", [-1]), ("descriptors", [-1, None]))


@dataclass(frozen=True)
class Tensor:
    """An input or output as Triton's configuration has it, without the batch."""

    name: str
    kind: str  # such as "FP32"
    dims: list[int]  # -1 where it varies
    optional: bool = False

    def __str__(self) -> str:
        optional = " optional: true" if self.optional else ""
        return f'{{ name: "{self.name}" data_type: TYPE_{self.kind} dims: {self.dims}{optional} }}'


def config(
    name: str,
    runtime: str,
    inputs: list[Tensor],
    outputs: list[Tensor],
    max_batch: int,
    rest: str = "",
) -> str:
    """The text of a `config.pbtxt`."""
    tensors = [
        f"{side} [\n  " + ",\n  ".join(map(str, given)) + "\n]"
        for side, given in (("input", inputs), ("output", outputs))
    ]
    return "\n".join([f'name: "{name}"', runtime, f"max_batch_size: {max_batch}", *tensors, rest])


def batching(max_batch: int, delay_us: int) -> str:
    """Requests wait `delay_us` for others, to go through together."""
    if max_batch < 2:
        return ""
    return f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}\n"


def instances(count: int, device: str) -> str:
    """How many copies of a model run at a time: of "cuda" on each GPU, of "cuda:N" on that one.

    "auto" leaves it to Triton, which takes the GPUs where there are any.
    """
    name, _, index = device.partition(":")
    kind = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}[name]
    gpus = f" gpus: [ {int(index)} ]" if index else ""
    return f"instance_group [ {{ count: {count} kind: {kind}{gpus} }} ]\n"


def python_rest(settings: dict, environment: Path | None) -> str:
    """What a Python model is told."""
    parameters = {"settings": json.dumps(settings)}
    if environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(real_path(environment))
    return "".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}\n"
        for key, value in parameters.items()
    )


def features(dim: int, suffix: str = "") -> list[Tensor]:
    """The outputs of an image, with descriptors of length `dim`."""
    return [
        Tensor(name + suffix, "FP32", [dim if d is None else d for d in dims])
        for name, dims in FEATURES
    ]


MATCHES = [Tensor("matches", "INT32", [-1, 2]), Tensor("similarity", "FP32", [-1])]


def pair_config(dim: int) -> str:
    """The configuration of `aliked_pair`: `aliked` for each image, then `aliked_matcher`."""
    steps = [
        step(
            "aliked",
            {"image": f"image{i}"},
            {name: f"{name}{i}" for name, _ in FEATURES},
        )
        for i in (0, 1)
    ]
    descriptors = {f"descriptors{i}": f"descriptors{i}" for i in (0, 1)}
    steps.append(step("aliked_matcher", descriptors, {t.name: t.name for t in MATCHES}))
    return config(
        "aliked_pair",
        'platform: "ensemble"',
        [Tensor(f"image{i}", "STRING", [1]) for i in (0, 1)],
        [*features(dim, "0"), *features(dim, "1"), *MATCHES],
        1,
        "ensemble_scheduling { step [\n" + ",\n".join(steps) + "\n] }\n",
    )


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """One model of an ensemble; its tensors by the names that the ensemble gives them."""
    maps = [
        f'{side} {{ key: "{own}" value: "{theirs}" }}'
        for side, names in (("input_map", inputs), ("output_map", outputs))
        for own, theirs in names.items()
    ]
    return f'  {{ model_name: "{model}" model_version: -1 {" ".join(maps)} }}'


def network_tensors(path: Path) -> tuple[Tensor, list[Tensor], bool]:
    """The input and outputs of an exported ONNX file, and whether its batch size is free."""
    import onnx

    content = read_file(path, MOST_ONNX_BYTES)
    try:
        graph = onnx.load_from_string(content).graph
    except Exception as error:  # of protobuf, which has many
        raise InputError(f"{path} cannot be read as an ONNX file; export it again") from error
    kinds = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.UINT8: "UINT8"}

    def tensor(value: "onnx.ValueInfoProto") -> Tensor:
        kind = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
        if kind.elem_type not in kinds:
            raise InputError(f"{path} has a tensor {value.name} that is no float32 or uint8")
        return Tensor(value.name, kinds[kind.elem_type], dims)

    if len(graph.input) != 1:
        raise InputError(f"{path} has {len(graph.input)} inputs; give an export of this project")
    image = tensor(graph.input[0])
    return image, [tensor(value) for value in graph.output], image.dims[0] == -1


def network_config(
    name: str, runtime: str, onnx_path: Path, device: str, args: argparse.Namespace
) -> str:
    """The configuration of the network alone: its tensors are those of the ONNX file."""
    image, outputs, free = network_tensors(onnx_path)
    max_batch = args.max_batch if free else 0
    if free:  # Triton adds the batch itself
        image, *outputs = (Tensor(t.name, t.kind, t.dims[1:]) for t in (image, *outputs))
    rest = batching(max_batch, args.delay_us) + instances(args.instances, device)
    return config(name, runtime, [image], outputs, max_batch, rest)


def write_model(folder: Path, text: str, files: dict[str, Path]) -> None:
    """One model of the repository: its configuration and what its version 1 consists of."""
    version = writable_folder(folder / "1")
    for name, source in files.items():
        try:
            shutil.copyfile(source, version / name)
        except OSError as error:
            raise InputError(f"cannot copy {source} ({error.strerror}); give another") from error
    (folder / "config.pbtxt").write_text(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="python -m serve.repository", description=__doc__)
    parser.add_argument("repository", type=Path, metavar="FOLDER", help="what Triton is given")
    group = parser.add_argument_group("extractor")
    add_model_options(group)
    group.add_argument("--backend", default="pytorch", metavar="NAME")
    group.add_argument("--precision", choices=("fp32", "fp16"), help="of a backend without a file")
    group.add_argument("--model_path", type=Path, metavar="FILE", help="of a backend that runs one")
    add_device_option(group)
    add_selection_options(group)
    group.add_argument("--min_similarity", type=cosine, default=0.75, metavar="COSINE")
    group = parser.add_argument_group("Triton")
    group.add_argument("--onnx", type=Path, metavar="FILE", help="serve it by ONNX Runtime")
    group.add_argument(
        "--engine", type=Path, metavar="FILE", help="serve it by TensorRT, built from --onnx"
    )
    group.add_argument("--max_batch", type=whole(1), default=16, metavar="N")
    group.add_argument(
        "--delay_us", type=whole(0), default=500, metavar="US", help="wait for a batch"
    )
    group.add_argument("--instances", type=whole(1), default=1, metavar="N", help="of each model")
    group.add_argument("--threads", type=whole(1), default=4, metavar="N", help="that decode, each")
    group.add_argument(
        "--environment", type=Path, metavar="DIR", help="virtual environment of the Python models"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Write all models."""
    check_options(args)
    models = python_models(args) | network_models(args)
    parent = writable_folder(args.repository.absolute().parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".repository-") as folder:
        draft = Path(folder) / "models"
        for name, (text, files) in models.items():
            write_model(draft / name, text, files)
        os.replace(draft, args.repository)
    for name in models:
        print(args.repository / name)


def check_options(args: argparse.Namespace) -> None:
    """Raise `InputError` for what Triton would find out only when it loads the models."""
    if args.engine is not None and args.onnx is None:
        raise InputError("the tensors of an engine are those of its ONNX file; pass --onnx as well")
    if args.repository.exists() and any(args.repository.iterdir()):
        raise InputError(f"{args.repository} is not empty; name a new folder")
    check_runs(args.backend, extractor_spec(args))
    backend = get_backend(args.backend)
    if backend.suffix and args.model_path is None:
        raise InputError(
            f"backend {args.backend} runs a file; pass --model_path FILE{backend.suffix}"
        )
    runs_on = {f"backend {args.backend}": backend.devices}
    if args.engine is not None:
        runs_on["--engine"] = ("cuda",)
    for what, devices in runs_on.items():
        if args.device.partition(":")[0] not in ("auto", *devices):
            raise InputError(f"{what} cannot run on {args.device}; pass --device {devices[0]}")
    if args.weights is not None:
        find_weights(args.model, args.weights)
    if args.model_path is not None:
        with open_regular(args.model_path, most_bytes=None):
            pass
    if args.environment is not None and not (args.environment / "bin/activate").is_file():
        raise InputError(
            f"{args.environment} is no virtual environment, which has a file bin/activate; make "
            "one with python -m venv"
        )


Models = dict[str, tuple[str, dict[str, Path]]]  # configuration and files of each, by name


def network_models(args: argparse.Namespace) -> Models:
    """The network alone in Triton's own runtimes, where files are given."""
    models: Models = {}
    if args.onnx is not None:
        runtime = 'backend: "onnxruntime"'
        text = network_config("aliked_onnx", runtime, args.onnx, args.device, args)
        models["aliked_onnx"] = text, {"model.onnx": args.onnx}
    if args.engine is not None:
        runtime = 'platform: "tensorrt_plan"'
        device = "cuda" if args.device == "auto" else args.device
        text = network_config("aliked_tensorrt", runtime, args.onnx, device, args)
        models["aliked_tensorrt"] = text, {"model.plan": args.engine}
    return models


def python_models(args: argparse.Namespace) -> Models:
    """The three models that need the Python backend only."""
    dim = get_config(args.model).dim
    common = {"project": str(ROOT)}
    spec = vars(extractor_spec(args))
    spec = {name: str(real_path(v)) if isinstance(v, Path) else v for name, v in spec.items()}
    extract = common | {"role": "extract", "backend": args.backend, "spec": spec}
    match = common | {"role": "match", "min_similarity": args.min_similarity}
    images = [
        Tensor("image", "STRING", [1], optional=True),
        Tensor("pixels", "UINT8", [-1, -1, 3], optional=True),
    ]
    code = {"model.py": Path(__file__).with_name("model.py")}
    return {
        "aliked": (
            config(
                "aliked",
                'backend: "python"',
                images,
                features(dim),
                args.max_batch,
                batching(args.max_batch, args.delay_us)
                + instances(args.instances, args.device)
                + python_rest(extract | {"threads": args.threads}, args.environment),
            ),
            code,
        ),
        "aliked_matcher": (
            config(
                "aliked_matcher",
                'backend: "python"',
                [Tensor(f"descriptors{i}", "FP32", [-1, dim]) for i in (0, 1)],
                MATCHES,
                1,
                instances(args.instances, "cpu") + python_rest(match, args.environment),
            ),
            code,
        ),
        "aliked_pair": (pair_config(dim), {}),
    }


if __name__ == "__main__":
    cli.run(main, parser())
