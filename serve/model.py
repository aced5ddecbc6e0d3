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
        if args["model_instance_kind"] == "GPU":
            settings["spec"]["device"] = f"cuda:{args['model_instance_device_id']}"
        self._serve = {"extract": extracting, "match": matching}[settings["role"]](settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return self._serve(requests)


def extracting(settings: dict) -> Callable[[list[Any]], list[Any]]:
    """Requests of images to responses of features; all images of one size go through together."""
    from aliked.backends import Spec, create_extractor
    from aliked.errors import InputError
    from aliked.features import Features, check_image
    from aliked.images import decode_image

    spec = settings["spec"]
    spec |= {name: spec[name] and Path(spec[name]) for name in ("weights", "model_path")}
    extractor = create_extractor(settings["backend"], Spec(**spec))
    threads = ThreadPoolExecutor(settings["threads"])

    def pixels(image: Any) -> np.ndarray | InputError:
        try:
            if isinstance(image, bytes):
                return decode_image(np.frombuffer(image, np.uint8), "the image")
            check_image(image)
            return image
        except InputError as error:
            return error

    def serve(requests: list[Any]) -> list[Any]:
        images = [
            ((number, row), image)
            for number, request in enumerate(requests)
            for row, image in enumerate(images_of(request))
        ]
        decoded = dict(
            zip(
                [row for row, _ in images],
                threads.map(pixels, [image for _, image in images]),
                strict=True,
            )
        )
        found: dict[Row, Features] = {}
        errors: dict[int, str] = {}
        by_size: dict[tuple, list[Row]] = {}
        for row, image in decoded.items():
            if isinstance(image, InputError):
                errors.setdefault(row[0], str(image))
            else:
                by_size.setdefault(image.shape, []).append(row)
        for rows in by_size.values():
            for some in powers_of_two(rows):
                batch = np.stack([decoded[row] for row in some])
                try:
                    found |= zip(some, extractor.extract_batch(batch), strict=True)
                except InputError as error:
                    errors |= {number: str(error) for number, _ in some}
        answers: list[list[Features]] = [[] for _ in requests]
        for row, _ in images:
            if row in found:
                answers[row[0]].append(found[row])
        return [
            refusal(errors.get(number, "give either image or pixels"))
            if number in errors or not answer
            else pb_utils.InferenceResponse(padded(answer))
            for number, answer in enumerate(answers)
        ]

    return serve


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


def refusal(sentence: str) -> Any:
    """An error that is the request's own fault."""
    error = pb_utils.TritonError(sentence, pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse([], error)
