"""ONNX Runtime on an exported `.onnx` file: on the CPU, or through a provider for a GPU."""

import contextlib
import ctypes.util
import functools
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.tensorrt_library import HOPPER, numbers, settle_tf32
from aliked.configs import most_rows
from aliked.errors import InputError, first_line, how_to_install, shown
from aliked.features import (
    OUTPUTS,
    Extractor,
    Features,
    check_features,
    check_images,
    check_memory,
    features_of_batch,
)
from aliked.files import as_path, sha256
from aliked.weights import find_weights

METADATA = "aliked."  # before the names of what an export says about itself
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_RTX = "nv_tensorrt_rtx"  # the name that its plugin registers
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
PLUGIN_PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12")
Providers = Sequence[tuple[str, dict[str, str]]]  # names and options, the preferred one first


def provider_missing(provider: str) -> str | None:
    """Why the installed ONNX Runtime cannot run on `provider`, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"the package onnxruntime is not installed; {how_to_install('onnxruntime')}"
    import onnxruntime

    if provider in onnxruntime.get_available_providers():
        return None
    return (
        f"this ONNX Runtime has no {provider}; pip install onnxruntime-gpu in place of onnxruntime"
    )


DEFORM_CONV_SINCE = (1, 25)  # of ONNX Runtime, on the CPU


def deform_conv_missing() -> str | None:
    """Why the installed ONNX Runtime runs no DeformConv, or None; other exports do without."""
    import onnxruntime

    installed = onnxruntime.__version__
    if numbers(installed) >= DEFORM_CONV_SINCE:
        return None
    return f"ONNX Runtime {installed} has no DeformConv; install 1.25 or later"


def cuda_device(device: str) -> str:
    """The number N of "cuda:N", 0 of "cuda" and "auto"; `InputError` for anything else."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda") or not (index or "0").isdecimal():
        raise InputError(f"device {device!r} is not CUDA's; give auto, cuda or cuda:N")
    return index or "0"


def cuda_provider(device: str) -> tuple[str, dict[str, str]]:
    """The CUDA provider and its options for `device`."""
    # TF32 would make "float32" rows something else than float32.
    return CUDA, {"device_id": cuda_device(device), "use_tf32": "0"}


def choose_providers(device: str) -> Providers:
    """The provider for `device`: "auto" takes CUDA's where it is there."""
    if not isinstance(device, str):
        raise InputError(f"the device is {shown(device)}; give auto, cpu, cuda or cuda:N")
    missing = provider_missing(CUDA)
    if device == "cpu" or (device == "auto" and missing):
        return [(CPU, {})]
    chosen = cuda_provider(device)
    if missing:
        raise InputError(f"device {device} was asked for, but {missing}, or pass --device cpu")
    return [chosen]


def place_of(provider: str, options: Mapping[str, str]) -> tuple[str, int]:
    """Where a provider keeps its tensors: "cpu" or "cuda", and which of them."""
    return ("cpu", 0) if provider == CPU else ("cuda", int(options["device_id"]))


def device_of(kind: str, index: int) -> str:
    """The device of a place, as `Extractor.device` names it."""
    return kind if kind == "cpu" else f"{kind}:{index}"


def load_cuda_libraries() -> None:
    """Load CUDA's and cuDNN's libraries from their pip packages, which no loader searches.

    Where PyTorch is imported, its own are used. What is missing shows when the provider does not
    load.
    """
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # since ONNX Runtime 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot find
            onnxruntime.preload_dlls()


def open_session(path: Path, provider: str, options: dict[str, str], others: Providers = ()):
    """An inference session on `provider`; nodes that it does not take go to `others`, then the CPU.

    `InputError` where `provider` does not load: ONNX Runtime itself would go on without it.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not as_path(path).is_file():
        raise InputError(f"{path} does not exist; export it with convert_pytorch_to_onnx.py")
    if provider != CPU:
        load_cuda_libraries()
    if provider == TENSORRT_RTX:  # a plugin: it is given to the settings by device
        chosen = plugin_device(int(options["device_id"]))
        settings.add_provider_for_devices([chosen], {})
    named = None if provider == TENSORRT_RTX else [(provider, options), *others]
    try:
        session = onnxruntime.InferenceSession(str(path), settings, named)
    except Exception as error:  # ONNX Runtime raises a class of its own for every status code
        if "DeformConv" in str(error) and deform_conv_missing():
            raise InputError(
                f"{path} cannot be loaded: {deform_conv_missing()}, or export the model without "
                "--deform_conv native"
            ) from error
        raise InputError(
            f"{path} cannot be loaded by ONNX Runtime ({first_line(error)}); "
            "export it again with convert_pytorch_to_onnx.py"
        ) from error
    loaded = session.get_providers()[0]
    if loaded != provider:
        raise InputError(
            f"{provider} did not load (ONNX Runtime would run on {loaded}); install the versions "
            "of CUDA, cuDNN and TensorRT that this onnxruntime-gpu needs"
        )
    return session


def tensorrt_missing() -> str | None:
    """Return why the TensorRT provider cannot run here, or None.

    ONNX Runtime names the provider wherever it was built with it, TensorRT itself or not.
    """
    reason = provider_missing(TENSORRT)
    if reason or tensorrt_from_pip() or ctypes.util.find_library("nvinfer"):
        return reason
    return (
        "TensorRT's libraries are not installed; install the release that this ONNX Runtime was "
        "built for"
    )


def tensorrt_from_pip() -> bool:
    """Return whether TensorRT's libraries lie in its pip package, where no loader looks."""
    return importlib.util.find_spec("tensorrt_libs") is not None


def tensorrt_providers(spec: Spec) -> Providers:
    """TensorRT, whose engine is built when the file is opened, and CUDA for what it leaves."""
    if tensorrt_from_pip():
        importlib.import_module("tensorrt")  # loads its libraries
    options = {
        "device_id": cuda_device(spec.device),
        # Half precision is in the graph, but a weakly typed engine has to be allowed to use it.
        "trt_fp16_enable": str(int(spec.precision == "fp16")),
    }
    return [(TENSORRT, options), cuda_provider(spec.device)]


def tensorrt_rtx_missing() -> str | None:
    """Return why the plugin with TensorRT for RTX inside cannot run here, or None."""
    reason = provider_missing(CPU)
    if reason:
        return reason
    import onnxruntime

    if not hasattr(onnxruntime, "register_execution_provider_library"):
        return (
            f"ONNX Runtime {onnxruntime.__version__} takes no plugins; pip install "
            '"onnxruntime>=1.24"'
        )
    if importlib.util.find_spec(PLUGIN) is None:
        return f"the package {PLUGIN} is not installed; pip install {PLUGIN_PACKAGES[0]}"
    return gpu.unavailable() or _plugin_refuses()


def _plugin_refuses() -> str | None:
    """Version 0.4 bundles TensorRT for RTX 1.6.1, which runs on Hopper, 0.5 one that does not."""
    for package in PLUGIN_PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        hopper = all(numbers(device.compute_capability) == HOPPER for device in gpu.devices())
        if hopper and numbers(installed) >= (0, 5):
            return f'{package} {installed} refuses this GPU; pip install "{package}==0.4.0"'
    return None


@functools.cache
def plugin_devices() -> list:
    """Return what the plugin can run on; `InputError` where it does not load."""
    import onnxruntime

    plugin = importlib.import_module(PLUGIN)  # loads the libraries that it bundles
    name = plugin.get_ep_name()
    try:
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # of a class of ONNX Runtime's own
        raise InputError(
            f"{PLUGIN} does not load into ONNX Runtime {onnxruntime.__version__} "
            f"({first_line(error)}); install versions of both that go together"
        ) from error
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def plugin_device(index: int):
    """Return the plugin's device of that number; `InputError` where there is none."""
    devices = plugin_devices()
    if index >= len(devices):
        raise InputError(
            f"device cuda:{index} was asked for, but {PLUGIN} sees {len(devices)} GPUs; give "
            "another --device"
        )
    return devices[index]


def tensorrt_rtx_providers(spec: Spec) -> Providers:
    """TensorRT for RTX, whose engine is built when the file is opened; precision is the file's."""
    return [(TENSORRT_RTX, {"device_id": cuda_device(spec.device)})]


# By the option `provider`: why it cannot run here, and what a session is opened with.
PROVIDERS: dict[str | None, tuple[Callable[[], str | None], Callable[[Spec], Providers]]] = {
    None: (lambda: provider_missing(CPU), lambda spec: choose_providers(spec.device)),
    "cpu": (lambda: provider_missing(CPU), lambda spec: [(CPU, {})]),
    "cuda": (lambda: provider_missing(CUDA), lambda spec: [cuda_provider(spec.device)]),
    "tensorrt": (tensorrt_missing, tensorrt_providers),
    "tensorrt-rtx": (tensorrt_rtx_missing, tensorrt_rtx_providers),
}


RANKS = {"keypoints": 3, "descriptors": 3, "scores": 2}  # of the outputs
# By the type of `image`: at which axis of four its channels are.
INPUTS = {"tensor(float)": 1, "tensor(uint8)": 3}


def sides_of(tensor) -> list[int | str]:
    """Height and width of the images that a session's input takes; names are of any size."""
    return tensor.shape[1:3] if tensor.type == "tensor(uint8)" else tensor.shape[2:4]


def as_input(images: np.ndarray, tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] as a session's input takes them, or as float32 [B, 3, H, W] in [0, 1]."""
    return np.ascontiguousarray(images) if tensor.type == "tensor(uint8)" else as_floats(images)


def as_floats(images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [0, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def _channels_of(shape: Sequence[int | str]) -> int | None:
    """At which axis an image has its three channels; None where it has none."""
    at = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] == 3]
    return at[0] if at else None


def read_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the export wrote into a file; `InputError` where that is not JSON."""
    facts = {key: text for key, text in metadata.items() if key.startswith(METADATA)}
    try:
        return {key.removeprefix(METADATA): json.loads(text) for key, text in facts.items()}
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} holds metadata that is not JSON ({error}); export the model again"
        ) from error


class ONNXRuntimeExtractor(Extractor):
    """One session on one exported file."""

    @classmethod
    def unavailable(cls, provider: str | None = None) -> str | None:
        """Return why ONNX Runtime, or this provider of it, cannot run here, or None."""
        return PROVIDERS[provider][0]()

    def __init__(self, spec: Spec, name: str = "onnxruntime", provider: str | None = None):
        """Open `spec.model_path` on a provider, by default the one that `spec.device` means.

        `provider` is "cpu", "cuda", "tensorrt" or "tensorrt-rtx". `InputError` where it does not
        load, and for a file that is no export of this project or not of `spec`.
        """
        if spec.model_path is None:
            raise InputError(
                f"backend {name} needs a model file; pass --model_path FILE.onnx, as written by "
                "convert_pytorch_to_onnx.py"
            )
        self.path = Path(spec.model_path)
        self._arguments = spec, name, provider
        (chosen, options), *others = PROVIDERS[provider][1](spec)
        if chosen == TENSORRT_RTX:
            settle_tf32(spec.tf32)
        self.session = open_session(self.path, chosen, options, others)
        self._place = place_of(chosen, options)
        self.device = device_of(*self._place)
        self.name = name if provider else f"{name}-{self._place[0]}"
        self.shapes = {tensor.name: tensor.shape for tensor in self.session.get_outputs()}
        self.export = read_metadata(self.path, self.session.get_modelmeta().custom_metadata_map)
        self.input = self._check_contract()
        self._check_model(spec)
        self.top_k = self._check_selection(spec)

    def __reduce__(self) -> tuple:
        """Pickle as what opens the file again, for other processes."""
        return type(self), self._arguments

    def _check_contract(self):
        """The image input, after checking that the file is an export of this project."""
        inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        missing = set(OUTPUTS) - set(self.shapes)
        if set(inputs) != {"image"} or missing:
            raise InputError(
                f"{self.path} has inputs {sorted(inputs)} and lacks outputs {sorted(missing)}; "
                "this backend runs files written by convert_pytorch_to_onnx.py with --io default"
            )
        image = inputs["image"]
        outputs = {output.name: output for output in self.session.get_outputs()}
        right = INPUTS.get(image.type) == _channels_of(image.shape) and all(
            outputs[name].type == "tensor(float)" and len(outputs[name].shape or []) == rank
            for name, rank in RANKS.items()
        )
        if not right or self.export.get("io", "default") != "default":
            found = {name: self.shapes[name] for name in OUTPUTS}
            raise InputError(
                f"{self.path} takes {image.type} {image.shape} and gives {found}, which is another "
                "contract; export it with convert_pytorch_to_onnx.py and --io default"
            )
        return image

    def _check_model(self, spec: Spec) -> None:
        """Refuse a file of another model, precision or weights than `spec` asks for by name."""
        model = self.export.get("model")
        if model is None:
            raise InputError(
                f"{self.path} does not say which model it holds, so it is no export of this "
                "project; export the model with convert_pytorch_to_onnx.py"
            )
        if model != spec.model:
            raise InputError(f"{self.path} holds {model}, not {spec.model}; pass --model {model}")
        if spec.precision == "fp16" and self.export.get("precision") == "fp32":
            raise InputError(
                f"{self.path} is float32; ask for fp32, or export it with --precision fp16"
            )
        weights = self.export.get("weights_sha256")
        if spec.weights and weights and weights != sha256(find_weights(spec.model, spec.weights)):
            raise InputError(
                f"{self.path} was made of other weights than {spec.weights}; export it again, or "
                "leave --weights out"
            )

    def _check_selection(self, spec: Spec) -> int | None:
        """How many rows to keep: `spec.top_k`, or None for all (threshold mode).

        `InputError` where the file selects keypoints in another way.
        """
        by_threshold = "nms_scores" in self.shapes
        if spec.top_k > 0 and not by_threshold:
            return self._check_top_k(spec.top_k)
        facts = {"scores_th": spec.scores_th, "n_limit": spec.n_limit}
        strict = self.export.get("strict", False) is spec.strict  # older files do not say
        wanted = {"top_k": spec.top_k} if spec.top_k > 0 else {"top_k": 0, **facts}
        same = strict and all(self.export.get(name) == facts[name] for name in facts)
        if spec.top_k > 0 or not by_threshold or not same:
            options = " ".join(f"--{name} {value}" for name, value in wanted.items())
            raise InputError(
                f"{self.path} was not exported for {options}; export it again with these options, "
                "since what it selects is part of the file"
            )
        return None

    def _check_top_k(self, top_k: int) -> int:
        rows = self.shapes["scores"][1]
        if isinstance(rows, int) and top_k > rows:
            raise InputError(
                f"top_k {top_k} was asked for, but {self.path} gives {rows} keypoints; "
                f"pass --top_k {rows} or export it again with --top_k {top_k}"
            )
        return top_k

    def _check_size(self, images: np.ndarray) -> None:
        """Refuse a batch or size that a static file was not exported for, or too small for K."""
        batch = self.input.shape[0]
        if isinstance(batch, int) and batch != len(images):
            raise InputError(
                f"the batch has {len(images)} images, but {self.path} was exported for {batch}; "
                "export it with --dynamic"
            )
        expected = sides_of(self.input)
        for want, got in zip(expected, images.shape[1:3], strict=True):
            if isinstance(want, int) and want != got:
                raise InputError(
                    f"the image is {images.shape[2]}x{images.shape[1]} pixels, but {self.path} was "
                    f"exported for {expected[1]}x{expected[0]}; export it with --dynamic"
                )
        height, width, rows = *images.shape[1:3], self.shapes["scores"][1]
        room = most_rows(height, width)
        if isinstance(rows, int) and room < rows:
            raise InputError(
                f"the image is {width}x{height} pixels, which has room for {room} keypoints, but "
                f"{self.path} gives {rows}; give larger images, or export it for at most {room}"
            )

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to what the file's input takes."""
        check_images(images)
        self._check_size(images)
        if self.device == "cpu":
            check_memory(*images.shape[1:3], len(images))
        return as_input(images, self.input)

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """uint8 [B, H, W, 3] RGB to each image's `Features`, copies included."""
        prepared = self._prepare(images)
        try:
            rows = self.session.run(OUTPUTS, {"image": prepared})
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            raise InputError(
                f"ONNX Runtime cannot run {self.path} ({first_line(error)}); "
                "export it again with convert_pytorch_to_onnx.py"
            ) from error
        count = rows[0].shape[1:2]
        for name, values in zip(OUTPUTS, rows, strict=True):
            if values.ndim != RANKS[name] or values.shape[:2] != (len(images), *count):
                raise InputError(
                    f"{self.path} gave {name} {list(values.shape)} for {len(images)} images; "
                    "export it again with convert_pytorch_to_onnx.py"
                )
        found = features_of_batch(*(values[:, : self.top_k] for values in rows))
        for features in found:
            check_features(features, *images.shape[1:3])
        return found

    def to_device(self, images: np.ndarray):
        """uint8 [B, H, W, 3] RGB to the session's input, on its device."""
        import onnxruntime

        prepared = self._prepare(images)
        return onnxruntime.OrtValue.ortvalue_from_numpy(prepared, *self._place)

    def infer(self, batch) -> dict:
        """The session's input to its outputs, all `OrtValue`s on its device."""
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("image", batch)
        for name in OUTPUTS:
            binding.bind_output(name, *self._place)
        self.session.run_with_iobinding(binding)
        return dict(zip(OUTPUTS, binding.get_outputs(), strict=True))

    def synchronize(self) -> None:
        """Nothing to wait for: a session's run returns when its work is done."""

    def placement(self) -> dict[str, Counter]:
        """How many nodes of which operator each provider runs; empty before ONNX Runtime 1.24."""
        if not hasattr(self.session, "get_provider_graph_assignment_info"):
            return {}
        placed: dict[str, Counter] = {}
        for subgraph in self.session.get_provider_graph_assignment_info():
            operators = Counter(node.op_type for node in subgraph.get_nodes())
            placed.setdefault(subgraph.ep_name, Counter()).update(operators)
        return placed
