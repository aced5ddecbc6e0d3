"""The builder of TensorRT, or of TensorRT for RTX: an ONNX file in, an engine's bytes out."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tqdm import tqdm

from aliked import gpu
from aliked.backends.tensorrt_library import (
    RTX,
    THIS_GPU,
    Library,
    journal,
    logger,
    register_plugins,
    settle_tf32,
)
from aliked.errors import InputError
from aliked.export.onnx_graph import load_model
from aliked.export.rtx_graph import for_rtx, sum_in_float32
from aliked.files import read_file, whole_file, writable_folder

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx


Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """What the builder is told."""

    compute_capabilities: tuple[str, ...] = ()  # TensorRT for RTX: "SM75", ...; (): its default
    optimization_level: int = 3  # 0 takes the first kernel that works, 5 compares all
    max_workspace_size_mib: int | None = None  # None: no limit
    timing_cache: Path | None = None
    shapes: tuple[Shape, Shape, Shape] | None = None  # min, opt, max of a dynamic input
    weak_fp16: bool = False  # TensorRT 10 chooses where to use FP16 in a network in FP32
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = True
    max_aux_streams: int | None = None  # None: TensorRT's choice
    detailed: bool = False  # keep what the inspector shows
    log_level: str = "warning"


# What only one of the libraries has: the option, and whether it is in use.
ONLY_TENSORRT: dict[str, Callable[[BuildOptions], bool]] = {
    "--timing_cache": lambda options: options.timing_cache is not None,
    "--version_compatible": lambda options: options.version_compatible,
    "--hardware_compatible": lambda options: options.hardware_compatible,
}
ONLY_RTX: dict[str, Callable[[BuildOptions], bool]] = {
    "--compute_capability": lambda options: bool(options.compute_capabilities),
}


def check_options(library: Library, options: BuildOptions) -> None:
    """`InputError` for an option that `library` would ignore or cannot follow."""
    for name, in_use in (ONLY_TENSORRT if library is RTX else ONLY_RTX).items():
        if in_use(options):
            raise InputError(f"{library} has no {name}; leave it out or choose another --builder")
    targets = options.compute_capabilities
    if THIS_GPU not in targets:
        return
    if len(targets) > 1:
        raise InputError(f"--compute_capability {THIS_GPU} is for one GPU; leave the others out")
    if reason := gpu.unavailable():
        raise InputError(f"there is no GPU to build for ({reason}); give --compute_capability SM86")


def targets_of(options: BuildOptions) -> list[str]:
    """The GPUs that an engine is for as "SM86" and so on; none for the library's default."""
    names = options.compute_capabilities
    if THIS_GPU not in names:
        return list(names)
    return [f"SM{gpu.devices()[0].compute_capability.replace('.', '')}"]


class Progress:
    """One bar per phase of a build, and whether the build is to stop."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self.cancelled = False

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Show the bar of a phase, which is inside another one or not."""
        place, outermost = len(self._bars), parent is None
        hidden = not outermost and not sys.stderr.isatty()  # bars in bars would fill a log
        self._bars[phase] = tqdm(
            total=steps, desc=phase, position=place, leave=outermost, disable=hidden
        )

    def complete(self, phase: str, step: int) -> bool:
        """Move the bar behind step number `step`; False cancels the build."""
        bar = self._bars[phase]
        bar.update(step + 1 - bar.n)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        """Close the bar of a phase."""
        self._bars.pop(phase).close()


def progress_monitor(trt: ModuleType, progress: Progress) -> "trt.IProgressMonitor":
    """Return what TensorRT's builder tells its progress to."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has the last


@contextlib.contextmanager
def stopped_at_a_step(progress: Progress) -> Iterator[None]:
    """Let Ctrl-C and the like cancel the build at its next step, and take effect after it.

    What their handlers raise must not pass through C++, where it would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    handled = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    received: list[int] = []

    def cancel(number: int, _: object) -> None:
        progress.cancelled = True
        received.append(number)

    for number in handled:
        signal.signal(number, cancel)
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def has_weak_fp16(trt: ModuleType) -> bool:
    """Whether this TensorRT can choose FP16 by itself, as version 10 can and 11 cannot."""
    return hasattr(trt.BuilderFlag, "FP16")


def build_plan(library: Library, onnx_path: Path, options: BuildOptions) -> bytes:
    """Build the engine of an ONNX file.

    `InputError` with the library's own words where it refuses the file or an option, or finds no
    kernel in the memory that it may use.
    """
    if library is RTX:
        settle_tf32(options.tf32)
    trt = library.load()
    rewrite = for_rtx if library is RTX else sum_in_float32
    content = rewrite(load_model(onnx_path)).SerializeToString()
    builder, network, parser = parse_file(library, onnx_path, options, content)
    config = create_config(trt, builder, options)
    if options.shapes:
        add_profile(library, builder, config, network.get_input(0).name, options.shapes)
    if options.version_compatible:
        config.plugins_to_serialize = parser.get_used_vc_plugin_libraries()
    progress = Progress()
    monitor = progress_monitor(trt, progress)  # which must live until the build is over
    config.progress_monitor = monitor
    with stopped_at_a_step(progress):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise build_failure(library, onnx_path, options, journal().last_words(library))
    if options.timing_cache:
        save_timing_cache(config, options.timing_cache)
    return bytes(plan)


def parse_file(
    library: Library, onnx_path: Path, options: BuildOptions, content: bytes | None = None
) -> tuple["trt.Builder", "trt.INetworkDefinition", "trt.OnnxParser"]:
    """Parse an ONNX file; the parser owns the weights, so it has to outlive the build.

    `content` is parsed in place of what the file holds.
    `InputError` with every error of the parser, whole, where it refuses the file.
    """
    trt = library.load()
    journal().errors.clear()
    journal().least = options.log_level
    register_plugins(library)
    builder = trt.Builder(logger(library))
    network = create_network(trt, builder, options)
    parser = trt.OnnxParser(network, logger(library))
    if parser.parse(content) if content else parser.parse_from_file(str(onnx_path)):
        return builder, network, parser
    errors = "\n".join(f"  {parser.get_error(index)}" for index in range(parser.num_errors))
    raise InputError(f"{library} {trt.__version__} cannot parse {onnx_path}:\n{errors}")


def create_network(
    trt: ModuleType, builder: "trt.Builder", options: BuildOptions
) -> "trt.INetworkDefinition":
    """A network whose types are those of the file, unless TensorRT is to choose FP16."""
    if options.weak_fp16:
        return builder.create_network(0)
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def create_config(
    trt: ModuleType, builder: "trt.Builder", options: BuildOptions
) -> "trt.IBuilderConfig":
    """The builder's settings, but for what depends on the network."""
    config = builder.create_builder_config()
    if options.compute_capabilities:
        set_compute_capabilities(trt, config, options.compute_capabilities)
    config.builder_optimization_level = options.optimization_level
    if options.max_workspace_size_mib is not None:
        size = options.max_workspace_size_mib * 2**20
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if options.weak_fp16 and has_weak_fp16(trt):
        config.set_flag(trt.BuilderFlag.FP16)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.timing_cache:
        load_timing_cache(config, options.timing_cache)
    return config


def set_compute_capabilities(
    rtx: ModuleType, config: "rtx.IBuilderConfig", names: tuple[str, ...]
) -> None:
    """Build for the GPUs of these names; `InputError` where the library does not know one."""
    known = rtx.ComputeCapability.__members__
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if name not in known or not config.set_compute_capability(known[name], index):
            raise InputError(
                f"TensorRT for RTX {rtx.__version__} builds for no {name}; choose another "
                "--compute_capability"
            )


def add_profile(
    library: Library,
    builder: "trt.Builder",
    config: "trt.IBuilderConfig",
    name: str,
    shapes: tuple[Shape, Shape, Shape],
) -> None:
    """Give the dynamic input `name` its smallest, usual and largest shape."""
    profile = builder.create_optimization_profile()
    profile.set_shape(name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise InputError(
            f"{library} refuses the shapes {', '.join(map(str, shapes))} for {name} "
            f"({journal().last_words(library)}); give others"
        )


def load_timing_cache(config: "trt.IBuilderConfig", path: Path) -> None:
    """Use the kernel timings of earlier builds, where the file exists."""
    writable_folder(path.parent)  # it is written after minutes, before the engine is
    data = read_file(path) if path.exists() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"{path} is no timing cache of this TensorRT version and GPU; delete it or name "
            "another --timing_cache"
        )


def save_timing_cache(config: "trt.IBuilderConfig", path: Path) -> None:
    """Write the timings, those of this build included, for the next one."""
    with whole_file(path) as partial:
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))


def build_failure(library: Library, onnx_path: Path, options: BuildOptions, why: str) -> InputError:
    """Why there is no engine; of memory, with the two numbers that decide over it."""
    if not any(word in why.lower() for word in ("memory", "workspace")):
        return InputError(f"{library} builds no engine of {onnx_path}: {why}")
    workspace = options.max_workspace_size_mib
    limit = f"{workspace} MiB" if workspace is not None else "no limit"
    batch = options.shapes[2][0] if options.shapes else "the batch of the file"
    return InputError(
        f"out of memory while building {onnx_path} ({why}); workspace: {limit}, batch: "
        f"{batch}; give another --max_workspace_size, a smaller batch, or free the GPU"
    )


def layer_information(trt: ModuleType, engine: "trt.ICudaEngine") -> dict:
    """What the engine inspector tells of every layer, in TensorRT's own words."""
    inspector = engine.create_engine_inspector()
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
