"""Is an exported file, or an engine, still the model? Both run beside PyTorch in float32."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from aliked.backends import Spec
from aliked.backends.onnxruntime import CPU, ONNXRuntimeExtractor, as_floats, open_session
from aliked.backends.pytorch import PyTorchExtractor
from aliked.backends.tensorrt import TensorRTExtractor
from aliked.configs import STRIDE
from aliked.errors import InputError, first_line
from aliked.export.builder import Shape
from aliked.export.onnx_export import ExportOptions
from aliked.features import OUTPUTS, Features, drop_fill_ins
from aliked.images import list_images, load_image
from aliked.model import ALIKED
from aliked.parity import FAINT, TOLERANCES, Tolerance, Verdict, compare_features, judge
from aliked.ties import expect


def pad_right_bottom(image: np.ndarray) -> np.ndarray:
    """Replicate the last row and column of [H, W, 3] up to a multiple of 32."""
    height, width = image.shape[:2]
    border = (0, -height % STRIDE, 0, -width % STRIDE)
    return cv2.copyMakeBorder(image, *border, cv2.BORDER_REPLICATE)


def open_cv(path: Path, reference: ALIKED, options: ExportOptions) -> "OpenCVExtractor":
    """What runs a file written with `--io opencv`; `InputError` where OpenCV is too old."""
    if not hasattr(cv2, "ALIKED"):
        raise InputError(
            f"OpenCV {cv2.__version__} has no cv2.ALIKED, which checks the file; install OpenCV 5"
        )
    return OpenCVExtractor(path, options.height, options.width)


class OpenCVExtractor:
    """A file written with `--io opencv`, run by `cv2.ALIKED` itself."""

    def __init__(self, path: Path, height: int, width: int):
        params = cv2.ALIKED.Params()
        params.inputSize = (width, height)
        try:
            self.detector = cv2.ALIKED.create(str(path), params)
        except cv2.error as error:
            raise InputError(
                f"OpenCV {cv2.__version__} cannot load {path} ({error.err}); export another form"
            ) from error

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB of the file's size to `Features`."""
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        try:
            found, descriptors = self.detector.detectAndCompute(bgr, None)
        except cv2.error as error:
            raise InputError(
                f"OpenCV {cv2.__version__} cannot run the file ({error.err}); export another form"
            ) from error
        return Features(
            np.array([point.pt for point in found], np.float32).reshape(-1, 2),
            np.array([point.response for point in found], np.float32),
            descriptors,
        )


class ColmapExtractor:
    """A file written with `--io colmap`, on the CPU."""

    name = "onnxruntime-cpu"

    def __init__(self, path: Path, max_keypoints: int, min_score: float):
        self.session = open_session(path, CPU, {})
        self.limits = {
            "max_keypoints": np.array(max_keypoints, np.int64),
            "min_score": np.array(min_score, np.float32),
        }

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB, padded by `pad_right_bottom`, to `Features` of the padded image."""
        rows = self.session.run(OUTPUTS, {"image": as_floats(image[None]), **self.limits})
        keypoints, descriptors, scores = (row[0] for row in rows)
        corner = np.array(image.shape[1::-1], np.float32) - 1  # [2], (x, y)
        return drop_fill_ins((keypoints + 1) / 2 * corner, descriptors, scores)


def check_none_found(path: Path) -> None:
    """Raise `InputError` unless a COLMAP file gives empty outputs where no keypoint is wanted."""
    extract = ColmapExtractor(path, max_keypoints=1000, min_score=1)
    try:
        none = extract(np.zeros((2 * STRIDE, 2 * STRIDE, 3), np.uint8))
    except Exception as error:  # ONNX Runtime raises a class of its own for every status code
        raise InputError(
            f"the file does not run where no keypoint passes ({first_line(error)}); "
            "export it with another --opset_version or --deform_conv"
        ) from error
    if len(none):
        raise InputError(f"the file gives {len(none)} keypoints above a score of 1; export it anew")


Images = Iterable[tuple[str, np.ndarray]]  # name, uint8 [H, W, 3] RGB


def cropped(images: Images) -> Iterator[tuple[str, np.ndarray]]:
    """Each image, and a part of it whose odd sides a dynamic file has to bear as well."""
    for name, image in images:
        yield name, image
        height, width = (side * 3 // 4 | 1 for side in image.shape[:2])
        yield f"{name} cut to {width}x{height}", image[:height, :width].copy()


def padded(images: Images) -> Iterator[tuple[str, np.ndarray]]:
    """Each image padded as COLMAP pads."""
    for name, image in images:
        yield name, pad_right_bottom(image)


def open_exported(
    path: Path, reference: ALIKED, options: ExportOptions
) -> Callable[[np.ndarray], Features]:
    """What runs the file as a user of its contract would."""
    if options.io == "opencv":
        return open_cv(path, reference, options)
    if options.io == "colmap":
        return ColmapExtractor(path, max_keypoints=reference.top_k, min_score=0)
    return ONNXRuntimeExtractor(
        Spec(
            reference.name,
            top_k=reference.top_k,
            scores_th=reference.scores_th,
            n_limit=reference.n_limit,
            strict=reference.strict,
            device="cpu",
            model_path=path,
        )
    )


def verify_onnx(
    path: Path, reference: ALIKED, precision: str, options: ExportOptions, images: Images
) -> Verdict:
    """Compare the file's features with those of `reference`, the float32 model, image by image.

    `precision` ("fp32" or "fp16") is that of the file and chooses the tolerance. `InputError`
    where the images have nothing to compare.
    """
    extract = open_exported(path, reference, options)
    if options.io == "colmap":
        check_none_found(path)
        images = padded(cropped(images))
    elif options.dynamic:
        images = cropped(images)
    parities, telling = {}, 0
    for name, image in images:
        expected = expect(reference, image)
        telling += int((expected.features.scores >= FAINT).sum())
        parities[name] = compare_features(expected.features, extract(image), ties=expected.ties)
    if parities and not telling:
        raise _nothing_told(len(parities))
    return judge(parities, TOLERANCES[precision])


def _nothing_told(count: int) -> InputError:
    return InputError(
        f"no keypoint of the {count} images scores {FAINT:g} or more, so that they prove nothing "
        "about the file; give photographs, or a lower threshold"
    )


NamedImages = list[tuple[str, np.ndarray]]  # name, uint8 [H, W, 3] RGB


def create_reference(path: Path, export: dict, weights: Path | None) -> PyTorchExtractor:
    """Return the PyTorch model in float32 that the file `path` was exported from.

    `export` is what the export wrote into it; `InputError` where that is not enough.
    """
    try:
        names = ("model", "top_k", "scores_th", "n_limit")
        strict = export.get("strict", False)  # which older files do not say
        spec = Spec(**{name: export[name] for name in names}, weights=weights, strict=strict)
    except KeyError as error:
        raise InputError(
            f"{path} does not say which {error} it was exported with, so there is nothing "
            "to verify against; export the model again, or pass --no_verify"
        ) from error
    return PyTorchExtractor(spec)


def load_fitting_images(
    folder: Path, number: int, uint8: bool, smallest: Shape, largest: Shape
) -> NamedImages:
    """The first `number` images of `folder`; for an engine of several sizes, cut ones as well.

    `InputError` at the first whole image that is outside the engine's smallest or largest input.
    """
    rows = slice(1, 3) if uint8 else slice(2, 4)
    low, high = smallest[rows], largest[rows]

    def fits(image: np.ndarray) -> bool:
        return all(a <= b <= c for a, b, c in zip(low, image.shape[:2], high, strict=True))

    images = [(path.name, load_image(path)) for path in list_images(folder)[:number]]
    for name, image in images:
        if not fits(image):
            limits = f"{low[1]}x{low[0]}" + ("" if low == high else f" to {high[1]}x{high[0]}")
            raise InputError(
                f"{folder / name} has {image.shape[1]}x{image.shape[0]} pixels and the engine "
                f"takes {limits}; give other --images, or pass --no_verify"
            )
    return images if low == high else [pair for pair in cropped(images) if fits(pair[1])]


def check_telling(reference: PyTorchExtractor, images: NamedImages) -> None:
    """`InputError` where no image has a keypoint that says anything about an engine."""
    found = (reference.expect(image).features.scores for _, image in images)
    if not any((scores >= FAINT).any() for scores in found):
        raise _nothing_told(len(images))


def verify_engine(
    extractor: TensorRTExtractor,
    reference: PyTorchExtractor,
    images: NamedImages,
    limits: Tolerance,
) -> Verdict:
    """Compare an engine with `reference` on every image, two at a time where it takes batches."""
    smallest, largest = extractor.limits()
    parities = {}
    what = f"{extractor.engine.library} and PyTorch fp32"
    with tqdm(total=len(images), desc=what, unit="image", disable=None) as bar:
        for names, batch in _batches(images, max(smallest[0], min(2, largest[0]))):
            found = extractor.extract_batch(batch)
            for name, image, features in zip(names, batch, found, strict=False):
                expected = reference.expect(image)
                parities[name] = compare_features(expected.features, features, ties=expected.ties)
                bar.update()
    return judge(parities, limits)


def _batches(images: NamedImages, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and images [size, H, W, 3] of one size each, filled up with the last image."""
    by_size = sorted(images, key=lambda pair: pair[1].shape)
    for _, group in itertools.groupby(by_size, key=lambda pair: pair[1].shape):
        while chunk := list(itertools.islice(group, size)):
            pixels = [image for _, image in chunk]
            pixels += [pixels[-1]] * (size - len(pixels))
            yield [name for name, _ in chunk], np.stack(pixels)
