"""Image folders that can be downloaded: when a script offers it, and what it says otherwise."""

import hashlib
import io
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aliked.download import RemoteFile, datasets, is_complete, offer_download
from aliked.errors import InputError
from tests.helpers.file_server import FileServer

PHOTOS = {f"{number}.png": f"photograph {number}".encode() for number in range(3)}


class Terminal(io.StringIO):
    """A standard input that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`assets/tum`, of three small files that the server has; there is no terminal."""
    server.files = {f"/assets/tum/{name}": data for name, data in PHOTOS.items()}
    files = tuple(
        RemoteFile(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in PHOTOS.items()
    )
    small = replace(datasets()["tum"], base_url=server.url, files=files)
    monkeypatch.setitem(datasets(), "tum", small)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    return Path("assets/tum")


def fill(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(PHOTOS.get(name, b"another"))


@pytest.mark.parametrize("given", ["assets/tum", "assets/tum/", "./assets/../assets/tum"])
def test_missing_folder_is_named_with_the_command(folder: Path, given: str) -> None:
    with pytest.raises(InputError, match=re.escape("`python download_data.py tum`")) as error:
        offer_download(Path(given))
    assert "assets/tum is missing" in str(error.value)
    assert not folder.exists()


def test_folder_elsewhere_is_named_with_the_output_option(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other" / "assets" / "tum"
    with pytest.raises(InputError, match=re.escape(f"tum --output {elsewhere}`")):
        offer_download(elsewhere)


def test_half_downloaded_folder_is_named_with_the_command(folder: Path) -> None:
    fill(folder, ["0.png", "2.png", ".1.png.partial"])
    with pytest.raises(InputError, match="only 2 of its 3 images") as error:
        offer_download(folder)
    assert "`python download_data.py tum`" in str(error.value)


@pytest.mark.parametrize("names", [list(PHOTOS), ["0.png", "mine.png"], ["mine.png"]])
def test_complete_folder_and_own_images_are_left_alone(folder: Path, names: list[str]) -> None:
    fill(folder, names)
    offer_download(folder)
    assert sorted(os.listdir(folder)) == sorted(names)


@pytest.mark.parametrize("given", ["images", "tum", "assets/tum/sub", "assets"])
def test_other_folders_are_left_alone(folder: Path, given: str) -> None:
    offer_download(Path(given))
    assert not Path(given).exists()


@pytest.mark.parametrize("present", [[], ["1.png"]])
def test_yes_on_a_terminal_downloads_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer, present: list[str]
) -> None:
    fill(folder, present)
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    offer_download(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == PHOTOS
    assert len(server.requests) == len(PHOTOS) - len(present)


@pytest.mark.parametrize("answer", ["\n", "n\n", ""], ids=["enter", "no", "end of input"])
def test_anything_else_on_a_terminal_downloads_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    with pytest.raises(InputError, match=re.escape("`python download_data.py tum`")):
        offer_download(folder)
    assert "licence CC BY 4.0? [y/N]" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize("name", ["tum", "kitti"])
def test_the_table_has_the_published_frames(shared: Path, name: str) -> None:
    files = datasets()[name].files
    assert len(files) == 20
    assert all(is_complete(shared / "images" / name / file.name, file) for file in files)
