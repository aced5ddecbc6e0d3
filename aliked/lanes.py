"""The ways of a batch through an extractor: from pixels or files in memory to features.

Several lanes side by side keep a GPU busy: one computes while another copies.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from aliked.errors import InputError
from aliked.features import Extractor, Features, drop_fill_ins

END_OF_JPEG = b"\xff\xd9"  # its last bytes, where it is not cut off


class Lane:
    """An extractor with a CUDA stream of its own, where there is a GPU."""

    def __init__(self, extractor: Extractor, half: bool = False):
        self.extractor, self.half = extractor, half
        self._stream = contextlib.nullcontext
        if extractor.device != "cpu":
            import torch

            stream = torch.cuda.Stream(extractor.device)
            self._stream = lambda: torch.cuda.stream(stream)

    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Memory for the pixels of a batch, uint8 [B, H, W, 3]."""
        return np.empty(shape, np.uint8)

    def extract(self, pixels: np.ndarray) -> list[Features]:
        """The features of uint8 [B, H, W, 3]; `InputError` where memory is short."""
        try:
            with self._stream():
                return self._features(pixels)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
                raise
            count, height, width = pixels.shape[:3]
            raise InputError(
                f"there is not enough memory for {count} images of {width}x{height} pixels at a "
                "time; pass a smaller --batch_size or --max_size"
            ) from error

    def _features(self, pixels: np.ndarray) -> list[Features]:
        found = self.extractor.extract_batch(pixels)
        if not self.half:
            return found
        return [replace(one, descriptors=one.descriptors.astype(np.float16)) for one in found]


class FusedLane(Lane):
    """The same for the fused kernels, which leave all but decoding and writing to the GPU.

    It reads the pixels where they were decoded and turns descriptors to the form of the file.
    """

    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Page-locked memory for the pixels of a batch, uint8 [B, H, W, 3]."""
        import torch

        with torch.cuda.device(self.extractor.torch_device):
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()

    def _features(self, pixels: Any) -> list[Features]:
        import torch

        from aliked.transfer import download

        outputs = self.extractor.infer(torch.as_tensor(pixels))
        columns = outputs["descriptors"].transpose(1, 2)  # [B, D, K]
        columns = (columns.half() if self.half else columns).contiguous()
        # Every core has images to decode.
        arrays = download((outputs["keypoints"], outputs["scores"], columns), asleep=True)
        return [features_of_columns(*one) for one in zip(*arrays, strict=True)]


class DecodingLane(FusedLane):
    """The same with JPEGs that the GPU decodes, by nvImageCodec."""

    def __init__(self, extractor: Extractor, half: bool = False, threads: int = 1):
        """`threads` help where the GPU has no JPEG engine.

        `InputError` where nvImageCodec is missing, or has no decoder.
        """
        super().__init__(extractor, half)
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise InputError(
                f"--decoder nvimgcodec needs nvImageCodec ({error}); "
                'pip install "nvidia-nvimgcodec-cu13[nvjpeg]"'
            ) from error
        # Each file goes to the first that takes it, always the same: their pixels differ. A single
        # decoder of both kinds would give its engine as many images of every batch as the first
        # batch had, whichever that was, and the others to its kernels.
        device, kinds = extractor.torch_device.index or 0, nvimgcodec.BackendKind
        self._decoders, refused = [], None
        for kind, count in ((kinds.HW_GPU_ONLY, 1), (kinds.HYBRID_CPU_GPU, threads)):
            backends = [nvimgcodec.Backend(kind)]
            try:
                self._decoders.append(nvimgcodec.Decoder(device, count, backends=backends))
            except RuntimeError as error:  # what a GPU, or this container, does not have
                refused = error
        if not self._decoders:
            raise InputError(
                f"nvImageCodec has no decoder of JPEGs here ({refused}); install nvJPEG with it: "
                'pip install "nvidia-nvimgcodec-cu13[nvjpeg]", or leave --decoder out'
            ) from refused
        self._stream_of = nvimgcodec.CodeStream
        self._params = nvimgcodec.DecodeParams(
            apply_exif_orientation=False, sample_format=nvimgcodec.SampleFormat.I_RGB
        )
        # What was decoded last; its memory is used again: CUDA would give back and map as much for
        # every batch.
        self._images: list[Any] = []

    def decode(self, files: list[bytes], shapes: list[tuple[int, int, int]]) -> list[Any]:
        """uint8 [H, W, 3] of each file as stored, on the GPU, or None where that cannot be had.

        They are good until the next call.
        """
        import torch

        streams = [self._code(*one) for one in zip(files, shapes, strict=True)]
        left = [i for i, stream in enumerate(streams) if stream is not None]
        found: list[Any] = [None] * len(files)
        self._images += [None] * (len(files) - len(self._images))
        device = self.extractor.torch_device
        with self._stream():
            queue = torch.cuda.current_stream(device).cuda_stream
            for decoder in self._decoders:
                if not left:
                    break
                given, memory = [streams[i] for i in left], [self._images[i] for i in left]
                images = decoder.decode(
                    given, images=memory, params=self._params, cuda_stream=queue
                )
                for i, image in zip(left, images, strict=True):
                    if image is not None:
                        found[i] = self._images[i] = image
                left = [i for i in left if found[i] is None]
            return [
                image if image is None else torch.as_tensor(image, device=device) for image in found
            ]

    def _code(self, data: bytes, shape: tuple[int, int, int]) -> Any:
        """A file for the decoder, or None where it is cut off, no JPEG or of another size."""
        if not data.rstrip(b"\0").endswith(END_OF_JPEG):
            return None
        with contextlib.suppress(Exception):  # of no kind of its own; OpenCV says what is wrong
            stream = self._stream_of(data)
            return stream if (stream.height, stream.width) == shape[:2] else None

    def image(self, pixels: np.ndarray) -> Any:
        """uint8 [H, W, 3] on the GPU."""
        import torch

        with self._stream():
            return torch.as_tensor(pixels).to(self.extractor.torch_device)

    def stack(self, images: Iterable[tuple[Any, int]]) -> Any:
        """uint8 [B, H, W, 3] of images and the quarter turns that make them upright."""
        import torch

        with self._stream():
            upright = [torch.rot90(image, turns) if turns else image for image, turns in images]
            return torch.stack(upright)


def features_of_columns(keypoints: np.ndarray, scores: np.ndarray, columns: np.ndarray) -> Features:
    """One image's [K, 2], [K] and [D, K] outputs as `drop_fill_ins` makes them, not copied.

    Where there are fill-ins `drop_fill_ins` itself does it.
    """
    if (scores > 0).all():
        return Features(keypoints, scores, columns.T)
    return drop_fill_ins(keypoints, columns.T, scores)
