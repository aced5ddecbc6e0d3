"""The tritonserver inside the nvidia-pytriton wheel, on free ports of this machine."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def wheel() -> Path | None:
    """The folder of the installed package, not imported: it wants much that is not needed here."""
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent if spec and spec.origin else None


def environment() -> Path | None:
    """A virtual environment for Python models: $ALIKED_TRITON_ENV, or this one where it serves.

    The backend in the wheel was built for NumPy 1: with NumPy 2 its process dies.
    """
    named = os.environ.get("ALIKED_TRITON_ENV")
    if named:
        return Path(named)
    import numpy

    return Path(sys.prefix) if numpy.__version__.startswith("1.") else None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(repository: Path, scratch: Path) -> Iterator[str]:
    """Start the server, yield HOST:PORT of its gRPC, and stop it."""
    package = wheel()
    backends = scratch / "backends"
    shutil.copytree(package / "tritonserver/backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    http, grpc = free_port(), free_port()
    log = scratch / "server.log"
    options = {
        "model-repository": repository,
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "http-port": http,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc,
        "allow-metrics": "false",
    }
    libraries = str(package.parent / "nvidia_pytriton.libs")
    with open(log, "w") as output:
        process = subprocess.Popen(
            [package / "tritonserver/bin/tritonserver"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=os.environ | {"LD_LIBRARY_PATH": libraries, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
        yield f"127.0.0.1:{grpc}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path, seconds: int = 180) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            opener.open(url, timeout=5)
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not get ready:\n{log.read_text()[-3000:]}")
