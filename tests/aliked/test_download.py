"""Downloads: whole or not at all, resumed, checked. The server is on this machine."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import download_data
from aliked import download
from aliked.commands import download as command
from aliked.download import FileSet, RemoteFile, fetch
from aliked.errors import InputError
from aliked.weights import LIGHTGLUE
from tests.helpers.file_server import FileServer

CONTENT = bytes(range(256)) * 1000
FILE = RemoteFile("photo.png", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
PROJECT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"  # the discard port: no server listens there


@pytest.fixture
def files(server: FileServer) -> FileSet:
    """A set of one file that the server has."""
    server.files["/assets/clip/photo.png"] = CONTENT
    return FileSet("a clip", "CC0", server.url, "assets/clip", (FILE,))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_the_file_and_nothing_else(files: FileSet, tmp_path: Path) -> None:
    assert fetch(files, tmp_path / "new") == [tmp_path / "new" / "photo.png"]
    assert (tmp_path / "new" / "photo.png").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["photo.png"]


def test_broken_connection_is_named_and_the_next_call_goes_on(
    files: FileSet, server: FileServer, tmp_path: Path
) -> None:
    server.close_after = 100_000
    with pytest.raises(InputError, match=r"closed after 100000 of 256000 bytes") as error:
        fetch(files, tmp_path)
    for part in ("photo.png", f"{server.url}/assets/clip/photo.png", str(tmp_path)):
        assert part in str(error.value)
    assert not (tmp_path / "photo.png").exists()

    server.close_after = None
    fetch(files, tmp_path)
    assert server.requests[-1] == ("/assets/clip/photo.png", "bytes=100000-")
    assert (tmp_path / "photo.png").read_bytes() == CONTENT
    assert names(tmp_path) == ["photo.png"]


def test_starts_again_where_the_server_ignores_ranges(
    files: FileSet, server: FileServer, tmp_path: Path
) -> None:
    server.close_after = 100_000
    with pytest.raises(InputError):
        fetch(files, tmp_path)
    server.close_after, server.supports_ranges = None, False
    fetch(files, tmp_path)
    assert (tmp_path / "photo.png").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "sent",
    [b"<html>log in first</html>", CONTENT[:-1] + b"?"],
    ids=["short", "same size"],
)
def test_wrong_content_leaves_nothing_and_names_both_checksums(
    files: FileSet, server: FileServer, tmp_path: Path, sent: bytes
) -> None:
    server.files["/assets/clip/photo.png"] = sent
    with pytest.raises(InputError, match=r"photo\.png") as error:
        fetch(files, tmp_path)
    assert FILE.sha256 in str(error.value)
    assert hashlib.sha256(sent).hexdigest() in str(error.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("promised", [True, False])
def test_a_download_stops_at_the_size_that_the_file_has(
    files: FileSet, server: FileServer, tmp_path: Path, promised: bool
) -> None:
    """Whether the server says beforehand that it sends more, or never ends."""
    server.files["/assets/clip/photo.png"] = CONTENT * 100
    server.tells_length = promised
    with pytest.raises(InputError, match="sends more than the 256000 bytes") as error:
        fetch(files, tmp_path)
    assert "photo.png" in str(error.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_in_the_place_of_the_partial_file_is_not_followed(
    files: FileSet, tmp_path: Path, kind: str
) -> None:
    mine, folder = tmp_path / "mine.txt", tmp_path / "clip"
    mine.write_bytes(b"mine")
    folder.mkdir()
    partial = folder / ".photo.png.partial"
    if kind == "symbolic":
        partial.symlink_to(mine)
    else:
        partial.hardlink_to(mine)
    with pytest.raises(InputError, match=r"\.photo\.png\.partial"):
        fetch(files, folder)
    assert mine.read_bytes() == b"mine"


def test_a_fifo_in_the_place_of_the_partial_file_is_refused(files: FileSet, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".photo.png.partial")
    with pytest.raises(InputError, match="no regular file"):
        fetch(files, tmp_path)


def test_a_partial_file_of_another_origin_is_dropped(files: FileSet, tmp_path: Path) -> None:
    (tmp_path / ".photo.png.partial").write_bytes(b"not the beginning of the photograph")
    with pytest.raises(InputError, match="SHA-256"):
        fetch(files, tmp_path)
    fetch(files, tmp_path)
    assert (tmp_path / "photo.png").read_bytes() == CONTENT


def test_a_download_stopped_before_the_rename_needs_no_server(
    files: FileSet, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / ".photo.png.partial").write_bytes(CONTENT)
    fetch(files, tmp_path)
    assert names(tmp_path) == ["photo.png"]
    assert server.requests == []


def test_a_complete_file_is_not_downloaded_again_and_a_wrong_one_is(
    files: FileSet, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(CONTENT)
    assert fetch(files, tmp_path) == []
    assert server.requests == []
    (tmp_path / "photo.png").write_bytes(CONTENT[::-1])
    fetch(files, tmp_path)
    assert (tmp_path / "photo.png").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("base_url", "reason"),
    [(NOBODY, "Connection refused"), ("no-scheme", "unknown url type"), (None, "404")],
)
def test_failed_request_is_one_sentence_and_leaves_nothing(
    server: FileServer, tmp_path: Path, base_url: str | None, reason: str
) -> None:
    files = FileSet("a clip", "CC0", base_url or server.url, "gone", (FILE,))
    with pytest.raises(InputError, match=reason) as error:
        fetch(files, tmp_path)
    for part in ("photo.png", files.url(FILE), str(tmp_path)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


def test_two_downloads_at_once_share_one_transfer(
    files: FileSet, server: FileServer, tmp_path: Path
) -> None:
    server.close_after = len(CONTENT)
    server.stall.clear()  # the first transfer stays open until the second call is under way
    threads = [threading.Thread(target=fetch, args=(files, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.stall.set()
    for thread in threads:
        thread.join(timeout=20)
    assert (tmp_path / "photo.png").read_bytes() == CONTENT
    assert names(tmp_path) == ["photo.png"]
    assert len(server.requests) == 1


@pytest.fixture
def command_line(
    files: FileSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> Path:
    """A working directory in which the data set "tum" is the server's one file."""
    monkeypatch.setitem(download.datasets(), "tum", files)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(*arguments: str) -> None:
    download_data.main(download_data.parser().parse_args(arguments))


def test_the_command_says_licence_and_place_then_that_it_is_complete(
    command_line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("tum")
    assert (command_line / "assets/clip/photo.png").read_bytes() == CONTENT
    first = capsys.readouterr().out
    assert first.count("licence CC0") == 1
    assert "downloaded 1 of 1 files to assets/clip" in first
    run_script("tum")
    assert "already complete in assets/clip" in capsys.readouterr().out


def test_the_command_downloads_from_a_mirror_into_a_chosen_folder(
    command_line: Path, server: FileServer
) -> None:
    server.files["/mirror/assets/clip/photo.png"] = CONTENT
    run_script("tum", "--base_url", f"{server.url}/mirror/", "--output", "here")
    assert (command_line / "here/photo.png").read_bytes() == CONTENT
    assert server.requests == [("/mirror/assets/clip/photo.png", None)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tum", "kitti", "--output", "here"], "--output takes the files of one name"),
        (["tum", "--model", "aliked-n16"], "--model chooses among the weights"),
        (["weights", "--model", "aliked-n17"], "unknown model 'aliked-n17'"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit(
    command_line: Path, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        run_script(*arguments)


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "download_data.py", *arguments],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, interrupts are ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_the_command_without_network_exits_2_with_one_sentence(cache: Path) -> None:
    process = start("weights", "--model", "aliked-t16", "--base_url", NOBODY)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    sentence = stderr.splitlines()[-1]
    for part in ("aliked-t16.pth", f"{NOBODY}/models/aliked-t16.pth", str(cache)):
        assert part in sentence
    assert "Traceback" not in stderr


def test_the_matchers_weights_are_a_models_of_their_own() -> None:
    args = download_data.parser().parse_args(["weights", "--model", LIGHTGLUE])
    (wanted,) = command.file_sets(args).values()
    assert [file.name for file in wanted.files] == ["aliked_lightglue.pth"]


def test_the_command_needs_no_pytorch() -> None:
    code = "import sys, download_data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_interrupting_the_command_keeps_what_has_arrived(server: FileServer, cache: Path) -> None:
    server.files["/models/aliked-t16.pth"] = bytes(794859)
    server.close_after = 400_000
    server.stall.clear()
    partial = cache / ".aliked-t16.pth.partial"
    process = start("weights", "--model", "aliked-t16", "--base_url", server.url)
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert names(cache) == [partial.name]
    assert 0 < partial.stat().st_size <= 400_000
