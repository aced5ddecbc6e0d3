"""Finding the official weights: the order of the places, the checksum, the sentences."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aliked import weights
from aliked.configs import CONFIGS, OFFICIAL
from aliked.download import RemoteFile
from aliked.errors import InputError
from aliked.model import ALIKED
from aliked.weights import describe_weights, find_weights, load_state_dict
from tests.helpers.file_server import FileServer

NOBODY = "http://127.0.0.1:9"  # the discard port: no server listens there


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, bytes]:
    """Stand-ins for the official files, in a table of their own; nobody serves them."""
    contents = {name: f"the weights of {name}".encode() for name in OFFICIAL}
    files = tuple(
        RemoteFile(f"{name}.pth", len(data), hashlib.sha256(data).hexdigest())
        for name, data in contents.items()
    )
    table = replace(weights.WEIGHTS, base_url=NOBODY, files=files)
    monkeypatch.setattr(weights, "WEIGHTS", table)
    return contents


def put(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pth"
    path.write_bytes(data)
    return path


def test_path_comes_before_environment_before_cache(
    contents: dict[str, bytes], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, data = "aliked-n16", contents["aliked-n16"]
    in_cache = put(cache, name, data)
    assert find_weights(name) == in_cache
    in_environment = put(tmp_path / "environment", name, data)
    monkeypatch.setenv("ALIKED_WEIGHTS_DIR", str(in_environment.parent))
    assert find_weights(name) == in_environment
    given = put(tmp_path / "given", name, data).rename(tmp_path / "given" / "renamed.pth")
    assert find_weights(name, given) == given


def test_path_may_be_a_folder(contents: dict[str, bytes], tmp_path: Path) -> None:
    path = put(tmp_path / "given", "aliked-n32", contents["aliked-n32"])
    assert find_weights("aliked-n32", path.parent) == path


def test_environment_folder_without_the_file_is_passed_over(
    contents: dict[str, bytes], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache = put(cache, "aliked-n16", contents["aliked-n16"])
    monkeypatch.setenv("ALIKED_WEIGHTS_DIR", str(tmp_path))
    assert find_weights("aliked-n16") == in_cache


def test_missing_weights_are_downloaded_into_the_cache_once(
    contents: dict[str, bytes], cache: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WEIGHTS", replace(weights.WEIGHTS, base_url=server.url))
    server.files["/models/aliked-t16.pth"] = contents["aliked-t16"]
    for _ in range(2):
        assert find_weights("aliked-t16") == cache / "aliked-t16.pth"
    assert (cache / "aliked-t16.pth").read_bytes() == contents["aliked-t16"]
    assert len(server.requests) == 1


def test_without_network_the_sentence_names_file_url_and_folder(
    contents: dict[str, bytes], cache: Path
) -> None:
    with pytest.raises(InputError) as error:
        find_weights("aliked-n16")
    for part in ("aliked-n16.pth", f"{NOBODY}/models/aliked-n16.pth", str(cache)):
        assert part in str(error.value)


def test_weights_of_another_variant_are_recognised(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    path = put(tmp_path, "aliked-n16", contents["aliked-n16rot"])
    with pytest.raises(InputError, match="is the official aliked-n16rot file") as error:
        find_weights("aliked-n16", path)
    assert "pass --model aliked-n16rot" in str(error.value)


@pytest.mark.parametrize("place", ["given", "environment", "cache"])
def test_corrupt_weights_are_refused_wherever_they_lie(
    contents: dict[str, bytes],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    folder = cache if place == "cache" else tmp_path / place
    path = put(folder, "aliked-n16", contents["aliked-n16"][:-1])
    if place == "environment":
        monkeypatch.setenv("ALIKED_WEIGHTS_DIR", str(folder))
    with pytest.raises(InputError, match="corrupt or not official") as error:
        find_weights("aliked-n16", path.parent if place == "given" else None)
    assert str(path) in str(error.value)
    assert f"download_data.py weights --model aliked-n16 --output {folder}" in str(error.value)


def test_a_path_that_does_not_exist_is_not_replaced_by_a_download(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth \(No such file or directory\)"):
        find_weights("aliked-n16", tmp_path / "nowhere.pth")


def test_unknown_model_is_refused() -> None:
    with pytest.raises(InputError, match="unknown model 'aliked-n17'"):
        find_weights("aliked-n17")


def test_shipped_weights_load_without_network_or_cache(cache: Path) -> None:
    ALIKED.from_pretrained("aliked-t16-homography")
    assert not cache.exists()


def test_another_training_of_a_shipped_model_can_be_given(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    torch.save(ALIKED("aliked-t16-homography").state_dict(), path)
    assert find_weights("aliked-t16-homography", path) == path
    ALIKED.from_pretrained("aliked-t16-homography", weights=path)


def test_official_weights_do_not_pass_for_shipped_ones(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    path = put(tmp_path, "aliked-t16-homography", contents["aliked-t16"])
    with pytest.raises(InputError, match="is the official aliked-t16 file"):
        find_weights("aliked-t16-homography", path)


@pytest.mark.parametrize("data", [b"", b"no weights", "another model"])
def test_a_file_without_the_models_weights_is_refused(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "mine.pth"
    if data == "another model":
        torch.save(ALIKED("aliked-n16").state_dict(), path)
    else:
        path.write_bytes(data)
    with pytest.raises(InputError, match=r"mine\.pth"):
        ALIKED.from_pretrained("aliked-t16-homography", weights=path)


SHIPPED = "aliked-t16-homography"


def saved(path: Path, state: object, **options) -> Path:
    """A file with what a training may have put into it."""
    torch.save(state, path, **options)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: (
            {f"extractor.{k}": v for k, v in state.items()} | {"matcher.w": torch.ones(1)}
        ),
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    ],
    ids=["plain", "state_dict", "module.", "extractor.", "no counters", "half"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_training_wraps_weights_in_is_unwrapped(tmp_path, wrap, zipped):
    state = load_state_dict(SHIPPED)
    path = saved(tmp_path / "mine.pth", wrap(state), _use_new_zipfile_serialization=zipped)
    found = ALIKED.from_pretrained(SHIPPED, weights=path).state_dict()
    expected = ALIKED.from_pretrained(SHIPPED).state_dict()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=2e-3, rtol=2e-2), key


def test_safetensors_are_read_and_found_in_a_folder(tmp_path):
    state = {name: rows.contiguous() for name, rows in load_state_dict(SHIPPED).items()}
    path = tmp_path / f"{SHIPPED}.safetensors"
    save_file(state, path)
    found = load_state_dict(SHIPPED, tmp_path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], rows) for name, rows in state.items())
    ALIKED.from_pretrained(SHIPPED, weights=path)


@pytest.mark.parametrize("cut", [0, 4, 300, -1])
def test_safetensors_that_are_not_whole_are_refused(tmp_path, cut):
    path = tmp_path / "mine.safetensors"
    save_file({"block1.conv1.weight": torch.ones(8, 3, 3, 3)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="is no whole file of safetensors"):
        ALIKED.from_pretrained(SHIPPED, weights=path)


def test_a_type_of_eight_bits_is_judged_like_the_others(tmp_path):
    state = load_state_dict(SHIPPED)
    state["conv1.weight"] = torch.full_like(state["conv1.weight"], float("nan"))
    state["conv1.weight"] = state["conv1.weight"].to(torch.float8_e4m3fn)
    path = saved(tmp_path / "eight.pth", state)
    with pytest.raises(InputError, match=r"holds NaN or infinity in conv1\.weight"):
        ALIKED.from_pretrained(SHIPPED, weights=path)


def test_a_file_is_taken_at_its_word_whatever_its_checksum(weights_dir, tmp_path):
    path = saved(tmp_path / "again.pth", load_state_dict("aliked-n16", weights_dir))
    assert find_weights("aliked-n16", path) == path
    assert "official" not in describe_weights("aliked-n16", path)
    ALIKED.from_pretrained("aliked-n16", weights=path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    state = load_state_dict(SHIPPED)
    state["conv2.weight"] = state["conv2.weight"].clone()
    state["conv2.weight"].view(-1)[3] = value
    with pytest.raises(InputError, match=r"mine\.pth holds NaN or infinity in conv2\.weight"):
        ALIKED.from_pretrained(SHIPPED, weights=saved(tmp_path / "mine.pth", state))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {k: v for k, v in state.items() if k != "conv1.weight"},
        lambda state: state | {"conv1.weight": torch.ones(3)},
        lambda state: state | {"another.weight": torch.ones(3)},
        lambda state: state | {"conv1.weight": state["conv1.weight"].long()},
        lambda state: state | {"conv1.weight": state["conv1.weight"].to_sparse()},
        lambda state: [1, 2, 3],
        lambda state: {"state_dict": None},
        lambda state: {1: torch.ones(2)},
        lambda state: torch.ones(2),
    ],
)
def test_tensors_that_do_not_fit_are_one_short_sentence(tmp_path, change):
    path = saved(tmp_path / "mine.pth", change(load_state_dict(SHIPPED)))
    with pytest.raises(InputError, match=r"mine\.pth") as error:
        ALIKED.from_pretrained(SHIPPED, weights=path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_what_is_no_file_of_a_sane_size_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "link.pth").symlink_to("/dev/zero")
    with open(tmp_path / "huge.pth", "wb") as file:
        file.truncate(2**40)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2**9):
            archive.writestr(f"archive/data/{number}", bytes(2**20))
    for name in ("fifo", "link", "huge", "bomb"):
        with pytest.raises(InputError, match=rf"{name}\.pth"):
            ALIKED.from_pretrained(SHIPPED, weights=tmp_path / f"{name}.pth")


class Code:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("was_run",)


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="PyTorch cannot load it"):
        ALIKED.from_pretrained(SHIPPED, weights=saved(tmp_path / "mine.pth", {"a": Code()}))
    assert not (tmp_path / "was_run").exists()


def test_without_a_home_folder_the_sentence_says_what_to_set(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where no user is known
    with pytest.raises(InputError, match="set HOME, or XDG_CACHE_HOME"):
        weights.cache_dir()


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_load(weights_dir: Path, name: str) -> None:
    state = load_state_dict(name, weights_dir)
    positions, dim = CONFIGS[name].num_positions, CONFIGS[name].dim
    assert state["desc_head.agg_weights"].shape == (positions, dim, dim)
    assert all(value.device.type == "cpu" for value in state.values())
