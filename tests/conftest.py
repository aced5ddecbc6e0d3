"""What the tests share: the private reference data, and a server and a cache of their own."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from aliked.backends.tensorrt_library import TF32_OVERRIDE, tf32_settled
from tests.helpers import file_server


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the project, which is not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the reference data (../shared) is not here")
    return folder


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """A folder with the four official weights."""
    default = Path(__file__).resolve().parents[2] / "shared" / "weights"
    folder = Path(os.environ.get("ALIKED_WEIGHTS_DIR") or default)
    if not folder.is_dir():
        pytest.skip("no official weights: set ALIKED_WEIGHTS_DIR to a folder that holds them")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[file_server.FileServer]:
    """A web server on this machine, reached without any proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with file_server.running() as server:
        yield server


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty user cache instead of the real one, and no `$ALIKED_WEIGHTS_DIR`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ALIKED_WEIGHTS_DIR", raising=False)
    return tmp_path / "cache" / "aliked"


@pytest.fixture(autouse=True)
def tf32_not_settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing settled about TF32, as in a new process, and nothing left behind."""
    monkeypatch.setenv(TF32_OVERRIDE, "1")
    monkeypatch.delenv(TF32_OVERRIDE)
    tf32_settled.cache_clear()
    yield
    tf32_settled.cache_clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once per reason how many tests were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped, {count}: {reason}")
