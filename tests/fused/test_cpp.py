"""libaliked: its own tests, and its features bit for bit those of the Python launches.

Both run the CUDA sources on the CPU: Python through `cuda_on_host`, the library over a driver that
is a CPU (cpp/tests/fake_driver.cpp). The two share nothing but the sources and launches.def.
"""

import ctypes
import functools
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aliked.fused import cuda_source, kernels, launches, pipeline, weights
from aliked.fused.pack_weights import FORMAT_VERSION, packed_file
from aliked.model import ALIKED
from tests.helpers import cuda_on_host
from tests.helpers.fused_models import random_images, random_model

ROOT = Path(__file__).resolve().parents[2]
# cmake and ninja may be wheels, whose programs lie beside Python.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
ARCHITECTURES = os.environ.get("ALIKED_ARCHITECTURES", "75;90")  # without and with clusters


pytestmark = pytest.mark.slow  # building the library takes a CPU minute, running it another


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """The build folder of the library, its programs and tests."""
    nvcc = find_nvcc()
    for tool, found in {"nvcc": nvcc, "cmake": which("cmake"), "g++": which("g++")}.items():
        if found is None:
            pytest.skip(f"building libaliked needs nvcc, cmake and g++; there is no {tool}")
    folder = tmp_path_factory.mktemp("libaliked")
    ninja = ["-G", "Ninja"] if which("ninja") else []
    options = [f"-DALIKED_NVCC={nvcc}"]
    if ARCHITECTURES != "all":  # CMakeLists.txt knows which those are
        options += [f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURES}"]
    run("cmake", *ninja, "-S", ROOT / "cpp", "-B", folder, *options)
    run("cmake", "--build", folder, "--parallel", str(os.cpu_count()))
    return folder


def which(program: str) -> str | None:
    """Where a program lies, if it is there."""
    return shutil.which(program, path=PATH)


def find_nvcc() -> str | None:
    """`$ALIKED_NVCC`, or that of a toolkit, or of the wheel nvidia-cuda-nvcc."""
    found = os.environ.get("ALIKED_NVCC") or which("nvcc")
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return found
    return found or next((str(f.locate()) for f in files if f.match("bin/nvcc")), None)


def run(*command, **environment) -> str:
    """Output of a command that succeeds."""
    environment = os.environ | {"PATH": PATH} | environment
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_its_own_tests_pass(build):
    run("ctest", "--test-dir", build, "--output-on-failure")


@functools.cache
def kernel_for_the_cpu(build: Path, file: str, constants: frozenset) -> ctypes.CDLL:
    """A source as the library's tests compiled it: the order of the table numbers the builds."""
    rows = [(s, row) for s, builds in launches.table().builds.items() for row in builds]
    for number, (source, row) in enumerate(rows):
        if f"{source}.cu" == file and constants <= row.items():
            return ctypes.CDLL(str(build / "tests" / "kernels" / f"{number}.so"))
    raise KeyError(f"{file} with {sorted(constants)} is not in the table")


def python_features(build, monkeypatch, model, images, selection) -> pipeline.Output:
    """What the half-precision kernels make of images when Python launches them on the CPU."""

    def compiled(file, kernel, constants, device):
        library = kernel_for_the_cpu(build, file, frozenset(constants))
        cluster = dict(constants).get("BLOCKS", 1) if kernel == "deform" else 1
        return lambda grid, block, arguments: cuda_on_host.launch(
            library, kernel, grid, block, arguments, cluster
        )

    monkeypatch.setattr(cuda_source, "compiled", compiled)
    monkeypatch.setattr("aliked.fused.deform.has_clusters", lambda device: True)
    packed = weights.pack(model, torch.float16, images.device)
    with torch.inference_mode():
        return pipeline.extract(images, packed, selection, kernels)


@pytest.mark.parametrize(
    ("selection", "size"),
    [
        (pipeline.Selection(60, 0.2, 0), (45, 70)),  # more than there are in the second image
        (pipeline.Selection(-1, 0.5, 40), (37, 64)),  # threshold mode
        (pipeline.Selection(-1, 1.0, 40, strict=False), (32, 41)),  # none passes: the mean decides
        (pipeline.Selection(-1, 1.0, 40), (32, 41)),  # none passes, none is there
    ],
)
def test_features_are_bit_for_bit_those_of_python(build, tmp_path, monkeypatch, selection, size):
    model = random_model("aliked-t16", selection)
    packed = tmp_path / "packed.safetensors"
    packed.write_bytes(packed_file(model))
    images = random_images(2, *size)
    images[1, :, : size[1] // 2] = 77  # flat: fewer keypoints
    files = []
    for i, image in enumerate(images.numpy()):
        files.append(tmp_path / f"{i}.ppm")
        files[-1].write_bytes(b"P6\n%d %d\n255\n" % (size[1], size[0]) + image.tobytes())
    options = ["--model", packed, "--output", tmp_path, "--top_k", selection.top_k]
    options += ["--scores_th", selection.scores_th, "--n_limit", max(1, selection.n_limit)]
    options += ["--strict", int(selection.strict)]
    libraries = f"{build}/tests/driver:{build}/tests/on_host"
    run(build / "examples" / "aliked_extract", *files, *options, LD_LIBRARY_PATH=libraries)
    expected = python_features(build, monkeypatch, model, images, selection)
    for i in range(2):
        real = (expected.scores[i] > 0).numpy()
        assert real.any() == (selection.scores_th < 1 or not selection.strict)
        for name in ("keypoints", "scores", "descriptors"):
            got = np.load(tmp_path / f"{i}.{name}.npy")
            assert np.array_equal(got, getattr(expected, name)[i].numpy()[real]), name


def test_a_packed_file_is_safetensors_whose_hash_is_that_of_its_content():
    model = random_model("aliked-t16", pipeline.Selection(10, 0.2, 0))
    content = packed_file(model)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header["__metadata__"]["model"] == "aliked-t16" and size % 8 == 0
    ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert ends[0][0] == 0 and ends[-1][1] == len(content) - 8 - size
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ends))
    torch.manual_seed(0)
    pinned = ALIKED("aliked-t16").eval().fold_batch_norm().requires_grad_(False)
    assert packed_file(pinned) == content  # nothing of the day or the machine is in it


def test_a_change_of_the_packing_needs_a_new_format_version():
    model = random_model("aliked-t16", pipeline.Selection(10, 0.2, 0))
    for parameter in model.parameters():  # numbers that tell where each of them went
        count = torch.arange(parameter.numel()) % 251 - 125
        parameter.copy_((count / 128).reshape(parameter.shape))
    content = packed_file(model)
    size = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + size])["__metadata__"]["sha256"]
    assert found == HASHES[FORMAT_VERSION], "raise FORMAT_VERSION, here and in aliked.h"


# Of that file, by format version.
HASHES = {1: "cdb469a1f276a52a61268c5da7d2793c12741dc5737e7aafdb1c4fcc51cceda2"}


def test_every_build_of_the_table_is_one_that_python_would_compile(monkeypatch):
    """Python's constants come from the table, so only what no model wants could be wrong."""
    wanted = set()

    def compiled(file, kernel, constants, device):
        wanted.add((file, frozenset(constants)))
        return lambda *launch: None

    monkeypatch.setattr(cuda_source, "compiled", compiled)
    for name in ("aliked-t16", "aliked-n16", "aliked-n32"):
        for top_k in (100, 20000):
            for size, clusters in [((64, 96), True), ((64, 96), False), ((1280, 1920), True)]:
                monkeypatch.setattr(
                    "aliked.fused.deform.has_clusters", lambda device, c=clusters: c
                )
                selection = pipeline.Selection(top_k, 0.2, 0)
                packed = weights.pack(
                    random_model(name, selection), torch.float16, torch.device("meta")
                )
                images = torch.empty(2, *size, 3, dtype=torch.uint8, device="meta")
                ops = {op: getattr(kernels, op).__wrapped__ for op in kernels.__all__}
                pipeline.extract(images, packed, selection, type("Ops", (), ops))
    for source, builds in launches.table().builds.items():
        if source in ("mean", "match"):  # not of the pipeline: PyTorch's mean; matching
            continue
        for constants in builds:
            kept = frozenset((k, v) for k, v in constants.items() if k != "KIND")
            assert (f"{source}.cu", kept) in wanted, (source, constants)
