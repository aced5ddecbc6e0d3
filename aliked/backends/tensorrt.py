"""Engines of TensorRT and of TensorRT for RTX: read the manifest, check, load, run.

Everything that can be known about an engine is checked before the runtime sees it. The runtime
itself cannot be asked: without a driver it ends the process, and an engine of another version or
GPU is an error in its log at best.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.cuda_memory import ALIGNMENT, CudaGraph, Twin, create_memory
from aliked.backends.tensorrt_library import (
    AMPERE,
    COMPUTE_CAPABILITIES,
    LEAN,
    LIBRARIES,
    RTX,
    TENSORRT,
    THIS_GPU,
    Library,
    journal,
    logger,
    numbers,
    register_plugins,
    settle_tf32,
)
from aliked.errors import InputError, how_to_install
from aliked.features import OUTPUTS, Extractor, Features, check_images, features_of_batch, room_for
from aliked.files import read_file, read_text, sha256, whole_file
from aliked.weights import find_weights

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx

INPUT = "image"
DIRECT = 16  # recorded graphs that read batches where these lie, at most
PATIENCE = 1000  # runs without one of these before the oldest is given up for another
Shape = tuple[int, ...]
Buffers = dict[str, Any]  # of a device, by tensor

# The manifest


def manifest_path(engine: Path) -> Path:
    """Return where the manifest of an engine lies."""
    return engine.with_name(engine.name + ".json")


MANIFEST_TYPES = {  # what running an engine reads
    "sha256": str,
    "library": str,
    "version": str,
    "gpu": (dict, type(None)),
    "compute_capabilities": list,
    "precision": str,
    "tf32": bool,
    "version_compatible": bool,
    "hardware_compatible": bool,
    "max_workspace_size_mib": (int, type(None)),
    "detailed": bool,
    "source": dict,
    "verified": (dict, type(None)),
}


BUILDER = "convert_onnx_to_trt.py"


def read_manifest(engine: Path, builder: str = BUILDER) -> dict:
    """Return the manifest of an engine; `InputError` where it is missing, damaged or another's.

    `builder` is what such engines are built with, for the sentence.
    """
    if not engine.is_file():
        raise InputError(f"{engine} does not exist; build it with {builder}")
    path = manifest_path(engine)
    if not path.exists():
        raise InputError(
            f"{path} is missing, and without it nobody knows for which GPU and TensorRT version "
            f"{engine.name} is; copy it there, or build the engine with {builder}"
        )
    try:
        manifest = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); build the engine again") from error
    if not _is_manifest(manifest):
        raise InputError(f"{path} is not the manifest of an engine; build it with {builder}")
    return manifest


EXPORT_TYPES = {
    "model": str,
    "top_k": int,
    "scores_th": (int, float),
    "n_limit": int,
    "strict": bool,
}


def is_export(export: Any) -> bool:
    """Whether what an export wrote about itself, none of which it has to, has the right types."""
    return isinstance(export, dict) and all(
        isinstance(export[key], kind) for key, kind in EXPORT_TYPES.items() if key in export
    )


def chooses_by_threshold(export: dict) -> bool:
    """Whether a file was exported to give what is above a threshold, not the K best."""
    return export.get("top_k", 0) <= 0


def _is_manifest(manifest: Any) -> bool:
    if not isinstance(manifest, dict):
        return False
    typed = all(
        key in manifest and isinstance(manifest[key], kind) for key, kind in MANIFEST_TYPES.items()
    )
    return typed and _has_known_values(manifest) and _has_known_parts(manifest)


def _has_known_values(manifest: dict) -> bool:
    """Whether library, version and precision are some that an engine can be of."""
    numbered = re.fullmatch(r"\d+(\.\w+)*", manifest["version"])
    known = manifest["library"] in LIBRARIES and manifest["precision"] in ("FP32", "FP16")
    return known and numbered is not None


def _has_known_parts(manifest: dict) -> bool:
    """Whether the GPUs and what the export wrote have the form that is read below."""
    built_on = manifest["gpu"]
    named = built_on is None or all(
        isinstance(built_on.get(key), str) for key in ("name", "compute_capability")
    )
    targets = manifest["compute_capabilities"]
    spelled = all(
        isinstance(target, str) and re.fullmatch(r"SM\d{2,3}", target) for target in targets
    )
    source = manifest["source"]
    found = isinstance(source.get("images"), (str, type(None))) and is_export(source.get("export"))
    return named and spelled and found


def precision_of(manifest: dict) -> str:
    """Return the precision of an engine: "fp16", "fp32", or "tf32" where float32 may be that."""
    precision = manifest["precision"].lower()
    return "tf32" if precision == "fp32" and manifest["tf32"] else precision


def mismatch(manifest: dict, library: Library, device: gpu.Device) -> str | None:
    """Return why the engine of this manifest cannot run in `library` on `device`, or None."""
    built, portable = LIBRARIES[manifest["library"]], manifest["version_compatible"]
    if library is LEAN and built is TENSORRT and not portable:
        return "the lean runtime runs only engines built with --version_compatible"
    if built is not (TENSORRT if library is LEAN else library):
        return f"it was built by {built}; run it with --backend {built.name}"
    refusal = _other_version(manifest["version"], library, portable) or library.refuses(device)
    if refusal:
        return refusal
    return _other_gpu(manifest, device) if built is TENSORRT else _other_target(manifest, device)


def _other_version(built: str, library: Library, portable: bool) -> str | None:
    """Version-compatible engines run on newer versions too, at most one major version up."""
    here = library.version
    if built == here:
        return None
    again = "build it again on this machine"
    if not portable:
        return f"it was built by {library} {built} and this is {here}; {again}"
    ours, theirs = numbers(here), numbers(built)
    if ours >= theirs and ours[0] - theirs[0] <= 1:
        return None
    return (
        f"it was built by TensorRT {built}, and this older or much newer {here} does not read it; "
        f"{again}"
    )


def _other_gpu(manifest: dict, device: gpu.Device) -> str | None:
    built = manifest["gpu"] or {"name": "GPU", "compute_capability": "?"}
    again = "build it again on this machine"
    if manifest["hardware_compatible"]:
        if numbers(device.compute_capability) >= AMPERE:
            return None
        return (
            f"it needs compute capability 8.0, this {device.name} has "
            f"{device.compute_capability}; {again}"
        )
    if (built["name"], built["compute_capability"]) != (device.name, device.compute_capability):
        return (
            f"it was built on a {built['name']} ({built['compute_capability']}) and this is a "
            f"{device.name} ({device.compute_capability}); {again}"
        )
    return None


def _other_target(manifest: dict, device: gpu.Device) -> str | None:
    """TensorRT for RTX builds for the GPUs that were named, by default for Ampere and later."""
    targets = manifest["compute_capabilities"]
    here = numbers(device.compute_capability)
    if here in map(capability_of, targets) if targets else here >= AMPERE:
        return None
    name = f"SM{here[0]}{here[1]}"
    if name not in COMPUTE_CAPABILITIES:
        name = f"{THIS_GPU} on this machine"
    return (
        f"it was built for {describe_targets(targets)} and this is a {device.name} "
        f"({device.compute_capability}); build it again with --compute_capability {name}"
    )


def capability_of(target: str) -> tuple[int, int]:
    """Return the compute capability that a target names: (12, 0) of "SM120"."""
    return int(target[2:-1]), int(target[-1])


def describe_targets(targets: list[str] | tuple[str, ...]) -> str:
    """Return for which GPUs TensorRT for RTX builds an engine, in words."""
    if not targets:
        return "compute capability 8.0 and later"
    return "compute capability " + " and ".join(
        ".".join(map(str, capability_of(target))) for target in targets
    )


# Opening


def open_engine(
    path: Path, manifest: dict, library: Library, device: gpu.Device
) -> "trt.ICudaEngine":
    """Deserialize an engine for `device`, which is current.

    `InputError` for an engine that is truncated, of another library, version or GPU, or that the
    library refuses. Says once where the engine has not been verified.
    """
    reason = mismatch(manifest, library, device)
    if reason:
        raise InputError(f"{path} cannot run here: {reason}")
    if manifest["sha256"] != sha256(path):
        raise InputError(
            f"{path} is truncated or not the file that {manifest_path(path).name} describes; "
            "copy both again, or build the engine again"
        )
    if library is RTX:
        settle_tf32(manifest["tf32"])
    if manifest["verified"] is None and manifest.get("verify_with"):
        _say_unverified(path, manifest["verify_with"])
    return deserialize(path, manifest["version_compatible"], library)


@functools.cache
def _say_unverified(path: Path, command: str) -> None:
    print(f"{path} has not been compared with the model yet: {command}", file=sys.stderr)


def deserialize(path: Path, version_compatible: bool, library: Library) -> "trt.ICudaEngine":
    """Return the engine in a file; `InputError` where the library refuses it."""
    trt = library.load()
    journal().errors.clear()
    register_plugins(library)
    runtime = trt.Runtime(logger(library))
    if library is not RTX:
        runtime.engine_host_code_allowed = version_compatible  # such a file carries a runtime
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(
            f"{library} {trt.__version__} cannot load {path} ({journal().last_words(library)}); "
            "build it again on this machine"
        )
    return engine


class RuntimeCache:
    """What TensorRT for RTX has compiled of an engine for this GPU, kept beside the engine.

    The file is one line of JSON, which says what the rest belongs to, and the library's own
    bytes. One that belongs to another engine, version or GPU, or is damaged, counts as missing
    and is written anew.
    """

    def __init__(
        self,
        config: "rtx.IRuntimeConfig",
        path: Path,
        engine: str,
        version: str,
        device: gpu.Device,
    ) -> None:
        """Read what was kept and have `config` use it; `engine` is the SHA-256 of the engine."""
        self.path = runtime_cache_path(path, version, device)
        self._owner = {"engine": engine, "version": version, "gpu": device.name}
        self._cache = config.create_runtime_cache()
        self._written = ""  # SHA-256 of the bytes in the file
        kept = self._read()
        self.used = kept is not None and self._cache.deserialize(kept)
        if kept and not self.used:
            print(
                f"TensorRT for RTX does not take {self.path} here: compiling again", file=sys.stderr
            )
        config.set_runtime_cache(self._cache)

    def _read(self) -> bytes | None:
        if not self.path.exists():
            return None
        try:
            line, _, kept = read_file(self.path).partition(b"\n")
            header = json.loads(line)
        except (ValueError, RecursionError):  # an `InputError` among them
            header, kept = None, b""
        digest = hashlib.sha256(kept).hexdigest()
        if header != self._owner | {"sha256": digest}:
            print(f"{self.path} is damaged or another engine's: compiling again", file=sys.stderr)
            return None
        self._written = digest
        return kept

    def save(self) -> None:
        """Write what has been compiled since, whole or not at all; say where that cannot be."""
        compiled = bytes(self._cache.serialize())
        digest = hashlib.sha256(compiled).hexdigest()
        if digest == self._written:
            return
        self._written = digest
        header = json.dumps(self._owner | {"sha256": digest}).encode()
        try:
            with whole_file(self.path) as partial:
                partial.write_bytes(header + b"\n" + compiled)
        except (InputError, OSError) as error:
            print(f"every load compiles the engine again: {error}", file=sys.stderr)


def runtime_config(
    rtx: ModuleType, engine: "rtx.ICudaEngine", cuda_graph: bool
) -> "rtx.IRuntimeConfig":
    """Return how TensorRT for RTX compiles an engine for this GPU."""
    config = engine.create_runtime_config()
    if cuda_graph:  # otherwise the graph keeps the kernels that run until better ones are compiled
        strategies = rtx.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return config


def runtime_cache_path(engine: Path, version: str, device: gpu.Device) -> Path:
    """Return where the compiled kernels of an engine are kept, by library version and GPU."""
    card = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-")
    return engine.with_name(f"{engine.name}.{version}-{card}.cache")


# Running


@dataclass(frozen=True)
class Contract:
    """The tensors by which an engine is known, and how to make one that has them."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # at least these
    cure: str


class Engine:
    """One engine on a stream of its own; not for several threads at once.

    Device buffers and their twins in host memory, by tensor name, are made for one set of input
    shapes at a time and used again with every run. All methods but `infer` and `synchronize` are
    called inside `memory.active()`.
    """

    def __init__(
        self,
        path: Path,
        contract: Contract,
        device: str = "auto",
        library: str | None = None,
        memory: str = "torch",
        cuda_graph: bool = False,
        manifest: dict | None = None,
    ) -> None:
        """Load the engine at `path`, which has the tensors of `contract`.

        `library` is "tensorrt", "tensorrt-lean" or "tensorrt-rtx", by default the one that built
        the engine. `memory` is "torch" or "pycuda". `cuda_graph` records the engine's work once
        per set of shapes. `manifest` is the engine's, where the caller has read it. `InputError`
        for an engine that cannot run here.
        """
        self.path, self.cuda_graph = Path(path), cuda_graph
        self.manifest = manifest or read_manifest(self.path)
        self.library = LIBRARIES[library or self.manifest["library"]]
        index, self.gpu = gpu.device(device)  # first: without a driver the library crashes
        self.device = f"cuda:{index}"
        reason = self.library.not_installed()
        if reason:
            raise InputError(f"{self.path} cannot run here: {reason}")
        self._trt = self.library.load()
        self.memory = create_memory(memory, index)
        self.cache: RuntimeCache | None = None
        self.shapes: dict[str, Shape] = {}  # of the inputs, for which all below is made
        self._new_shapes = True  # nothing has run in these shapes yet
        self.buffers: Buffers = {}
        self.twins: dict[str, Twin] = {}
        self._batch: Buffers = {}
        self._graphs: dict[bool, CudaGraph] = {}  # with the inputs copied first, and without
        self._direct: dict[tuple[int, ...], CudaGraph] = {}  # by the inputs' addresses
        self._met: set[tuple[int, ...]] = set()  # addresses that have no graph of their own
        self._without = 0  # runs that found no graph and no room for one
        with self.memory.active():
            self._engine = open_engine(self.path, self.manifest, self.library, self.gpu)
            self._check_contract(contract)
            self.context = self._create_context()
        self.dtypes = {name: self._dtype(name) for name in (*self.inputs, *self.outputs)}

    def _check_contract(self, contract: Contract) -> None:
        """The engine is one of this project's: its tensors have the names and live on the GPU."""
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = self._trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == is_input]
        self.outputs = [name for name in names if name not in self.inputs]
        given, wanted = set(self.inputs), set(contract.inputs)
        if given != wanted or not set(contract.outputs) <= set(self.outputs):
            raise InputError(
                f"{self.path} has inputs {self.inputs} and outputs {self.outputs}, not "
                f"{', '.join(contract.inputs)} and {', '.join(contract.outputs)}; {contract.cure}"
            )
        for name in names:
            if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                raise InputError(f"{self.path} wants {name} in host memory; export it again")

    def _create_context(self) -> "trt.IExecutionContext":
        journal().errors.clear()
        if self.library is RTX:  # compiles the engine for this GPU, or takes what was kept
            config = runtime_config(self._trt, self._engine, self.cuda_graph)
            facts = (self.manifest["sha256"], self._trt.__version__, self.gpu)
            self.cache = RuntimeCache(config, self.path, *facts)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            why = journal().last_words(self.library)
            if self.library is RTX and "memory" not in why.lower():
                raise InputError(
                    f"{self.library} cannot compile {self.path} for this GPU ({why}); build it "
                    "again on this machine"
                )
            raise self._out_of_memory(why)
        if self.cache:
            self.cache.save()
        if self.manifest["detailed"]:  # what the inspector shows is not to cost time here
            context.nvtx_verbosity = self._trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        return context

    def _dtype(self, name: str) -> np.dtype:
        """Element type of a tensor; `InputError` where NumPy does not have it."""
        dtype = self._engine.get_tensor_dtype(name)
        try:
            return np.dtype(self._trt.nptype(dtype))
        except TypeError as error:
            raise InputError(
                f"{name} of {self.path} is {dtype.name}; export it with float32 inputs and outputs"
            ) from error

    def fixed_shape(self, name: str) -> Shape:
        """A tensor's shape in the file, -1 for each dynamic size."""
        return tuple(self._engine.get_tensor_shape(name))

    def limits(self, name: str) -> tuple[Shape, Shape]:
        """The smallest and the largest shape that an input takes."""
        fixed = self.fixed_shape(name)
        if -1 not in fixed:
            return fixed, fixed
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        return tuple(smallest), tuple(largest)

    # One set of input shapes

    def prepare(self, shapes: dict[str, Shape]) -> None:
        """Set the inputs' shapes and make the buffers that go with them, once per set.

        `InputError` for a shape outside the engine's limits, for outputs whose size depends on
        the data, and where the device has no room.
        """
        if shapes == self.shapes:
            return
        for name, shape in shapes.items():
            self._check_shape(name, shape)
        self.memory.synchronize()  # the old buffers may still be written to
        self.shapes, self._graphs = {}, {}
        self._direct, self._met = {}, set()
        journal().errors.clear()
        for name, shape in shapes.items():
            accepted = self.context.set_input_shape(name, shape)
            self._require(accepted, f"the shape {list(shape)} of {name}")
        self._make_buffers(shapes | self._output_shapes())
        self.shapes, self._new_shapes = dict(shapes), True

    def _check_shape(self, name: str, shape: Shape) -> None:
        smallest, largest = self.limits(name)
        inside = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if inside:
            return
        takes = list(smallest) if smallest == largest else f"{list(smallest)} to {list(largest)}"
        what = "the input" if len(self.inputs) == 1 else name
        raise InputError(
            f"{what} is {list(shape)}, but {self.path} takes {takes}; give one of that size, or "
            "build an engine for this one"
        )

    def _output_shapes(self) -> dict[str, Shape]:
        missing = self.context.infer_shapes()
        if missing:
            raise InputError(f"{self.path} needs values for {missing} first; export it again")
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}
        for name, shape in shapes.items():
            if any(size < 0 for size in shape):
                raise InputError(
                    f"the size of {name} in {self.path} depends on the data; export with a fixed "
                    "top_k or n_limit"
                )
        return shapes

    def _make_buffers(self, shapes: dict[str, Shape]) -> None:
        self.buffers.clear()
        self.twins.clear()
        for name, shape in shapes.items():
            self.buffers[name] = self.empty(name, shape)
            self.twins[name] = self._twin(name, self.buffers[name])
            self._set_address(name, self.memory.address(self.buffers[name]))

    def _twin(self, name: str, buffer: Any) -> Twin:
        shape, dtype = tuple(buffer.shape), self.dtypes[name]
        make = functools.partial(self.memory.pinned, shape, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        return Twin(self.memory.address(buffer), shape, nbytes, make)

    def empty(self, name: str, shape: Shape) -> Any:
        """A device buffer in a tensor's type; `InputError` where the device has no room."""
        try:
            return self.memory.empty(shape, self.dtypes[name])
        except MemoryError as error:
            raise self._out_of_memory(str(error), shape[0]) from error

    def _set_address(self, name: str, address: int) -> None:
        self._require(self.context.set_tensor_address(name, address), f"the address of {name}")

    def _require(self, done: bool, what: str) -> None:
        if done:
            return
        why = journal().last_words(self.library)
        if "memory" in why.lower():
            raise self._out_of_memory(why)
        raise InputError(f"{self.library} refuses {what} of {self.path} ({why}); build it again")

    def _out_of_memory(self, why: str, batch: int | None = None) -> InputError:
        """What to do where the device has no room for `batch` images (by default the most)."""
        workspace = self.manifest["max_workspace_size_mib"]
        limit = f"a workspace of {workspace} MiB" if workspace else "no limit on its workspace"
        most = batch or self.limits(self.inputs[0])[1][0]
        return InputError(
            f"out of device memory on {self.gpu.name} ({why}): {self.path} was built with "
            f"{limit} and is to run a batch of {most}; build it with a smaller "
            "--max_workspace_size or a smaller batch, or free the GPU"
        )

    # One run

    def run(self, batch: Buffers) -> None:
        """Enqueue the engine on `batch`, device buffers by input, of the prepared shapes."""
        journal().errors.clear()
        self._batch = batch  # the caller may let go of it before the stream has read it
        copied = any(buffer is not self.buffers[name] for name, buffer in batch.items())
        graph = self._graphs.get(copied)
        if graph:
            addresses = [self.memory.address(batch[name]) for name in self.shapes]
            graph.launch(self.memory.stream, addresses if copied else ())
            return
        for name, buffer in batch.items():
            mine = self.buffers[name]
            # A recorded graph reads where it was recorded; TensorRT wants aligned addresses.
            if buffer is not mine and (self.cuda_graph or self.memory.address(buffer) % ALIGNMENT):
                gpu.copy_async(*self._copy(name, buffer), self.memory.stream)
                buffer = mine
            self._set_address(name, self.memory.address(buffer))
        self._enqueue()
        if self.cache and self._new_shapes:  # kernels may have been compiled for them
            self.memory.synchronize()
            self.cache.save()
        self._new_shapes = False
        if self.cuda_graph:  # the run above has settled what the engine allocates late
            self._graphs[copied] = self._record(batch if copied else {})

    def _copy(self, name: str, buffer: Any) -> tuple[int, int, int]:
        """The copy of an input to the engine's own buffer: target, source and bytes."""
        address = self.memory.address
        return address(self.buffers[name]), address(buffer), self.twins[name].nbytes

    def _enqueue(self) -> None:
        self._require(self.context.execute_async_v3(self.memory.stream), "the execution")

    def _record(self, batch: Buffers) -> CudaGraph:
        """The engine's work as a graph, which begins by copying `batch` to its own buffers."""
        self.memory.synchronize()
        copies = [self._copy(name, batch[name]) for name in self.shapes if name in batch]
        try:
            return CudaGraph(self.memory.stream, self._enqueue, copies)
        except RuntimeError as error:
            raise InputError(
                f"{self.path} cannot be recorded as a CUDA graph ({error}); run it with "
                f"--backend {self.library.name}"
            ) from error

    def infer(self, batch: Buffers) -> Buffers:
        """Enqueue the engine on device buffers by input; returns those of its outputs.

        Not inside `memory.active()`. The next call overwrites what is returned.
        """
        for name, buffer in batch.items():
            dtype = self.dtypes[name]
            if not self.memory.matches(buffer, dtype):
                raise InputError(
                    f"the batch is no contiguous {dtype} buffer of this engine's device and "
                    "memory; make it with to_device"
                )
        graph = self._graphs.get(True)
        if graph and all(self.shapes.get(name) == batch[name].shape for name in batch):
            self._batch = batch
            addresses = tuple(self.memory.address(batch[name]) for name in self.shapes)
            direct = self._direct.get(addresses) or self._record_direct(addresses)
            self.memory.replay(direct or graph, () if direct else addresses)
        else:
            with self.memory.active():
                self.prepare({name: tuple(buffer.shape) for name, buffer in batch.items()})
                self.run(batch)
        return {name: self.buffers[name] for name in self.outputs}

    def _record_direct(self, addresses: tuple[int, ...]) -> CudaGraph | None:
        """A new graph that reads the inputs at these addresses; None where one does not pay yet.

        To change the source of a copy and to copy take longer than anything else that a launch
        does before the engine's first kernel. Whoever passes an address twice will again.
        """
        if addresses not in self._met or any(address % ALIGNMENT for address in addresses):
            if len(self._met) >= 4 * DIRECT:  # the caller's buffers lie elsewhere every time
                self._met.clear()
            self._met.add(addresses)
            return None
        full = len(self._direct) >= DIRECT
        if full:
            self._without += 1
            if self._without % PATIENCE:
                return None
        with self.memory.active():
            for name, address in zip(self.shapes, addresses, strict=True):
                self._set_address(name, address)
            direct = self._record({})  # waits for all that runs
            if full:
                del self._direct[next(iter(self._direct))]
        self._direct[addresses] = direct
        return direct

    def upload(self, arrays: dict[str, np.ndarray]) -> Buffers:
        """New device buffers that hold these arrays, by input, of the prepared shapes."""
        batch = {name: self.empty(name, values.shape) for name, values in arrays.items()}
        twins = {name: self._twin(name, buffer) for name, buffer in batch.items()}
        sent = [twins[name].send(arrays[name], self.memory.stream) for name in arrays]
        self.memory.synchronize()
        del sent, twins  # both could be read until now
        return batch

    @contextlib.contextmanager
    def running(
        self, arrays: dict[str, np.ndarray], outputs: Iterable[str]
    ) -> Iterator[list[np.ndarray]]:
        """Run on arrays by input, of the prepared shapes, while the block does something else.

        The page-locked arrays that the block is given hold these outputs when it has been left;
        the next run overwrites them.
        """
        stream = self.memory.stream
        sent = [self.twins[name].send(values, stream) for name, values in arrays.items()]
        self.run({name: self.buffers[name] for name in self.shapes})
        try:
            yield [self.twins[name].fetch(stream) for name in outputs]
        finally:
            self.memory.synchronize()
            del sent  # they could be read until now

    def synchronize(self) -> None:
        """Wait for the stream; not inside `memory.active()`."""
        with self.memory.active():
            self.memory.synchronize()


def manifest_for(spec: Spec, name: str, builder: str = BUILDER) -> dict:
    """The manifest of the engine `spec.model_path`; `InputError` for another precision, or none."""
    if spec.model_path is None:
        raise InputError(
            f"backend {name} needs an engine; pass --model_path FILE.trt, as written by {builder}"
        )
    manifest = read_manifest(Path(spec.model_path), builder)
    if spec.precision == "fp16" and manifest["precision"] == "FP32":
        raise InputError(f"{spec.model_path} is float32; ask for fp32, or build it of an FP16 file")
    return manifest


EXTRACTOR = Contract(
    (INPUT,),
    OUTPUTS,
    "build it from a file that convert_pytorch_to_onnx.py wrote with its default --io",
)


class TensorRTExtractor(Extractor):
    """An `Engine` of a model: what `infer` returns is overwritten by the next call."""

    @classmethod
    def unavailable(cls, library: str = "tensorrt", memory: str = "torch", **_: Any) -> str | None:
        """Return why engines, or this form of running them, cannot run here, or None."""
        if memory == "pycuda" and importlib.util.find_spec("pycuda") is None:
            return f"the package pycuda is not installed; {how_to_install('pycuda')}"
        return LIBRARIES[library].unavailable()

    @classmethod
    def from_spec(cls, spec: Spec, name: str, **options: Any) -> "TensorRTExtractor":
        """Return the engine `spec.model_path`; `InputError` where it is not of `spec`."""
        manifest = manifest_for(spec, name)
        _check_export(spec, manifest["source"]["export"])
        return cls(
            spec.model_path, spec.top_k, spec.device, name=name, manifest=manifest, **options
        )

    def __init__(
        self,
        path: Path,
        top_k: int = 0,
        device: str = "auto",
        name: str = "tensorrt",
        **options: Any,
    ) -> None:
        """Load the engine at `path`; `options` are those of `Engine`.

        `top_k` > 0 keeps the first `top_k` keypoints. `InputError` for an engine that cannot run
        here.
        """
        self.name, self.engine = name, Engine(path, EXTRACTOR, device, **options)
        self.path, self.device = self.engine.path, self.engine.device
        self.manifest, self.dtype = self.engine.manifest, self.engine.dtypes[INPUT]
        self.top_k = self._check_top_k(top_k)
        self._by_threshold = chooses_by_threshold(self.manifest["source"]["export"])

    def _check_top_k(self, top_k: int) -> int | None:
        rows = self.engine.fixed_shape("scores")[1]
        if 0 < rows < top_k:
            raise InputError(
                f"top_k {top_k} was asked for, but {self.path} gives {rows} keypoints; "
                f"ask for at most {rows}, or export and build with --top_k {top_k}"
            )
        return top_k if top_k > 0 else None

    def limits(self) -> tuple[Shape, Shape]:
        """Return the smallest and the largest shape that the input takes."""
        return self.engine.limits(INPUT)

    def _prepared(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The input of uint8 [B, H, W, 3], in the engine's type and layout, its shape prepared."""
        check_images(images)
        values = images
        if self.dtype != np.uint8:
            values = np.divide(images.transpose(0, 3, 1, 2), np.float32(255))
            values = values.astype(self.dtype, copy=False)
        self.engine.prepare({INPUT: values.shape})
        return {INPUT: values}

    def to_device(self, images: np.ndarray) -> Any:
        """uint8 [B, H, W, 3] RGB to a new buffer of the engine's input type and layout."""
        with self.engine.memory.active():
            return self.engine.upload(self._prepared(images))[INPUT]

    def infer(self, batch: Any) -> dict[str, Any]:
        """`to_device`'s buffer to `keypoints`, `descriptors` and `scores` on the device."""
        found = self.engine.infer({INPUT: batch})
        return {name: found[name] for name in OUTPUTS}

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """uint8 [B, H, W, 3] RGB to each image's `Features`, copies included."""
        with self.engine.memory.active():
            given = self._prepared(images)
            rooms = None  # where a threshold decides, few of the rows are keypoints
            with self.engine.running(given, OUTPUTS) as found:
                rows = [values[:, : self.top_k] for values in found]
                if not self._by_threshold and all(part.dtype == np.float32 for part in rows):
                    rooms = [room_for(*image) for image in zip(*rows, strict=True)]
        return features_of_batch(*(part.astype(np.float32, copy=False) for part in rows), rooms)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.engine.synchronize()


def _check_export(spec: Spec, export: dict) -> None:
    """`InputError` where the engine holds another model, or selects keypoints in another way."""
    model = export.get("model", spec.model)
    if model != spec.model:
        raise InputError(f"{spec.model_path} holds {model}, not {spec.model}; pass --model {model}")
    weights = export.get("weights_sha256")
    if spec.weights and weights and weights != sha256(find_weights(spec.model, spec.weights)):
        raise InputError(
            f"{spec.model_path} was made of other weights than {spec.weights}; export and build it "
            "again, or leave --weights out"
        )
    if not _selects_as(spec, export):
        options = f"--top_k {spec.top_k}"
        if spec.selection.by_threshold:
            options = f"--top_k 0 --scores_th {spec.scores_th} --n_limit {spec.n_limit}"
        raise InputError(
            f"{spec.model_path} was not exported for {options}; export and build it again with "
            "these options, since what it selects is part of it"
        )


def _selects_as(spec: Spec, export: dict) -> bool:
    """Whether an engine selects keypoints as `spec` does; of the best K it may give fewer."""
    if not spec.selection.by_threshold:
        return "top_k" not in export or not chooses_by_threshold(export)
    facts = {"scores_th": spec.scores_th, "n_limit": spec.n_limit}
    same = all(export.get(name) == value for name, value in facts.items())
    return chooses_by_threshold(export) and same and export.get("strict", False) is spec.strict
