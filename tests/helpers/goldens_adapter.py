"""Adapters for `check_goldens.py`: this project's PyTorch model, everything it can return, and the
fused kernels, which return keypoints, scores and descriptors.

They run on `$ALIKED_TEST_DEVICE` in `$ALIKED_TEST_PRECISION`, by default the CPU in fp32.
"""

import os
from pathlib import Path

import numpy as np
import torch

from aliked.backends import Spec, create_extractor
from aliked.model import ALIKED, plain_float32, to_tensor

# The last image's maps: goldens of both modes follow each other, and the maps do not know the mode.
MAPS: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


def extract(name, image, top_k, scores_th, n_limit, weights_path):
    """Run the model on one image; arrays by name, fill-ins removed."""
    device = os.environ.get("ALIKED_TEST_DEVICE", "cpu")
    precision = os.environ.get("ALIKED_TEST_PRECISION", "fp32")
    model = ALIKED.from_pretrained(
        *(name, top_k, scores_th, n_limit, weights_path), device=device, precision=precision
    )
    key = (name, weights_path, device, precision, image.shape, image.tobytes())
    with torch.inference_mode(), plain_float32():
        if key not in MAPS:
            MAPS.clear()
            images = to_tensor(torch.from_numpy(np.ascontiguousarray(image[None])).to(device))
            MAPS[key] = model.dense(images)
        features, score_map = MAPS[key]
        output = model.describe(features, model.detect(score_map))
    kept = output.scores[0] > 0
    arrays = {name: getattr(output, name)[0][kept] for name in output._fields}
    arrays |= {"score_map": score_map[0, 0], "feature_map": features[0]}
    return {name: array.cpu() for name, array in arrays.items()}


def extract_fused(name, image, top_k, scores_th, n_limit, weights_path):
    """Run the fused kernels on one image; arrays by name, fill-ins removed."""
    precision = os.environ.get("ALIKED_TEST_PRECISION", "fp32")
    spec = Spec(
        *(name, top_k, scores_th, n_limit), precision, device="cuda", weights=Path(weights_path)
    )
    features = create_extractor("fused", spec)(np.ascontiguousarray(image))
    return {name: getattr(features, name) for name in ("keypoints", "scores", "descriptors")}
