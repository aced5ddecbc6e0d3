"""What goes to a device and comes back is the same, and nobody else writes to it."""

import ctypes
import functools
import multiprocessing

import numpy as np
import pytest
import torch

from aliked import gpu, threads
from aliked.backends import Spec, create_extractor
from aliked.backends.cuda_memory import Twin
from aliked.errors import InputError
from aliked.features import drop_fill_ins, features_of_batch, room_for
from aliked.transfer import choose_device, download, upload
from tests.helpers.textures import texture

NAMES = ("keypoints", "scores", "descriptors")


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("second", [0, 0.3])
def test_features_share_no_memory_with_the_outputs(prepared, second):
    keypoints, scores = np.zeros((3, 2), np.float32), np.array([0.5, second, 0.2], np.float32)
    outputs = keypoints, np.arange(12, dtype=np.float32).reshape(3, 4), scores
    kept = np.flatnonzero(scores)
    expected = [values[kept] for values in outputs]
    features = drop_fill_ins(*outputs, room_for(*outputs) if prepared else None)
    for values in outputs:
        values[:] = 7
    found = features.keypoints, features.descriptors, features.scores
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, wanted)


def test_a_view_of_an_image_is_uploaded_in_its_own_order():
    image = texture(20, 30)[None, ::2, ::-1]
    np.testing.assert_array_equal(upload(image, torch.device("cpu")).numpy(), image)


@pytest.mark.filterwarnings("error")
def test_an_image_that_cannot_be_written_to_is_uploaded_without_a_warning():
    image = texture(20, 30)[None]
    image.flags.writeable = False  # as Pillow's are
    np.testing.assert_array_equal(upload(image, torch.device("cpu")).numpy(), image)


def views_of(images):
    """An array and parts of it, in several memory layouts."""
    return [images, images[:, ::-1], images[..., ::-1], images[:, :, ::2], images[::3]]


@pytest.mark.parametrize("part_bytes", [1, 1000, 10_000, 1 << 40])
def test_parts_are_copied_in_order_and_leave_nothing_out(monkeypatch, part_bytes):
    monkeypatch.setattr(threads, "PART_BYTES", part_bytes)
    for images in views_of(np.stack([texture(20, 30, seed) for seed in range(7)])):
        rows = images.reshape(-1, *images.shape[2:])
        copy, done = np.zeros_like(rows), 0
        for part in threads.copied_parts(copy, rows):
            np.testing.assert_array_equal(copy[part], rows[part])
            assert part.start == done
            done = part.stop
        assert done == len(rows)


@pytest.mark.parametrize(("nbytes", "count"), [(0, 1), (2 << 20, 1), (7 << 20, 3), (900 << 20, 40)])
def test_a_part_is_worth_waking_a_thread_for(nbytes, count):
    parts = threads.in_parts(40, nbytes)
    assert len(parts) == count
    assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1


def test_a_fork_copies_with_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(threads, "PART_BYTES", 1)
    rows = np.arange(100)

    def copy():
        assert len(list(threads.copied_parts(np.zeros_like(rows), rows))) == 100

    copy()  # the parent has its threads
    child = multiprocessing.get_context("fork").Process(target=copy)
    child.start()
    child.join(timeout=60)
    code = child.exitcode
    child.kill()
    assert code == 0


@pytest.mark.parametrize("part_bytes", [1, 1 << 40])
def test_each_image_of_a_batch_keeps_its_own_rows(monkeypatch, part_bytes):
    monkeypatch.setattr(threads, "PART_BYTES", part_bytes)
    random = np.random.default_rng(0)
    outputs = [random.random(shape, np.float32) for shape in [(9, 50, 2), (9, 50, 8), (9, 50)]]
    for image, kept in enumerate(random.integers(0, 50, 9)):
        outputs[2][image, kept:] = 0
    outputs[2][4] = 1
    images = list(zip(*outputs, strict=True))
    rooms = [room_for(*image) for image in images]
    for batch in (features_of_batch(*outputs), features_of_batch(*outputs, rooms)):
        for found, image in zip(batch, images, strict=True):
            for name in NAMES:
                np.testing.assert_array_equal(
                    getattr(found, name), getattr(drop_fill_ins(*image), name)
                )


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0)])
def test_there_is_one_cpu(device):
    assert str(choose_device(device)) == "cpu"


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, bool])
def test_anything_but_bytes_is_refused(dtype):
    with pytest.raises(InputError, match="give uint8"):
        upload(np.zeros((1, 8, 8, 3), dtype), torch.device("cpu"))


@pytest.mark.parametrize("part_bytes", [1, 1000, 1 << 40])
def test_a_twin_sends_every_part_once_and_fetches_all(monkeypatch, part_bytes):
    """The device is the host's memory here, and the driver copies at once."""
    monkeypatch.setattr(threads, "PART_BYTES", part_bytes)
    sent = []

    def copy_async(to, source, nbytes, stream):
        ctypes.memmove(to, source, nbytes)
        sent.append(nbytes)

    monkeypatch.setattr(gpu, "copy_async", copy_async)
    for images in views_of(np.stack([texture(20, 30, seed) for seed in range(7)])):
        for batch in (images, images[:1]):
            on_device = np.zeros(batch.shape, np.uint8)
            make = functools.partial(np.empty, batch.shape, np.uint8)
            twin = Twin(on_device.ctypes.data, batch.shape, batch.nbytes, make)
            sent.clear()
            twin.send(batch, 7)
            np.testing.assert_array_equal(on_device, batch)
            assert sum(sent) == batch.nbytes
            on_device += 1
            np.testing.assert_array_equal(twin.fetch(7), batch + 1)


@pytest.mark.gpu
def test_a_cuda_device_gets_and_gives_back_the_same_bytes():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = [texture(480, 640, seed)[None] for seed in range(20)]
    # More uploads than page-locked blocks, none waited for.
    on_device = [upload(image, torch.device("cuda")) for image in images]
    for image, array in zip(images, download(on_device), strict=True):
        np.testing.assert_array_equal(array, image)


@pytest.mark.gpu
def test_a_large_batch_gets_to_a_cuda_device_in_parts():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    one = np.stack([texture(480, 640, seed) for seed in range(4)])
    for images in views_of(np.concatenate([one + i for i in range(8)])):
        kept = torch.empty(images.shape, dtype=torch.uint8, device="cuda")
        upload(images, torch.device("cuda"), kept)
        # Other bytes each time: a block that is used again too soon would show.
        on_device = [upload(images + i, torch.device("cuda")) for i in range(3)]
        for i, array in enumerate(download(on_device)):
            np.testing.assert_array_equal(array, images + i)
        np.testing.assert_array_equal(kept.cpu().numpy(), images)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pytorch", "pytorch-cudagraph", "fused"])
def test_features_stay_as_they_were_when_more_are_extracted(backend, weights_dir):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    extract = create_extractor(backend, Spec("aliked-t16", weights=weights_dir, device="cuda"))
    images = [texture(240, 320, seed) for seed in range(4)]
    alone = [[getattr(extract(image), name).copy() for name in NAMES] for image in images]
    kept = [extract(image) for image in images]
    for features, expected in zip(kept, alone, strict=True):
        for name, values in zip(NAMES, expected, strict=True):
            np.testing.assert_allclose(getattr(features, name), values, atol=1e-5)
