"""The quality of trained weights beside others: what is counted as a correct match."""

from pathlib import Path

from evaluation.systems import Baseline
from training.quality import CONSECUTIVE, STRENGTHS, folder_pairs, measure, table

FRAMES = Path(__file__).resolve().parents[2] / "assets" / "sequence_640x480"


def test_matches_under_known_homographies_and_of_consecutive_images_are_counted():
    pairs = folder_pairs(FRAMES, 1, seed=0)
    assert [pair.group for pair in pairs] == [*STRENGTHS, CONSECUTIVE]
    again = folder_pairs(FRAMES, 1, seed=0)
    for one, same in zip(pairs, again, strict=True):
        assert one.second.sha256 == same.second.sha256  # the pixels are the seed's
    records = measure("frames", pairs, "sift", Baseline("sift", 200))
    for record in records:
        assert 50 < record.matches <= 200
        assert 0.5 < record.accuracy <= 1
    mild, _, strong, _ = records
    assert mild.accuracy > strong.accuracy
    assert f"| frames | mild | {100 * mild.accuracy:.1f}, {mild.correct} |" in table(records)
