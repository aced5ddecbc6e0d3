"""An engine as an extractor: images in, features out."""

from pathlib import Path
from typing import Any

import numpy as np

from aliked import gpu
from aliked.backends.cuda_memory import create_memory
from aliked.backends.tensorrt_runtime import runtime_module, unavailable
from aliked.backends.tensorrt_session import Session
from aliked.errors import InputError
from aliked.features import Features, check_image, features_of_batch
from aliked.threads import copied_parts

INPUT = "image"
OUTPUTS = ("keypoints", "descriptors", "scores")


class TensorRTExtractor:
    """One engine on a stream of its own; not for several threads at once.

    What `infer` returns belongs to the extractor: its next call overwrites it.
    """

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

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`."""
        check_image(image)
        return self.extract_batch(image[None])[0]

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self.memory.active():
            self.memory.synchronize()
