"""`extract.py` as users run it: killed, resumed, shared by processes, given what cannot be used."""

import errno
import io
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest

import extract as script
from aliked import extraction, store, workers
from aliked.configs import Spec
from aliked.errors import InputError
from aliked.extraction import Job
from aliked.files import only_writer
from tests.helpers.photos import Brightest, noise, write_photo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def extractor(monkeypatch) -> Brightest:
    """In place of every backend."""
    extractor = Brightest()
    monkeypatch.setattr(extraction, "create_extractor", lambda name, spec: extractor)
    return extractor


@pytest.fixture
def photos(tmp_path) -> Path:
    """Nine photographs of two sizes in two folders."""
    for i in range(9):
        name, size = (f"a/{i}.png", (64, 48)) if i % 2 else (f"b/{i}.jpg", (48, 64))
        write_photo(tmp_path / "photos" / name, noise(i, *size))
    return tmp_path / "photos"


def extract(*args) -> None:
    """Run it in this process."""
    script.main(script.parser().parse_args([*map(str, args), "--device", "cpu"]))


SMALL_PARTS = """
import runpy, sys
from aliked import extraction, store
from aliked.features import Extractor
store.PART_BYTES = 40_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*args, code=SMALL_PARTS, **options) -> subprocess.Popen:
    """Run it in a process of its own, by a network; parts of few images."""
    return subprocess.Popen(
        [sys.executable, "-c", code, "extract.py", *map(str, args), "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_killed_run_is_resumed_and_gives_what_an_uninterrupted_one_gives(tmp_path, photos):
    options = ("--top_k", 50, "--batch_size", 2, "--threads", 2)
    extract(photos, "--output", tmp_path / "whole.h5", *options)
    killed = tmp_path / "killed.h5"
    process = start(photos, "--output", killed, *options)
    parts = tmp_path / "killed.h5.parts"
    while not list(parts.glob("[!.]*.part")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not killed.exists()
    with pytest.raises(InputError, match=r"killed\.h5\.parts exists; pass --resume"):
        extract(photos, "--output", killed, *options)
    extract(photos, "--output", killed, "--resume", *options)
    assert killed.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError"])
def test_processes_share_the_work_and_replace_one_that_ends(tmp_path, photos, end):
    """Ended at its first batch: another begins, and the file is that of one process.

    It is there before they have left, which takes CUDA seconds.
    """
    options = ("--top_k", 50, "--batch_size", 1)
    extract(photos, "--output", tmp_path / "whole.h5", *options)
    code = """
import functools, os, signal, sys, time
from pathlib import Path
from aliked import extraction, workers
original = extraction.Pipeline._extract
def _extract(self, *args):
    mark = Path(os.environ["MARK"])
    if not mark.exists():
        mark.touch()
        END
    return original(self, *args)
extraction.Pipeline._extract = _extract
work = workers._work
@functools.wraps(work)
def _work(*args):
    work(*args)
    while not Path(os.environ["OUTPUT"]).exists():
        time.sleep(0.01)
workers._work = _work
if __name__ == "__main__":
    import extract
    from aliked import cli
    cli.run(extract.main, extract.parser())
"""
    main = tmp_path / "main.py"  # which spawned processes import as well
    main.write_text(code.replace("END", end))
    command = [sys.executable, main, photos, "--output", tmp_path / "f.h5", *options]
    result = subprocess.run(
        [*map(str, command), "--device", "cpu", "--processes", "2"],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        | {"MARK": str(tmp_path / "killed"), "OUTPUT": str(tmp_path / "f.h5")},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize("killed", ["all", "the file's"])
def test_processes_that_were_killed_leave_what_they_wrote(tmp_path, photos, killed):
    """With all of them gone the next run goes on from the file that grew, and its journal."""
    options = ("--top_k", 50, "--batch_size", 1)
    extract(photos, "--output", tmp_path / "whole.h5", *options)
    process = start(photos, "--output", tmp_path / "f.h5", *options, "--processes", 2)
    parts = tmp_path / "f.h5.parts"

    def journaled() -> int:
        return sum(path.read_bytes().count(b"\n") for path in parts.glob("*.journal"))

    while journaled() < 3 and process.poll() is None:
        time.sleep(0.005)
    if killed == "all":
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    else:
        (growing,) = parts.glob("*.growing")
        os.kill(int(growing.name.partition("-")[0]), signal.SIGKILL)
        errors = process.communicate()[1]
        assert process.returncode == 2 and "the process that writes the file was killed" in errors
    assert not (tmp_path / "f.h5").exists()
    extract(photos, "--output", tmp_path / "f.h5", "--resume", *options)
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not parts.exists()


def test_processes_leave_a_finished_file_alone(tmp_path, photos, extractor):
    """Where an image is bad too, whose batch is done again by every run."""
    (photos / "a/bad.jpg").write_bytes((photos / "b/2.jpg").read_bytes()[:-9])
    extract(photos, "--output", tmp_path / "f.h5")
    before = (tmp_path / "f.h5").stat()
    extract(photos, "--output", tmp_path / "f.h5", "--resume", "--processes", 2)
    after = (tmp_path / "f.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (photos / "a/bad.jpg").write_bytes((photos / "b/2.jpg").read_bytes())
    extract(photos, "--output", tmp_path / "f.h5", "--resume", "--processes", 2)
    extract(photos, "--output", tmp_path / "whole.h5")
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_the_file_gives_places_in_order_and_the_same_ones_again(tmp_path, photos):
    """A batch of a worker that was killed is done again: at its old place, or not at all."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (Job(photos), tmp_path / "f.h5", theirs)
    file = threading.Thread(target=workers._grow, args=arguments)
    file.start()
    (path,) = ours.recv()
    second, first = (workers.Place(i, [f"{i}0.jpg", f"{i}1.jpg"], [200, 400]) for i in (1, 0))
    for said in (second, first):
        ours.send(said)
    places = [ours.recv() for _ in range(2)]
    assert [place.number for place in places] == [0, 1]
    assert places[1].at == places[0].at + 600
    ours.send(second)
    assert ours.recv() == places[1]
    ours.send(workers.Written(0, b'{"00.jpg": []}\n'))
    ours.send(workers.Place(1, second.names, [200, 408]))
    (error,) = ours.recv()
    assert "came out otherwise" in str(error)
    file.join()
    assert path.with_suffix(".journal").read_bytes().endswith(b'{"00.jpg": []}\n')


def test_a_place_is_told_once_and_to_the_worker_that_asked():
    """One that waits for batches before it may come when its worker was killed and replaced.

    A worker that heard it twice would write its next batch over this one.
    """
    team, (ours, theirs) = object.__new__(workers.Team), multiprocessing.Pipe()
    worker = workers.Worker(0, None, None, ours)
    worker.batches.append(workers.Batch(5, []))
    team.workers, team._post = {0: worker}, queue.SimpleQueue()
    team._handle(workers.Placed(5, 96), None)  # for the one before
    assert not theirs.poll()
    ask = workers.Place(5, ["a.jpg"], [200])
    team._handle(ask, worker)
    assert team._post.get_nowait() is ask
    for _ in range(2):
        team._handle(workers.Placed(5, 96), None)
    assert theirs.recv() == workers.Placed(5, 96) and not theirs.poll()


def test_a_full_disk_is_one_sentence_and_what_was_extracted_is_kept(tmp_path, photos):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    options = ("--output", tmp_path / "f.h5", "--top_k", 50)
    process = start(photos, *options, "--batch_size", 1, preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    (sentence,) = [line for line in errors.splitlines() if "error:" in line]
    assert "cannot write" in sentence and "pass --resume" in sentence
    assert "Traceback" not in errors and not (tmp_path / "f.h5").exists()
    assert len(list((tmp_path / "f.h5.parts").glob("*.part"))) >= 1
    extract(photos, *options, "--batch_size", 1, "--resume")
    extract(photos, "--output", tmp_path / "whole.h5", "--top_k", 50, "--batch_size", 1)
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_disk_that_is_full_from_the_start_keeps_nothing_and_says_so(
    tmp_path, photos, extractor, monkeypatch
):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_at", full)
        with pytest.raises(InputError, match=r"f\.h5 \(No space .* nothing is kept: make room"):
            extract(photos, "--output", tmp_path / "f.h5")
    extract(photos, "--output", tmp_path / "f.h5", "--resume")  # as it says


def test_a_report_that_nobody_reads_is_no_error_of_the_file(
    tmp_path, photos, extractor, monkeypatch
):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        extract(photos, "--output", tmp_path / "f.h5")
    assert (tmp_path / "f.h5").exists()


def test_the_report_counts_images_and_names_bad_files(tmp_path, photos, extractor, capsys):
    (photos / "a/bad.jpg").write_text("no image")
    extract(photos, "--output", tmp_path / "f.h5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"skipped: {photos}/a/bad.jpg is truncated")
    assert lines[1].startswith("9 images in ") and "images/s; busy: decode " in lines[1]
    assert lines[2].endswith("9 images by aliked-t16-homography on pytorch, 1 files skipped")
    with pytest.raises(InputError, match=r"bad\.jpg is truncated"):
        extract(photos, "--output", tmp_path / "strict.h5", "--strict")
    extract(photos, "--output", tmp_path / "f.h5", "--resume")
    assert len(extractor.seen) > 0


def test_a_folder_without_a_single_image_that_can_be_read_is_refused(tmp_path, extractor):
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="no image in"):
        extract(tmp_path / "photos", "--output", tmp_path / "f.h5")
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(InputError, match=r"no image of .* could be used \(1 files\)"):
        extract(tmp_path / "photos", "--output", tmp_path / "f.h5")
    assert not (tmp_path / "f.h5").exists()


def test_features_of_another_model_are_refused_and_left(tmp_path, photos, extractor):
    output = tmp_path / "f.h5"
    extract(photos, "--output", output)
    before = output.read_bytes()
    with pytest.raises(InputError, match="exists; pass --resume to go on"):
        extract(photos, "--output", output)
    with pytest.raises(InputError, match=r"top_k 1000, not 500"):
        extract(photos, "--output", output, "--resume", "--top_k", 500)
    with pytest.raises(InputError, match="max_size None, not 500"):
        extract(photos, "--output", output, "--resume", "--max_size", 500)
    assert output.read_bytes() == before


def test_an_output_has_one_run_at_a_time(tmp_path, photos, extractor):
    """Of two, the one that ends first would remove what the other has written so far."""
    output = tmp_path / "f.h5"
    with (
        only_writer(output),
        pytest.raises(InputError, match=r"another run is writing to .*f\.h5"),
    ):
        extract(photos, "--output", output)
    assert not output.exists() and not extractor.seen
    extract(photos, "--output", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "photos"]


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, photos, extractor):
    (tmp_path / "disk").mkdir()
    (tmp_path / "f.h5").symlink_to("disk/f.h5")
    for _ in range(2):
        extract(photos, "--output", tmp_path / "f.h5", "--resume")
        write_photo(photos / "new.png", noise(9))
    assert (tmp_path / "f.h5").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["f.h5"]
    with h5py.File(tmp_path / "disk/f.h5") as file:
        assert "new.png" in file


def test_a_database_with_its_features_and_matches(tmp_path, photos, extractor):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    database = tmp_path / "d.db"
    options = (photos, "--colmap", database, "--match", "sequential", "--overlap", 2)
    extract(*options)
    with pycolmap.Database.open(database) as db:
        assert db.num_images() == 9 and db.num_keypoints() == 9 * 20
        assert len(db.read_all_matches()[0]) == 8 + 7
    with h5py.File(tmp_path / "d.h5") as file:
        assert len(file["a"]) + len(file["b"]) == 9
    with pytest.raises(InputError, match="exists; pass --resume"):
        extract(*options)
    extract(*options, "--resume")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("a/1.png nowhere.png\n")
    with pytest.raises(InputError, match=r"names nowhere\.png, which is not among"):
        extract(photos, "--colmap", tmp_path / "e.db", "--match", "pairs", pairs)
    assert not (tmp_path / "e.h5").exists()


@pytest.mark.parametrize("mode", ["single", "folder"])
def test_images_of_other_sizes_that_are_to_share_a_camera_are_refused_at_once(
    tmp_path, photos, extractor, mode
):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    options = (photos, "--colmap", tmp_path / "d.db", "--camera_mode", mode)
    if mode == "folder":
        extract(photos, "--colmap", tmp_path / "good.db", "--camera_mode", mode)  # one size in each
        write_photo(photos / "a/other.png", noise(9, 48, 64))
        extractor.seen.clear()
    there = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"has .* pixels, but its camera .*; pass --camera_mode"):
        extract(*options)
    assert sorted(tmp_path.iterdir()) == there and not extractor.seen


def test_half_the_descriptors_are_another_file(tmp_path, photos, extractor):
    extract(photos, "--output", tmp_path / "full.h5")
    extract(photos, "--output", tmp_path / "half.h5", "--half")
    with h5py.File(tmp_path / "full.h5") as full, h5py.File(tmp_path / "half.h5") as half:
        descriptors = full["a/1.png/descriptors"][()]
        np.testing.assert_array_equal(half["a/1.png/descriptors"], descriptors.astype("f2"))
    with pytest.raises(InputError, match="descriptors None, not fp16"):
        extract(photos, "--output", tmp_path / "full.h5", "--resume", "--half")


def test_many_images_get_several_processes_on_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workers, "available_cores", lambda: 32)
    job = Job(Path("photos"), "fused", Spec(device="auto"))
    for gpus, expected in ((1, ["auto"] * 8), (2, ["cuda:0", "cuda:1"] * 4)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert workers.devices_of(job, 10_000) == expected
        assert workers.devices_of(job, 10) == expected[:gpus]
        assert workers.devices_of(job, 10_000, processes=1) == expected[:1]


REFUSED = {
    "--decoder nvimgcodec needs --backend fused": (
        *("--output", "f.h5", "--decoder", "nvimgcodec", "--backend", "pytorch"),
    ),
    "nothing to write": (),
    "--match needs --colmap": ("--output", "f.h5", "--match", "exhaustive"),
    "--camera_mode needs --colmap": ("--output", "f.h5", "--camera_mode", "single"),
    "--overlap needs --match sequential": ("--colmap", "d.db", "--overlap", "3"),
    "--min_similarity needs --match": ("--colmap", "d.db", "--min_similarity", "0.5"),
    "--matcher needs --match": ("--colmap", "d.db", "--matcher", "lightglue"),
    "64 long, but these LightGlue weights match": (
        *("--colmap", "d.db", "--match", "exhaustive", "--matcher", "lightglue"),
    ),
    "--every needs a video": ("--output", "f.h5", "--every", "3"),
    "unknown --match nearest": ("--colmap", "d.db", "--match", "nearest"),
    "unknown --match pairs": ("--colmap", "d.db", "--match", "pairs"),
    "cannot be both": ("--output", "d.db", "--colmap", "photos/../d.db"),
    "photos has the images themselves": ("--output", "f.h5", "--masks", "photos"),
    "no folder of masks nowhere": ("--output", "f.h5", "--masks", "nowhere"),
    "unknown backend": ("--output", "f.h5", "--backend", "none"),
    "no backend runs": ("--output", "f.h5", "--model_path", "model.xyz"),
    "cannot write into": ("--output", "/proc/nowhere/f.h5"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_options_that_do_not_go_together_are_refused(tmp_path, photos, monkeypatch, reason):
    if "--colmap" in REFUSED[reason]:
        pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=reason):
        extract(photos, *REFUSED[reason])
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    "option", ["--masks=m", "--processes=2", "--ray=local", "--decoder=opencv"]
)
def test_options_of_a_folder_are_refused_for_a_video(tmp_path, option):
    with pytest.raises(InputError, match=f"{option.partition('=')[0]} needs a folder of images"):
        extract("clip.mp4", "--output", tmp_path / "f.h5", option)
    with pytest.raises(InputError, match="camera 0 has no end; pass --frames N"):
        extract("0", "--output", tmp_path / "f.h5")
    with pytest.raises(InputError, match="camera 0 shows other images now; leave --resume out"):
        extract("0", "--frames", 3, "--output", tmp_path / "f.h5", "--resume")


def test_ray_loses_nothing_when_a_worker_is_killed(tmp_path, photos, monkeypatch):
    """Two local actors in another folder; one kills itself in the middle of its first shard."""
    pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray's data library is not installed")
    options = ("--top_k", 50, "--batch_size", 1)
    extract(photos, "--output", tmp_path / "whole.h5", *options)
    mark = tmp_path / "killed"

    class Dying(workers.ShardWorker):
        def __init__(self, *args):
            os.chdir("/")
            super().__init__(*args)

        def __call__(self, rows):
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(rows)

    monkeypatch.setattr(workers, "ShardWorker", Dying)
    monkeypatch.setattr(workers, "SHARD_BATCHES", 2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    tallies = []
    monkeypatch.setattr("aliked.commands.extract.counting", lambda bar: tallies.append)
    monkeypatch.chdir(tmp_path)
    extract(photos.name, "--output", "f.h5", *options, "--ray", "local", "--processes", 2)
    assert mark.exists()
    assert tallies[-1].threads["extract"] == 2 and not tallies[-1].skipped
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_cluster_is_not_asked_where_nothing_is_left_to_do(
    tmp_path, photos, extractor, monkeypatch
):
    extract(photos, "--output", tmp_path / "f.h5")
    before = (tmp_path / "f.h5").stat()
    monkeypatch.setattr(workers, "_ray", lambda: None)
    extract(photos, "--output", tmp_path / "f.h5", "--resume", "--ray", "auto")
    assert (tmp_path / "f.h5").stat().st_ino == before.st_ino


def test_a_cluster_leaves_the_signal_that_stops_a_script_alone():
    stop = signal.getsignal(signal.SIGTERM)
    context = SimpleNamespace()
    ray = SimpleNamespace(
        init=lambda **options: signal.signal(signal.SIGTERM, signal.SIG_IGN),  # Ray's own aborts
        shutdown=lambda: None,
        data=SimpleNamespace(DataContext=SimpleNamespace(get_current=lambda: context)),
        exceptions=SimpleNamespace(RayError=KeyError),
    )
    try:
        with workers._cluster(ray, "local"):
            assert signal.getsignal(signal.SIGTERM) == stop
    finally:
        signal.signal(signal.SIGTERM, stop)


def test_a_cluster_that_does_not_answer_is_refused(tmp_path, photos):
    pytest.importorskip("ray.data", reason="ray's data library is not installed")
    with pytest.raises(InputError, match="no Ray cluster answers at"):
        extract(photos, "--output", tmp_path / "f.h5", "--ray", "nowhere")


def test_a_video_becomes_a_database_too(tmp_path, extractor):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(6):
        writer.write(noise(i))
    writer.release()
    database = tmp_path / "d.db"
    options = ("--match", "sequential", "--overlap", 1, "--camera_mode", "single")
    extract(clip, "--colmap", database, "--every", 2, *options)
    with pycolmap.Database.open(database) as db:
        names = [image.name for image in db.read_all_images()]
        assert names == [f"clip.avi/{i:06}" for i in (0, 2, 4)]
        assert len(db.read_all_cameras()) == 1 and len(db.read_all_matches()[0]) == 2


def test_more_processes_than_cores_can_serve_are_refused(photos, tmp_path):
    with pytest.raises(InputError, match="--processes 100000 would only be in each other's way"):
        extract(photos, "--output", tmp_path / "f.h5", "--processes", 100_000)
    assert not (tmp_path / "f.h5").exists()


def test_images_that_are_not_read_are_named(photos, tmp_path, extractor, capsys):
    (photos / "a" / "clip.gif").touch()
    extract(photos, "--output", tmp_path / "f.h5")
    assert capsys.readouterr().err.count("a file passed over (a/clip.gif)") == 1
