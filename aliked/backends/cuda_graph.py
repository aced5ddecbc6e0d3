"""CUDA graphs through the driver, so that they need neither PyTorch nor PyCUDA."""

import ctypes
import weakref
from collections.abc import Callable

from aliked import gpu

CAPTURE_MODE_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may go on calling CUDA


class CudaGraph:
    """The work that one call puts on a stream, recorded once and launched again and again.

    Shapes and addresses are recorded with it. `RuntimeError` where something in the call cannot
    be recorded.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        """Record `enqueue()`, which must only enqueue on `stream`: nothing runs meanwhile."""
        self._stream = ctypes.c_void_p(stream)
        graph = self._record(enqueue)
        self._executable = ctypes.c_void_p()
        status = gpu.driver().cuGraphInstantiateWithFlags(
            ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
        )
        gpu.driver().cuGraphDestroy(graph)
        gpu.check(status, "cuGraphInstantiateWithFlags")
        weakref.finalize(self, gpu.driver().cuGraphExecDestroy, self._executable)

    def _record(self, enqueue: Callable[[], None]) -> ctypes.c_void_p:
        mode = ctypes.c_int(CAPTURE_MODE_THREAD_LOCAL)
        gpu.check(gpu.driver().cuStreamBeginCapture_v2(self._stream, mode), "cuStreamBeginCapture")
        graph, failure = ctypes.c_void_p(), None
        try:
            enqueue()
        except Exception as error:  # the capture must be ended before anything else is called
            failure = error
        status = gpu.driver().cuStreamEndCapture(self._stream, ctypes.byref(graph))
        if failure is not None:
            raise failure
        gpu.check(status, "cuStreamEndCapture")
        return graph

    def launch(self) -> None:
        """Enqueue the recorded work on its stream."""
        gpu.check(gpu.driver().cuGraphLaunch(self._executable, self._stream), "cuGraphLaunch")
