"""Adapter for `check_goldens.py`: this project's PyTorch model, everything it can return."""

import numpy as np
import torch

from aliked.model import ALIKED, to_tensor


def extract(name, image, top_k, scores_th, n_limit, weights_path):
    """Run the model on one image; arrays by name, fill-ins removed."""
    model = ALIKED.from_pretrained(name, top_k, scores_th, n_limit, weights=weights_path)
    with torch.inference_mode():
        images = to_tensor(torch.from_numpy(np.ascontiguousarray(image[None])))
        features, score_map = model.dense(images)
        output = model.describe(features, model.detect(score_map))
    kept = output.scores[0] > 0
    arrays = {name: getattr(output, name)[0][kept] for name in output._fields}
    return arrays | {"score_map": score_map[0, 0], "feature_map": features[0]}
