"""Opening a TensorRT engine safely: everything that can be known is checked before the runtime.

The runtime itself cannot be asked: without a driver it ends the process, and an engine of another
version or GPU is an error in its log at best."""

import functools
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.cuda_memory import ALIGNMENT, CudaGraph, Memory, create_memory
from aliked.errors import InputError, how_to_install
from aliked.features import OUTPUTS, Extractor, Features, features_of_batch
from aliked.files import sha256
from aliked.threads import copied_parts

if TYPE_CHECKING:
    import tensorrt as trt


SEVERITIES = ("internal_error", "error", "warning", "info", "verbose")


def unavailable(lean: bool = False) -> str | None:
    """Why TensorRT cannot run here and what to do, or None. Loads nothing of it."""
    package = "tensorrt_lean" if lean else "tensorrt"
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed; {how_to_install(package)}"
    return gpu.unavailable()


def runtime_module(lean: bool) -> ModuleType:
    """The bindings: of the whole of TensorRT, or of the lean runtime."""
    if lean:
        import tensorrt_lean as trt
    else:
        import tensorrt as trt
    return trt


@dataclass
class Journal:
    """What TensorRT says: its errors since they were last cleared, the rest on the terminal."""

    errors: list[str] = field(default_factory=list)
    least: str = "warning"  # the least severe level that is printed

    def write(self, level: str, message: str) -> None:
        """Take one message of TensorRT's logger."""
        if level in ("internal_error", "error"):
            self.errors.append(message)
        if SEVERITIES.index(level) <= SEVERITIES.index(self.least):
            print(f"TensorRT {level}: {message}", file=sys.stderr)

    def last_words(self) -> str:
        """What went wrong, for the end of a sentence."""
        return "; ".join(self.errors) or "TensorRT gave no reason"


@functools.cache
def journal() -> Journal:
    """The journal of this process."""
    return Journal()


@functools.cache
def logger(lean: bool = False) -> "trt.ILogger":
    """The one logger of these bindings, since TensorRT keeps the first that it is given."""
    trt = runtime_module(lean)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            journal().write(severity.name.lower(), msg)

    return Log()


def register_plugins(lean: bool = False) -> None:
    """Make the standard plugins known, DeformConv's among them; the lean runtime has none."""
    trt = runtime_module(lean)
    if not hasattr(trt, "init_libnvinfer_plugins"):
        return
    if not trt.init_libnvinfer_plugins(logger(lean), ""):
        raise InputError(
            f"TensorRT's standard plugins do not load ({journal().last_words()}); install "
            "TensorRT again"
        )


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies."""
    return engine.with_name(engine.name + ".json")


def read_manifest(engine: Path) -> dict:
    """The manifest of an engine; `InputError` where it is missing or not readable."""
    path = manifest_path(engine)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, and without it nobody knows for which GPU and TensorRT version "
            f"{engine.name} is; copy it there, or build the engine with convert_onnx_to_trt.py"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); build the engine again") from error


def mismatch(manifest: dict, version: str, device: gpu.Device, lean: bool) -> str | None:
    """Why an engine with this manifest cannot run on this TensorRT version and GPU, or None."""
    built, built_gpu = manifest["tensorrt"], manifest["gpu"]
    portable = manifest["version_compatible"]
    if lean and not portable:
        return "the lean runtime runs only engines built with --version_compatible"
    if built != version and not portable:
        return f"it was built by TensorRT {built} and this is {version}"
    if portable and not _reads(version, built):
        return (
            f"it was built by TensorRT {built}, and this older or much newer {version} does not "
            "read it"
        )
    capability = built_gpu["compute_capability"]
    if manifest["hardware_compatible"]:
        if _numbers(device.compute_capability) >= (8, 0):
            return None
        return (
            f"it needs compute capability 8.0, this {device.name} has {device.compute_capability}"
        )
    if (built_gpu["name"], capability) != (device.name, device.compute_capability):
        return (
            f"it was built on a {built_gpu['name']} ({capability}) and this is a {device.name} "
            f"({device.compute_capability})"
        )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _reads(runtime: str, built: str) -> bool:
    """Version-compatible engines run on newer runtimes, at most one major version up."""
    ours, theirs = _numbers(runtime), _numbers(built)
    return ours >= theirs and ours[0] - theirs[0] <= 1


def open_engine(
    path: Path, device: gpu.Device, lean: bool = False
) -> tuple["trt.ICudaEngine", dict]:
    """Deserialize an engine for `device`, which is current; also its manifest.

    `InputError` for an engine that is missing, truncated, of another TensorRT version, of
    another GPU, or that TensorRT refuses.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; build it with convert_onnx_to_trt.py")
    manifest, trt = read_manifest(path), runtime_module(lean)
    try:
        reason = mismatch(manifest, trt.__version__, device, lean)
        whole = manifest["sha256"] == sha256(path)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{manifest_path(path)} is not the manifest of an engine; build the engine with "
            "convert_onnx_to_trt.py"
        ) from error
    if reason:
        raise InputError(f"{path} cannot run here: {reason}; build it again on this machine")
    if not whole:
        raise InputError(
            f"{path} is truncated or not the file that {manifest_path(path).name} describes; "
            "copy both again, or build the engine again"
        )
    return deserialize(path, manifest["version_compatible"], lean), manifest


def deserialize(path: Path, version_compatible: bool, lean: bool = False) -> "trt.ICudaEngine":
    """The engine in a file; `InputError` where TensorRT refuses it."""
    trt = runtime_module(lean)
    journal().errors.clear()
    register_plugins(lean)
    runtime = trt.Runtime(logger(lean))
    runtime.engine_host_code_allowed = version_compatible  # such a file carries its own runtime
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(
            f"TensorRT {trt.__version__} cannot load {path} ({journal().last_words()}); build it "
            "again on this machine"
        )
    return engine


class Session:
    """Runs an engine of one input. Calls belong inside `memory.active()`; not thread-safe.

    Device buffers and pinned arrays, by tensor name, are made for one input shape at a time and
    used again with every run.
    """

    def __init__(
        self, path: Path, device: gpu.Device, memory: Memory, cuda_graph: bool, lean: bool
    ) -> None:
        self.path, self.device, self.memory = path, device, memory
        self.cuda_graph, self.lean = cuda_graph, lean
        self.engine, self.manifest = open_engine(path, device, lean)
        trt = runtime_module(lean)
        self.inputs = self._tensors(trt.TensorIOMode.INPUT)
        self.outputs = self._tensors(trt.TensorIOMode.OUTPUT)
        self.shape: tuple[int, ...] | None = None  # of the input, for which all below is made
        self.buffers: dict[str, Any] = {}
        self.pinned: dict[str, np.ndarray] = {}
        self.context = self._create_context()
        self._batch: Any = None
        self._graph: CudaGraph | None = None

    def _tensors(self, mode: "trt.TensorIOMode") -> list[str]:
        names = map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        return [name for name in names if self.engine.get_tensor_mode(name) == mode]

    def _create_context(self) -> "trt.IExecutionContext":
        journal().errors.clear()
        context = self.engine.create_execution_context()
        if context is None:
            raise self.out_of_memory(journal().last_words())
        if self.manifest["detailed"]:  # what the inspector shows is not to cost time here
            verbosity = runtime_module(self.lean).ProfilingVerbosity
            context.nvtx_verbosity = verbosity.LAYER_NAMES_ONLY
        return context

    def dtype(self, name: str) -> np.dtype:
        """Element type of a tensor; `InputError` where NumPy does not have it."""
        trt, dtype = runtime_module(self.lean), self.engine.get_tensor_dtype(name)
        try:
            return np.dtype(trt.nptype(dtype))
        except TypeError as error:
            raise InputError(
                f"{name} of {self.path} is {dtype.name}; export it with float32 inputs and outputs"
            ) from error

    def limits(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape that the input takes."""
        (name,) = self.inputs
        fixed = tuple(self.engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed, fixed
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, 0)
        return tuple(smallest), tuple(largest)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Set the input's shape and make the buffers that go with it, once per shape.

        `InputError` for a shape outside the engine's limits, for outputs whose size depends on
        the data, and where the device has no room.
        """
        if shape == self.shape:
            return
        self._check_shape(shape)
        self.memory.synchronize()  # the old buffers may still be written to
        self.shape, self._graph = None, None
        journal().errors.clear()
        (name,) = self.inputs
        self._require(self.context.set_input_shape(name, shape), f"the input shape {list(shape)}")
        self._make_buffers({name: shape, **self._output_shapes()})
        self.shape = shape

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        smallest, largest = self.limits()
        inside = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if inside:
            return
        takes = list(smallest) if smallest == largest else f"{list(smallest)} to {list(largest)}"
        raise InputError(
            f"the input is {list(shape)}, but {self.path} takes {takes}; give images of that "
            "size, or build an engine for this one"
        )

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
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

    def _make_buffers(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.buffers.clear()
        self.pinned.clear()
        for name, shape in shapes.items():
            self.buffers[name] = self.empty(shape, self.dtype(name))
            self.pinned[name] = self.memory.pinned(shape, self.dtype(name))
            self._set_address(name, self.buffers[name])

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A device buffer; `InputError` where the device has no room."""
        try:
            return self.memory.empty(shape, dtype)
        except MemoryError as error:
            raise self.out_of_memory(str(error), shape[0]) from error

    def _set_address(self, name: str, buffer: Any) -> None:
        address = self.memory.address(buffer)
        self._require(self.context.set_tensor_address(name, address), f"the address of {name}")

    def _require(self, done: bool, what: str) -> None:
        if done:
            return
        why = journal().last_words()
        if "memory" in why.lower():
            raise self.out_of_memory(why)
        raise InputError(f"TensorRT refuses {what} of {self.path} ({why}); build it again")

    def out_of_memory(self, why: str, batch: int | None = None) -> InputError:
        """What to do where the device has no room for `batch` images (by default the most)."""
        workspace = self.manifest["max_workspace_size_mib"]
        limit = f"a workspace of {workspace} MiB" if workspace else "no limit on its workspace"
        return InputError(
            f"out of device memory on {self.device.name} ({why}): {self.path} was built with "
            f"{limit} and is to run a batch of {batch or self.limits()[1][0]}; build it with a "
            "smaller --max_workspace_size or a smaller batch, or free the GPU"
        )

    def run(self, batch: Any) -> None:
        """Enqueue the engine on `batch`, a device buffer of the prepared shape."""
        journal().errors.clear()
        self._batch = batch  # the caller may let go of it before the stream has read it
        (name,) = self.inputs
        mine = self.buffers[name]
        # A recorded graph reads where it was recorded; TensorRT wants aligned addresses.
        if batch is not mine and (self.cuda_graph or self.memory.address(batch) % ALIGNMENT):
            self.memory.copy(batch, mine)
            batch = mine
        if self._graph:
            self._graph.launch()
            return
        self._set_address(name, batch)
        self._enqueue()
        if self.cuda_graph:  # the run above has settled what the engine allocates late
            self._record()

    def _enqueue(self) -> None:
        self._require(self.context.execute_async_v3(self.memory.stream), "the execution")

    def _record(self) -> None:
        self.memory.synchronize()
        try:
            self._graph = CudaGraph(self.memory.stream, self._enqueue)
        except RuntimeError as error:
            raise InputError(
                f"{self.path} cannot be recorded as a CUDA graph ({error}); run it without"
            ) from error


INPUT = "image"


class TensorRTExtractor(Extractor):
    """One engine on a stream of its own; not for several threads at once.

    What `infer` returns belongs to the extractor: its next call overwrites it.
    """

    @classmethod
    def unavailable(cls, lean: bool = False, memory: str = "torch", **_: Any) -> str | None:
        """Return why TensorRT, or this form of it, cannot run here and what to do, or None."""
        if memory == "pycuda" and importlib.util.find_spec("pycuda") is None:
            return f"the package pycuda is not installed; {how_to_install('pycuda')}"
        return unavailable(lean)

    @classmethod
    def from_spec(cls, spec: Spec, name: str, **options: Any) -> "TensorRTExtractor":
        """Return the engine `spec.model_path`; `InputError` where it is not of `spec`."""
        if spec.model_path is None:
            raise InputError(
                f"backend {name} needs an engine; pass --model_path FILE.trt, as written by "
                "convert_onnx_to_trt.py"
            )
        _check_export(spec, read_manifest(spec.model_path)["source"]["export"])
        return cls(spec.model_path, spec.top_k, spec.device, name=name, **options)

    def __init__(
        self,
        path: Path,
        top_k: int = 0,
        device: str = "auto",
        memory: str = "torch",
        cuda_graph: bool = False,
        lean: bool = False,
        name: str = "tensorrt",
    ) -> None:
        """Load the engine at `path`.

        `top_k` > 0 keeps the first `top_k` keypoints. `memory` is "torch" or "pycuda".
        `cuda_graph` records the engine's work once per input size. `lean` takes the package
        tensorrt_lean, for version-compatible engines. `InputError` for an engine that cannot run
        here.
        """
        reason = unavailable(lean)
        if reason:
            raise InputError(f"TensorRT cannot run here: {reason}")
        self.name, self.path = name, Path(path)
        index, chosen = gpu.device(device)
        self.memory = create_memory(memory, index)
        with self.memory.active():
            self.session = Session(self.path, chosen, self.memory, cuda_graph, lean)
        self._check_contract()
        self.dtype = self.session.dtype(INPUT)
        self.top_k = self._check_top_k(top_k)

    def _check_contract(self) -> None:
        """The engine is one of this project's: its tensors have the names and live on the GPU."""
        session, trt = self.session, runtime_module(self.session.lean)
        if session.inputs != [INPUT] or not set(OUTPUTS) <= set(session.outputs):
            raise InputError(
                f"{session.path} has inputs {session.inputs} and outputs {session.outputs}, not "
                f"{INPUT} and {', '.join(OUTPUTS)}; build it from a file that "
                "convert_pytorch_to_onnx.py wrote with its default --io"
            )
        for name in (*session.inputs, *session.outputs):
            if session.engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise InputError(f"{session.path} wants {name} in host memory; export it again")

    def _check_top_k(self, top_k: int) -> int | None:
        rows = self.session.engine.get_tensor_shape("scores")[1]
        if 0 < rows < top_k:
            raise InputError(
                f"top_k {top_k} was asked for, but {self.session.path} gives {rows} keypoints; "
                f"ask for at most {rows}, or export and build with --top_k {top_k}"
            )
        return top_k if top_k > 0 else None

    def _stage(self, images: np.ndarray) -> None:
        """Write uint8 [B, H, W, 3] into the pinned input, in the engine's type and layout."""
        uint8 = self.dtype == np.uint8
        values = images if uint8 else images.transpose(0, 3, 1, 2)
        self.session.prepare(values.shape)
        pinned = self.session.pinned[INPUT]
        if uint8:
            list(copied_parts(pinned, values))
        else:
            np.divide(values, np.float32(255), out=pinned, casting="same_kind")

    def to_device(self, images: np.ndarray) -> Any:
        """uint8 [B, H, W, 3] RGB to a new buffer of the engine's input type and layout."""
        with self.memory.active():
            self._stage(images)
            buffer = self.session.empty(self.session.shape, self.dtype)
            self.memory.upload(self.session.pinned[INPUT], buffer)
            self.memory.synchronize()  # the pinned array is used again
        return buffer

    def infer(self, batch: Any) -> dict[str, Any]:
        """`to_device`'s buffer to `keypoints`, `descriptors` and `scores` on the device."""
        if not self.memory.matches(batch, self.dtype):
            raise InputError(
                f"the batch is no contiguous {self.dtype} buffer of this extractor's device and "
                "memory; make it with to_device"
            )
        with self.memory.active():
            self.session.prepare(tuple(batch.shape))
            self.session.run(batch)
        return {name: self.session.buffers[name] for name in OUTPUTS}

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """uint8 [B, H, W, 3] RGB to each image's `Features`, copies included."""
        buffers, pinned = self.session.buffers, self.session.pinned
        with self.memory.active():
            self._stage(images)
            self.memory.upload(pinned[INPUT], buffers[INPUT])
            self.session.run(buffers[INPUT])
            for name in OUTPUTS:
                self.memory.download(buffers[name], pinned[name])
            self.memory.synchronize()
        rows = (pinned[name][:, : self.top_k].astype(np.float32, copy=False) for name in OUTPUTS)
        return features_of_batch(*rows)

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self.memory.active():
            self.memory.synchronize()


def _check_export(spec: Spec, export: dict) -> None:
    """`InputError` where the engine holds another model, or selects keypoints in another way."""
    model = export.get("model", spec.model)
    if model != spec.model:
        raise InputError(f"{spec.model_path} holds {model}, not {spec.model}; pass --model {model}")
    by_threshold = export.get("top_k", 0) <= 0
    if spec.top_k <= 0 and not (by_threshold and export.get("scores_th") == spec.scores_th):
        raise InputError(
            f"{spec.model_path} was not exported for --top_k 0 --scores_th {spec.scores_th}; "
            "export and build it again with these options, since what it selects is part of it"
        )
