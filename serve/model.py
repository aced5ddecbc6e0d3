"""The Python-backend model: any extractor of this project, or the matcher of two images' features.

`serve.repository` copies this file into a model's folder. Triton imports it in the environment that
the model's configuration names; a request that cannot be served gets an error of its own.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

Row = tuple[int, int]  # a request and an image in it


class TritonPythonModel:
    """What Triton calls; the parameter `role` says whether it extracts or matches."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model onto the device of this instance."""
        parameters = json.loads(args["model_config"])["parameters"]
        settings = json.loads(parameters["settings"]["string_value"])
        sys.path.append(settings["project"])
        if settings["role"] == "extract":
            on_gpu = args["model_instance_kind"] == "GPU"
            device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
            settings["spec"]["device"] = device
        self._serve = {"extract": Extraction, "match": matching}[settings["role"]](settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return self._serve(requests)


class Extraction:
    """Requests of images to responses of features; all images of one size go through together."""

    def __init__(self, settings: dict) -> None:
        # Here, because Triton loads this file before the project can be found.
        from aliked.backends import Spec, create_extractor

        spec = settings["spec"]
        spec |= {name: spec[name] and Path(spec[name]) for name in ("weights", "model_path")}
        self.extractor = create_extractor(settings["backend"], Spec(**spec))
        self.threads = ThreadPoolExecutor(settings["threads"])

    def __call__(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        given = {
            (number, row): image
            for number, request in enumerate(requests)
            for row, image in enumerate(images_of(request))
        }
        pixels = dict(zip(given, self.threads.map(pixels_of, given.values()), strict=True))
        found = self.features(pixels)
        answers: list[list[Any]] = [[] for _ in requests]
        for number, row in given:
            answers[number].append(found[number, row])
        return [response(answer) for answer in answers]

    def features(self, pixels: dict[Row, Any]) -> dict[Row, Any]:
        """The features of each image, or the error that it is."""
        found: dict[Row, Any] = {}
        by_size: dict[tuple, list[Row]] = {}
        for row, image in pixels.items():
            if isinstance(image, Exception):
                found[row] = image
            else:
                by_size.setdefault(image.shape, []).append(row)
        for rows in by_size.values():
            for some in powers_of_two(rows):
                found |= zip(some, self.extract([pixels[row] for row in some]), strict=True)
        return found

    def extract(self, images: list[np.ndarray]) -> list[Any]:
        """The features of images of one size, or for each the error that stopped them."""
        from aliked.errors import InputError

        try:
            return self.extractor.extract_batch(np.stack(images))
        # Also where memory is short: images of other sizes may be in the same batch.
        except (InputError, MemoryError, RuntimeError) as error:
            return [error] * len(images)


def pixels_of(image: Any) -> Any:
    """What a request holds of an image as uint8 [H, W, 3] RGB, or the error that it is."""
    from aliked.errors import InputError
    from aliked.features import check_image
    from aliked.images import decode_image

    try:
        if isinstance(image, bytes):
            return decode_image(np.frombuffer(image, np.uint8), "the image")
        check_image(image)
    except (InputError, MemoryError) as error:
        return error
    return image


def response(answer: list[Any]) -> Any:
    """The response of a request: the features of its images, or the first error among them."""
    from aliked.errors import InputError

    if not answer:
        return refusal("give either image or pixels")
    error = next((found for found in answer if isinstance(found, Exception)), None)
    if error is None:
        return pb_utils.InferenceResponse(padded(answer))
    if isinstance(error, InputError):
        return refusal(str(error))
    return refusal(f"{type(error).__name__}: {error}", "INTERNAL")


def images_of(request: Any) -> list[Any]:
    """The images of a request: bytes of files, or uint8 [H, W, 3]; none where it has both."""
    inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in ("image", "pixels")]
    given = [tensor.as_numpy() for tensor in inputs if tensor is not None]
    if len(given) != 1:
        return []
    return list(given[0].ravel()) if given[0].dtype == object else list(given[0])


def powers_of_two(rows: list[Row]) -> list[list[Row]]:
    """Parts of 2^n rows, the largest first: few batch sizes, so that few graphs are captured."""
    parts, at = [], 0
    while at < len(rows):
        size = 1 << (len(rows) - at).bit_length() - 1
        parts.append(rows[at : at + size])
        at += size
    return parts


def padded(answer: list[Any]) -> list[Any]:
    """Features of one or more images as tensors.

    Where one has fewer keypoints than another, it is filled up with rows of score 0.
    """
    count = max(len(features) for features in answer)
    tensors = []
    for name in ("keypoints", "scores", "descriptors"):
        rows = [getattr(features, name) for features in answer]
        filled = np.zeros((len(rows), count, *rows[0].shape[1:]), np.float32)
        for to, values in zip(filled, rows, strict=True):
            to[: len(values)] = values
        tensors.append(pb_utils.Tensor(name, filled))
    return tensors


def matching(settings: dict) -> Callable[[list[Any]], list[Any]]:
    """Requests of two images' descriptors to responses of their matches."""
    from aliked.errors import InputError
    from aliked.matching import match_mutual

    limit = settings["min_similarity"]

    def answer(request: Any) -> Any:
        first, second = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0]
            for name in ("descriptors0", "descriptors1")
        )
        try:
            matches = match_mutual(first, second, limit)
        except InputError as error:
            return refusal(str(error))
        similarity = np.einsum("pd,pd->p", first[matches[:, 0]], second[matches[:, 1]])
        tensors = {"matches": matches.astype(np.int32), "similarity": similarity}
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, values[None]) for name, values in tensors.items()]
        )

    return lambda requests: [answer(request) for request in requests]


def refusal(sentence: str, code: str = "INVALID_ARG") -> Any:
    """An error, unless another code is given one that is the request's own fault."""
    error = pb_utils.TritonError(sentence, getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse([], error)
