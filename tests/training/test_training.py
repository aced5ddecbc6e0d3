"""The training script: its images, its pairs, its settings, a whole small run, and resuming."""

import csv
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aliked.errors import InputError
from aliked.model import ALIKED
from training.appearance import change_appearance
from training.drawn import drawn_image
from training.geometry import project, random_homographies, random_pairs
from training.model import TrainableALIKED
from training.pool import TRAIN, fill_with, make_pool
from training.settings import load_settings
from training.train import CONFIG, Trainer

PROJECT = Path(__file__).resolve().parents[2]
SMOKE = load_settings(CONFIG, smoke=True)


def smooth_images(count, height=120, width=160):
    """Images whose values are linear in the position, so that sampling them has no error."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack((x / width, y / height, torch.full_like(x, 1) * 0.5))
    return image[None].repeat(count, 1, 1, 1)


def test_corresponding_pixels_of_a_pair_show_the_same_place():
    generator = torch.Generator().manual_seed(3)
    # Smaller views than in training, so that they stay inside the image.
    pair = random_pairs(smooth_images(4), 40, SMOKE.geometry, 0.3, generator)
    pixels = torch.tensor([[10.0, 10], [20, 12], [15, 25]]).repeat(4, 1, 1)
    there, _ = project(pixels, pair.homography)
    for view in range(4):
        for (x, y), target in zip(pixels[view].long(), there[view], strict=True):
            grid = (target * 2 / 39 - 1)[None, None, None]
            found = torch.nn.functional.grid_sample(
                pair.second[view : view + 1], grid, align_corners=True
            )
            expected = pair.first[view, :, y, x]
            # The average over a pixel's four samples bends a little under perspective.
            assert torch.allclose(found[0, :, 0, 0], expected, atol=2e-3)


def test_homographies_stay_within_their_share_of_the_limits():
    generator = torch.Generator().manual_seed(0)
    mild = random_homographies(200, SMOKE.geometry, 0.1, generator)
    strong = random_homographies(200, SMOKE.geometry, 1.0, generator)
    assert (mild - torch.eye(3)).abs().max() < 0.2
    assert (strong - torch.eye(3)).abs().amax(dim=(1, 2)).max() > 0.5


def test_appearance_changes_values_but_not_size_and_differs_between_images():
    generator = torch.Generator().manual_seed(0)
    images = smooth_images(1, 64, 64).repeat(6, 1, 1, 1)
    changed = change_appearance(images, SMOKE.appearance, generator)
    assert changed.shape == images.shape
    assert changed.min() >= 0 and changed.max() <= 1
    assert torch.equal((changed * 255).round() / 255, changed)
    assert all((changed[0] - other).abs().max() > 0.02 for other in changed[1:])


def test_a_drawn_image_is_its_seeds():
    first, again, other = (drawn_image(np.random.default_rng(seed), 60, 80) for seed in (1, 1, 2))
    assert first.shape == (60, 80, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("size", [(50, 60), (80, 200), (300, 400), (120, 160)])
def test_a_photograph_fills_an_image_without_a_second_copy(size):
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    # Colours name the place: a pixel of the same colour shows the same place of the photograph.
    photograph = np.stack((x * 255 // size[1], y * 255 // size[0], 0 * x), axis=-1)
    for seed in range(8):
        image = fill_with(np.random.default_rng(seed), photograph.astype(np.uint8), 120, 160)
        assert image.shape == (120, 160, 3) and image.dtype == np.uint8
        # Along each axis the colour turns back at most once on either side.
        for axis in (0, 1):
            middle = np.take(image.astype(int), image.shape[axis] // 2, axis=1 - axis)
            varying = middle[:, np.ptp(middle, axis=0).argmax()]
            steps = np.sign(np.diff(varying))
            assert np.count_nonzero(np.diff(steps[steps != 0])) <= 2


def test_a_set_without_images_is_refused():
    pool = dataclasses.replace(SMOKE.pool, photographs=0, blended=0, drawn=0)
    with pytest.raises(InputError, match="no images"):
        make_pool(TRAIN, 1, pool)


def test_steps_take_the_image_sizes_in_turn():
    run = dataclasses.replace(SMOKE.run, image_sizes=[64, 96], batch_pixels=4 * 64**2)
    trainer = Trainer(dataclasses.replace(SMOKE, run=run), torch.device("cpu"))
    pool = torch.randint(256, (4, 100, 120, 3), dtype=torch.uint8)
    shapes = []
    for trainer.step in range(3):
        shapes.append(tuple(trainer.draw_pair(pool, 0.5).second.shape))
    assert shapes == [(4, 3, 64, 64), (1, 3, 96, 96), (4, 3, 64, 64)]


def test_settings_with_a_key_too_many_are_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.read_text().replace("jpeg = 0.3", "jpeg = 0.3\nfog = 1"))
    with pytest.raises(InputError, match="fog"):
        load_settings(path)


@pytest.mark.parametrize(
    ("setting", "value", "cure"),
    [
        ("batch_pixels", '"a"', "whole number"),
        ("batch_pixels", "1.5", "whole number"),
        ("batch_pixels", "0", "more than 0"),
        ("detected", "0", "more than 0"),
        ("blur", "-1", "from 0"),
        ("blur", "nan", "from 0"),
        ("detected", "450", "sides of the image"),
        ("model", "16", "text"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(tmp_path, setting, value, cure):
    path = tmp_path / "config.toml"
    path.write_text(
        re.sub(rf"^{setting} = .*$", f"{setting} = {value}", CONFIG.read_text(), flags=re.M)
    )
    with pytest.raises(InputError, match=rf"{setting} of .* is .*; give .*{cure}"):
        load_settings(path)


@pytest.mark.parametrize("sizes", ["320", "[]", "[320, 500]", "[0]", '["320"]'])
def test_settings_with_impossible_image_sizes_are_refused(tmp_path, sizes):
    path = tmp_path / "config.toml"
    path.write_text(
        CONFIG.read_text().replace("image_sizes = [480, 1024]", f"image_sizes = {sizes}")
    )
    with pytest.raises(InputError, match=r"image_sizes of \[validation\]"):
        load_settings(path)


def run(*arguments, environment=None):
    command = [sys.executable, "-m", "training.train", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1200)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("skimage", "sklearn"))),
    reason="needs the photographs of scikit-image and scikit-learn (extra train)",
)
def test_a_smoke_run_writes_weights_logs_and_a_checkpoint(tmp_path):
    result = run("--smoke", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "aliked-t16-homography.pth"
    assert path.stat().st_size < 1e6
    ALIKED("aliked-t16").load_state_dict(torch.load(path, weights_only=True), strict=True)
    with open(tmp_path / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["descriptor"]) > 0 for row in rows)
    with open(tmp_path / "validation.csv") as file:
        assert all(0 <= float(row["accuracy"]) <= 1 for row in csv.DictReader(file))
    ended = run("--smoke", "--output", tmp_path, "--resume", tmp_path / "checkpoint.pt")
    assert "after 4 steps" in ended.stdout


def test_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    pool = torch.randint(256, (4, 100, 120, 3), dtype=torch.uint8)
    settings = dataclasses.replace(SMOKE, run=dataclasses.replace(SMOKE.run, image_sizes=[64, 96]))
    straight = Trainer(settings, torch.device("cpu"))
    stopped = Trainer(settings, torch.device("cpu"))
    for _ in range(3):
        straight.train_step(pool, 0.5)
    stopped.train_step(pool, 0.5)
    stopped.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(settings, torch.device("cpu"))
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in range(2):
        resumed.train_step(pool, 0.5)
    assert resumed.step == 3
    for part in ("model", "average"):
        ends = (getattr(trainer, part).state_dict() for trainer in (straight, resumed))
        for one, other in zip(*(end.values() for end in ends), strict=True):
            # Threads add in any order: a few last bits of float32, amplified by three updates.
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("content", ["another file", "another state"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content == "another file":
        path.write_text("no checkpoint")
    else:
        torch.save({"step": 3}, path)
    with pytest.raises(InputError, match="cannot resume"):
        Trainer(SMOKE, torch.device("cpu")).load(path)


@pytest.mark.parametrize(("size", "new_size"), [((10, 8), (320, 256)), ((1, 5), (32, 40))])
def test_upsampling_by_products_is_interpolation(size, new_size):
    x = torch.rand(2, 3, *size)
    products = TrainableALIKED("aliked-t16").upsample(x, new_size)
    torch.testing.assert_close(
        products, ALIKED("aliked-t16").upsample(x, new_size), atol=1e-5, rtol=0
    )
