"""Ask a Triton server for features and matches of images, or load it and measure.

python -m serve.client 127.0.0.1:8001 assets/sequence_640x480
python -m serve.client 127.0.0.1:8001 assets/sequence_640x480 --load 1 4 16 --seconds 10
"""

import argparse
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from aliked import cli
from aliked.errors import InputError, how_to_install
from aliked.features import Features, check_image
from aliked.files import read_file
from aliked.images import MOST_BYTES, list_images


def triton_client() -> Any:
    """The gRPC part of tritonclient; `InputError` where it is missing."""
    try:
        import tritonclient.grpc as client
    except (ModuleNotFoundError, RuntimeError) as error:  # RuntimeError: without gRPC
        raise InputError(
            f"the client needs tritonclient with gRPC ({error}); {how_to_install('tritonclient')}"
        ) from error
    return client


class Client:
    """A connection to a server with the models of `serve.repository`."""

    def __init__(self, url: str):
        """Raise `InputError` where no server answers at `url` (HOST:PORT of gRPC)."""
        self.triton = triton_client()
        self._connection = self.triton.InferenceServerClient(url)
        try:
            ready = self._connection.is_server_ready()
        except self.triton.InferenceServerException:
            ready = False
        if not ready:
            raise InputError(f"no Triton server is ready at {url}; start one, or correct the port")

    def extract(self, image: bytes | np.ndarray, model: str = "aliked") -> Features:
        """Features of one image: the bytes of a file, or uint8 [H, W, 3] RGB.

        `InputError` for anything else, and with the server's own words where it refuses.
        """
        if isinstance(image, bytes):
            given = self._bytes("image", image)
        else:
            check_image(image)
            given = self.triton.InferInput("pixels", [1, *image.shape], "UINT8")
            given.set_data_from_numpy(np.ascontiguousarray(image[None]))
        return _features(self._infer(model, [given]))

    def match(
        self, first: bytes, second: bytes, model: str = "aliked_pair"
    ) -> tuple[Features, Features, np.ndarray]:
        """Features of two files' bytes and the matches between them, [P, 2]."""
        answer = self._infer(model, [self._bytes("image0", first), self._bytes("image1", second)])
        return _features(answer, "0"), _features(answer, "1"), answer.as_numpy("matches")[0]

    def _bytes(self, name: str, image: bytes) -> Any:
        given = self.triton.InferInput(name, [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[image]], dtype=object))
        return given

    def _infer(self, model: str, inputs: list[Any]) -> Any:
        try:
            return self._connection.infer(model, inputs)
        except self.triton.InferenceServerException as error:
            raise InputError(f"the server refuses: {error.message()}") from error


def _features(answer: Any, suffix: str = "") -> Features:
    names = ("keypoints", "scores", "descriptors")
    return Features(*(answer.as_numpy(name + suffix)[0] for name in names))


@dataclass(frozen=True)
class Load:
    """What some clients saw who asked all the time."""

    concurrency: int
    seconds: float
    latencies: np.ndarray  # seconds, of every answer
    refused: int

    def row(self) -> str:
        """A line of the table."""
        p50, p90, p99 = (1000 * np.percentile(self.latencies, q) for q in (50, 90, 99))
        rate = len(self.latencies) / self.seconds
        return (
            f"{self.concurrency:11} {rate:10.1f} {p50:9.1f} {p90:9.1f} {p99:9.1f} {self.refused:8}"
        )


SECONDS = 10  # of a measurement
HEADER = "concurrency requests/s   p50 [ms]  p90 [ms]  p99 [ms]  refused"


def measure(ask: Callable[[int], Callable[[], None]], concurrency: int, seconds: float) -> Load:
    """Ask from `concurrency` threads for some time; each asks again when it has its answer.

    `ask(i)` gives the i-th thread what it calls for a request; `InputError` counts as refused.
    """
    latencies: list[float] = []
    refused = itertools.count()
    calls = [ask(i) for i in range(concurrency)]
    calls[0]()  # the first request may find a model that is not warm
    end = time.perf_counter() + seconds

    def work(call: Callable[[], None]) -> None:
        while (started := time.perf_counter()) < end:
            try:
                call()
                latencies.append(time.perf_counter() - started)
            except InputError:
                next(refused)

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if not latencies:
        raise InputError("the server answered no request in this time; see its log")
    return Load(concurrency, elapsed, np.array(latencies), next(refused))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(
        prog="python -m serve.client",
        description="Ask a Triton server for features and matches of images, or load it.",
    )
    parser.add_argument("url", metavar="HOST:PORT", help="of the server's gRPC")
    parser.add_argument("images", type=Path, metavar="FOLDER", help="folder of images")
    parser.add_argument(
        "--load",
        type=cli.whole(1),
        nargs="+",
        metavar="N",
        help="numbers of clients at a time to measure",
    )
    parser.add_argument(
        "--seconds", type=cli.positive, help=f"with --load: for each (default: {SECONDS})"
    )
    parser.add_argument("--pairs", action="store_true", help="with --load: the model of two images")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print what the server finds in the images, or how fast it is."""
    for name in ("seconds", "pairs"):
        if getattr(args, name) and not args.load:
            raise InputError(f"--{name} needs --load; leave it out, or give that as well")
    paths = list_images(args.images)
    files = [read_file(path, MOST_BYTES) for path in paths]
    if args.load:
        print(HEADER)
        for concurrency in args.load:
            load = measure(asking(args, files), concurrency, args.seconds or SECONDS)
            print(load.row(), flush=True)
        return
    client = Client(args.url)
    if len(files) == 1:
        print(f"{paths[0].name}: {len(client.extract(files[0]))} keypoints")
    for (path0, first), (path1, second) in pairwise(zip(paths, files, strict=True)):
        try:
            one, other, matches = client.match(first, second)
        except InputError as error:
            raise InputError(f"{path0.name} - {path1.name}: {error}") from error
        print(
            f"{path0.name} - {path1.name}: {len(one)} and {len(other)} keypoints, "
            f"{len(matches)} matches"
        )


def asking(args: argparse.Namespace, files: list[bytes]) -> Callable[[int], Callable[[], None]]:
    """What each client asks for: one image after the other, or pairs of neighbours."""

    def client(index: int) -> Callable[[], None]:
        connection = Client(args.url)
        turns = itertools.count(index)

        def extract() -> None:
            connection.extract(files[next(turns) % len(files)])

        def match() -> None:
            at = next(turns)
            connection.match(files[at % len(files)], files[(at + 1) % len(files)])

        return match if args.pairs else extract

    return client


if __name__ == "__main__":
    cli.run(main, parser())
