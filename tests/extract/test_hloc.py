"""The file of features given to hloc's own code (https://github.com/cvg/Hierarchical-Localization).

hloc is on no package index: these run where a checkout of it is on the path.
"""

from pathlib import Path

import numpy as np
import pytest

from aliked import extraction
from aliked.extraction import Job, extract
from aliked.matching import match_mutual
from aliked.store import FeatureStore
from tests.helpers.photos import Brightest, noise, write_photo

pytest.importorskip("hloc", reason="hloc is not on the path")


@pytest.fixture
def features(tmp_path, monkeypatch) -> Path:
    """Features of three photographs, one of them turned."""
    monkeypatch.setattr(extraction, "create_extractor", lambda name, spec: Brightest(40))
    for i, name in enumerate(("a.jpg", "night/b.png", "night/c.png")):
        write_photo(tmp_path / "photos" / name, noise(i), t0x112=6 if i == 2 else 1)
    job = Job(tmp_path / "photos")
    with FeatureStore.open(tmp_path / "features.h5", job.key()) as store:
        extract(job, store)
    return tmp_path / "features.h5"


def test_hloc_matches_what_we_match(features, tmp_path):
    from hloc import match_features
    from hloc.utils.io import get_matches

    pairs = tmp_path / "pairs.txt"
    pairs.write_text("a.jpg night/b.png\nnight/b.png night/c.png\n")
    matches = tmp_path / "matches.h5"
    match_features.main(match_features.confs["NN-mutual"], pairs, features, matches=matches)
    store = FeatureStore.open(features, Job(tmp_path / "photos").key())
    for first, second in (line.split() for line in pairs.read_text().splitlines()):
        found, _ = get_matches(matches, first, second)
        expected = match_mutual(store.read(first).descriptors, store.read(second).descriptors, -1)
        np.testing.assert_array_equal(found, expected)


def test_hloc_sees_the_pixels_and_the_names_that_our_keypoints_are_of(features, tmp_path):
    from hloc.extract_features import ImageDataset
    from hloc.utils.io import get_keypoints, list_h5_names, read_image

    photos = tmp_path / "photos"
    names = ImageDataset(photos, {}).names
    assert sorted(list_h5_names(features)) == sorted(names)
    for name in names:
        x, y = get_keypoints(features, name).astype(int).T
        red = read_image(photos / name)[..., 0]
        assert red[y, x].min() >= np.sort(red.ravel())[-40]  # where the extractor looks
