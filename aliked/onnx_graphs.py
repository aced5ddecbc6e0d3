"""What an exported file computes: the model between the inputs and outputs of each contract."""

import torch
from torch import nn

from aliked.detection import inner, refine, suppress_non_maxima
from aliked.model import ALIKED, to_tensor


class ImageGraph(nn.Module):
    """The default contract: `image` to `keypoints` in pixels, `descriptors` and `scores`.

    `image` is float32 [B, 3, H, W] in [0, 1], or uint8 [B, H, W, 3] with `uint8_input`. In
    threshold mode the rows come in descending order too, and `nms_scores` is an output: cut on it
    for a higher threshold.
    """

    def __init__(self, model: ALIKED, uint8_input: bool):
        super().__init__()
        self.model = model
        self.uint8_input = uint8_input
        self.output_names = ["keypoints", "descriptors", "scores"]
        if model.top_k <= 0:
            self.output_names.append("nms_scores")

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The outputs in the order of `output_names`."""
        output = self.model(to_tensor(image) if self.uint8_input else image)
        return [getattr(output, name) for name in self.output_names]


class ColmapGraph(nn.Module):
    """COLMAP's contract: how many keypoints there are is decided when the file runs.

    `image` float32 [1, 3, H, W] in [0, 1], padded to a multiple of 32 by the caller;
    `max_keypoints` int64 scalar; `min_score` float32 scalar, for the score at the maximum.
    Returns keypoints [1, K, 2] with the centres of the corner pixels at -1 and 1, descriptors
    [1, K, D] and scores [1, K], in descending order of the score at the maximum.
    """

    output_names = ("keypoints", "descriptors", "scores")

    def __init__(self, model: ALIKED):
        super().__init__()
        self.model = model

    def forward(
        self, image: torch.Tensor, max_keypoints: torch.Tensor, min_score: torch.Tensor
    ) -> list[torch.Tensor]:
        """The outputs in the order of `output_names`."""
        features, score_map = self.model.encode(image)
        candidates = inner(suppress_non_maxima(score_map, self.model.form.exported))
        passing = (candidates > min_score.clamp(min=0)).sum()
        k = torch.minimum(max_keypoints, passing)
        if not torch.jit.is_tracing():  # a trace keeps the tensor, torch.export wants a symbol
            k = k.item()
            torch._check(k >= 0)
            torch._check(k <= candidates.shape[1])
        found = refine(score_map, *candidates.topk(k, dim=1), self.model.form)
        output = self.model.describe(features, found)
        height, width = image.shape[-2:]
        x, y = output.keypoints.unbind(2)
        keypoints = torch.stack((x * 2 / (width - 1) - 1, y * 2 / (height - 1) - 1), dim=2)
        return [keypoints, output.descriptors, output.scores]
