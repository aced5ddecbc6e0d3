"""Pairs with known homographies, from folders that are right and from folders that are not."""

import hashlib
import io
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import download_data
from aliked import hpatches
from aliked.download import RemoteFile
from aliked.errors import InputError
from evaluation.changes import CHANGES, LEVELS
from evaluation.homography_datasets import load_dataset, read_homographies
from tests.helpers.file_server import FileServer
from tests.helpers.planes import moved, write_scene, write_sequence

SHIPPED = Path(__file__).resolve().parents[2] / "assets"


def test_hpatches_scenes_are_grouped_by_what_changes(tmp_path):
    write_scene(tmp_path / "v_wall", [(3, 4), (5, 6)])
    write_scene(tmp_path / "i_dome", [(0, 0)])
    dataset = load_dataset(tmp_path, resize=None)
    assert [(pair.name, pair.group) for pair in dataset.pairs] == [
        ("i_dome 1-2", "illumination"),
        ("v_wall 1-2", "viewpoint"),
        ("v_wall 1-3", "viewpoint"),
    ]
    assert np.array_equal(dataset.pairs[2].truth, moved(5, 6))
    assert len(dataset.images) == 5  # each once, though image 1 is in several pairs


def test_scenes_can_be_left_out(tmp_path):
    for name in ("i_dc", "i_dome"):
        write_scene(tmp_path / name, [(0, 0)])
    pairs = load_dataset(tmp_path, None, leave_out=hpatches.LARGE).pairs
    assert [pair.name for pair in pairs] == ["i_dome 1-2"]


def test_116_scenes_less_the_large_ones_are_108():
    scenes = hpatches.official_scenes()
    assert len(set(scenes)) == 116 and len(set(scenes) - set(hpatches.LARGE)) == 108
    assert [sum(name[0] == kind for name in scenes) for kind in "iv"] == [57, 59]


def test_a_sequence_is_extended_by_changes_of_two_of_its_frames(tmp_path):
    write_sequence(tmp_path / "sequence", [(3, 4), (5, 6)])
    dataset = load_dataset(tmp_path, resize=None)
    groups = [pair.group for pair in dataset.pairs]
    assert groups.count("sequence") == 2
    assert all(groups.count(kind) == 2 * LEVELS for kind in CHANGES)
    assert len({pair.name for pair in dataset.pairs}) == len(dataset.pairs)


def test_sequences_come_before_an_hpatches_folder_beside_them(tmp_path):
    write_sequence(tmp_path / "sequence", [(3, 4)])
    write_scene(tmp_path / hpatches.FOLDER / "i_dome", [(0, 0)])
    assert {pair.group for pair in load_dataset(tmp_path, None).pairs} == {"sequence", *CHANGES}


def test_the_shipped_data_is_the_same_every_time():
    """Two loads, and a frame pair's homography as its file has it."""
    first, again = (load_dataset(SHIPPED / "sequence_640x480", None) for _ in range(2))
    for a, b in zip(first.pairs, again.pairs, strict=True):
        assert a.name == b.name and a.second.sha256 == b.second.sha256
    assert np.allclose(first.pairs[0].truth[0, 2], -32.610199334279685)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 0 0\n0 1 0\n", "ends at line 2 with 2 rows"),
        ("1 0 0\n0 one 0\n0 0 1\n", "line 2 of .* is '0 one 0'"),
        ("1 0 0\n# a comment\n0 1 nan\n0 0 1\n", "line 3 of .* is '0 1 nan'"),
        ("1 0\n0 1\n0 0\n", "line 1 of .* is '1 0'"),
        ("1 0 0\n2 0 0\n0 0 1\n", "matrix 1 of .* is singular"),
        ("", "with 0 rows"),
    ],
)
def test_an_unreadable_homography_is_named_with_its_line(text, sentence, tmp_path):
    path = tmp_path / "H_1_2"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence) as error:
        read_homographies(path, 1)
    assert str(path) in str(error.value)


def test_a_scene_without_one_of_its_images_is_named(tmp_path):
    write_scene(tmp_path / "v_wall", [(3, 4), (5, 6)])
    (tmp_path / "v_wall" / "3.ppm").unlink()
    with pytest.raises(InputError, match="v_wall has no image 3"):
        load_dataset(tmp_path, None)


def test_a_sequence_with_too_few_homographies_is_named(tmp_path):
    folder = write_sequence(tmp_path / "sequence", [(3, 4), (5, 6)])
    lines = (folder / "homographies.txt").read_text().splitlines()
    (folder / "homographies.txt").write_text("\n".join(lines[:-3]))
    with pytest.raises(InputError, match=r"homographies\.txt .* 6 rows .* should be 9 rows"):
        load_dataset(tmp_path, None)


def test_a_half_downloaded_hpatches_is_named_with_the_command(tmp_path):
    write_scene(tmp_path / hpatches.FOLDER / "i_dome", [(0, 0)] * 5)
    with pytest.raises(InputError, match=r"lacks 115 .*python download_data\.py hpatches"):
        load_dataset(tmp_path, None)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_pairs_is_named_with_the_command(name, tmp_path):
    with pytest.raises(InputError, match=r"python download_data\.py hpatches"):
        load_dataset(tmp_path / name, None)


def packed(scenes: list[str]) -> bytes:
    """An archive as the authors', of empty files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for scene in scenes:
            names = [f"{n}.ppm" for n in range(1, 7)] + [f"H_1_{n}" for n in range(2, 7)]
            for name in names:
                file.writestr(f"{hpatches.FOLDER}/{scene}/{name}", "")
        file.writestr("__MACOSX/x", "")
    return buffer.getvalue()


@pytest.fixture
def archive(server: FileServer, monkeypatch):
    """Makes the local server offer these scenes as HPatches; the set of files."""

    def offer(scenes: list[str]):
        data = packed(scenes)
        file = RemoteFile("h.zip", len(data), hashlib.sha256(data).hexdigest())
        files = replace(hpatches.ARCHIVE, base_url=server.url, files=(file,))
        server.files = {"/main/h.zip": data}
        monkeypatch.setattr(hpatches, "ARCHIVE", files)
        return files

    return offer


def test_hpatches_is_downloaded_unpacked_and_then_left_alone(archive, server, tmp_path, capsys):
    archive(hpatches.official_scenes())
    args = download_data.parser().parse_args(["hpatches", "--output", str(tmp_path)])
    download_data.main(args)
    assert not hpatches.missing_scenes(tmp_path / hpatches.FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == [hpatches.FOLDER]
    assert "downloaded 1276 of 1276 files" in capsys.readouterr().out
    download_data.main(args)
    assert "already complete" in capsys.readouterr().out and len(server.requests) == 1


def test_an_interrupted_download_of_hpatches_goes_on(archive, server, tmp_path):
    files = archive(hpatches.official_scenes())
    server.close_after = 1000
    with pytest.raises(InputError, match="run the same command again to go on"):
        hpatches.download(tmp_path, files)
    server.close_after = None
    assert hpatches.download(tmp_path, files) == hpatches.NUM_FILES
    assert server.requests[-1][1] == "bytes=1000-"


def test_an_archive_that_lacks_scenes_is_named(archive, tmp_path):
    files = archive(hpatches.official_scenes()[1:])
    missing = hpatches.official_scenes()[0]
    with pytest.raises(InputError, match=re.escape(f"lacks 1 of the scenes, such as {missing}")):
        hpatches.download(tmp_path, files)
