"""Features of a folder of photographs, a video or a camera, for hloc (HDF5) and COLMAP."""

import argparse
import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from aliked.backends import BACKENDS, get_backend
from aliked.cli import Parser, whole
from aliked.colmap import (
    CAMERA_MODES,
    TYPES,
    Cameras,
    exhaustive_pairs,
    read_pairs,
    sequential_pairs,
    write_features,
    write_matches,
)
from aliked.errors import InputError
from aliked.extraction import DECODERS, Job, Report, Tally, available_cores, extract
from aliked.files import only_writer, real_path, writable_folder
from aliked.images import find_images
from aliked.matching import Matcher
from aliked.options import (
    add_extractor_options,
    add_matcher_options,
    add_video_options,
    check_video_options,
    extractor_spec,
    matcher_from,
)
from aliked.store import FeatureStore
from aliked.threads import keep_freed_memory
from aliked.video import is_camera, is_video
from aliked.workers import CORES, devices_of, extract_in_processes, extract_with_ray

OVERLAP = 10  # images that each is matched with in a sequence, as in COLMAP
MOST_PROCESSES = 4  # for each core
FULL = (errno.ENOSPC, errno.EDQUOT)
TWO_LANES = ("fused", "tensorrt", "tensorrt-cudagraph")  # keep a GPU busier than one extractor


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        description=__doc__,
        epilog="FOLDER is searched with all folders below; a video file, or the number of a "
        "camera, takes its place. At least one of --output and --colmap is needed. The backend "
        "auto is what runs --model_path or, without that, fused on an NVIDIA GPU, else pytorch.",
    )
    add_extractor_options(parser)
    parser.set_defaults(backend="auto")
    _add_image_options(parser.add_argument_group("images"))
    _add_output_options(parser.add_argument_group("output"))
    _add_colmap_options(parser.add_argument_group("COLMAP"))
    _add_speed_options(parser.add_argument_group("speed"))
    return parser


def _add_image_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_size",
        type=whole(1),
        metavar="PIXELS",
        help="reduce images to this longer side (default: as they are); keypoints stay in pixels "
        "of the original",
    )
    group.add_argument(
        "--masks",
        type=Path,
        metavar="FOLDER",
        help="a mask NAME.png for every image, as COLMAP has it: no keypoint where it is black",
    )
    add_video_options(group)
    group.add_argument(
        "--strict", action="store_true", help="stop at the first file that cannot be used"
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="HDF5 file, as hloc reads it (with --colmap alone: DATABASE.h5)",
    )
    group.add_argument("--colmap", type=Path, metavar="DATABASE", help="COLMAP database")
    group.add_argument(
        "--half", action="store_true", help="descriptors in float16: half the size of the file"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run left"
    )


def _add_colmap_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--camera_mode",
        choices=CAMERA_MODES,
        help="which images share a camera: those of one model in EXIF (auto, the default), all "
        "(single), those of a folder, none (image)",
    )
    group.add_argument(
        "--camera_model", metavar="NAME", help=f"one of COLMAP's (default: {Cameras.model})"
    )
    group.add_argument(
        "--match",
        nargs="+",
        metavar=("ORDER", "FILE"),
        help="match images too: exhaustive, sequential, or pairs FILE (two names in a line)",
    )
    group.add_argument(
        "--overlap",
        type=whole(1),
        metavar="N",
        help=f"with --match sequential: images that each is matched with (default: {OVERLAP})",
    )
    add_matcher_options(group)


def _add_speed_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch_size",
        type=whole(1),
        metavar="N",
        help="images that go through the extractor together",
    )
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        help="what decodes JPEGs: OpenCV on the processor, or nvImageCodec on the GPU (default: "
        f"{DECODERS[0]})",
    )
    group.add_argument(
        "--threads",
        type=whole(1),
        metavar="N",
        help="threads that decode, in each process (default: one a core of all together)",
    )
    group.add_argument(
        "--processes",
        type=whole(1),
        metavar="N",
        help="processes on this machine, or in a Ray cluster (default: one for each GPU; of many "
        f"images on this machine, one for {CORES} cores)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="use a Ray cluster: its address, auto, or local for one of this machine",
    )


def main(args: argparse.Namespace) -> None:
    """Extract into the store of features, then write the database and the matches."""
    check_options(args)
    job = job_of(args)
    cameras = args.colmap and cameras_of(args)
    output = output_of(args)
    for path in filter(None, (output, args.colmap)):
        writable_folder(path.parent)
    with only_writer(output):
        check_new(output, args.colmap, args.resume)
        names = [] if is_video(args.images) else find_images(args.images)
        if cameras and names:
            cameras.check_sizes(replace(job, names=names))
        if args.match and names:
            pairs_of(args, names)  # whose file should be good before the work, not after
        matcher = matcher_from(args, args.model, mutual_device=args.device) if args.match else None
        store = fill_store(args, replace(job, names=names), output)
        if args.colmap is not None:
            write_colmap(args, store, names, cameras, matcher)


def fill_store(args: argparse.Namespace, job: Job, output: Path) -> FeatureStore:
    """Extract what `output` does not have yet, and say what was done."""
    total = len(job.names) or args.frames
    try:
        with (
            FeatureStore.open(output, job.key()) as store,
            progress("features", total, done=len(store)) as bar,
        ):
            tally = run(args, job, store, len(job.names), counting(bar))
    except OSError as error:
        kept = len(FeatureStore.open(output, job.key()))
        cure = "make room" if error.errno in FULL else "put that right"
        raise InputError(
            f"cannot write {error.filename or output} ({error.strerror or error}); "
            f"{'what was extracted' if kept else 'nothing'} is kept: {cure}, and pass --resume"
        ) from error
    store = FeatureStore.open(output, job.key())
    summarize(args, tally, store)
    return store


def output_of(args: argparse.Namespace) -> Path:
    """The file of features; where it is a link, what that leads to, perhaps on another disk."""
    output = args.output or args.colmap.with_suffix(".h5")
    return real_path(output) if output.is_symlink() else output


def check_options(args: argparse.Namespace) -> None:
    """Raise `InputError` where options are missing, or would be without effect."""
    if args.output is None and args.colmap is None:
        raise InputError("there is nothing to write; pass --output FILE.h5 or --colmap DATABASE")
    for path in filter(None, (args.output, args.colmap)):
        if not path.name or path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
    if args.colmap is not None and real_path(args.colmap) == real_path(output_of(args)):
        raise InputError(
            f"{args.colmap} cannot be both files; give --output and --colmap two names"
        )
    order = args.match[0] if args.match else None
    video = is_video(args.images)
    check_video_options(args)
    if args.resume and is_camera(args.images):
        raise InputError(f"camera {args.images} shows other images now; leave --resume out")
    without = (
        (args.colmap is None, "--colmap", ("match", "camera_mode", "camera_model")),
        (order != "sequential", "--match sequential", ("overlap",)),
        (order is None, "--match", ("matcher", "matcher_weights", "min_similarity")),
        (video, "a folder of images", ("masks", "processes", "ray", "decoder")),
    )
    for absent, needed, names in without:
        for name in names:
            if absent and getattr(args, name) is not None:
                raise InputError(f"--{name} needs {needed}; leave it out, or give that as well")
    if args.masks is not None and not args.masks.is_dir():
        raise InputError(f"there is no folder of masks {args.masks}; correct it, or leave it out")
    if args.masks is not None and real_path(args.masks) == real_path(args.images):
        raise InputError(f"{args.masks} has the images themselves; give a folder of their masks")
    orders = (["exhaustive"], ["sequential"])
    if args.match and args.match not in orders and not (order == "pairs" and len(args.match) == 2):
        raise InputError(
            f"unknown --match {' '.join(args.match)}; give exhaustive, sequential or pairs FILE"
        )


def job_of(args: argparse.Namespace) -> Job:
    """The options as a `Job`."""
    if args.backend == "auto":
        args.backend = choose_backend(args)
    decoder = args.decoder or DECODERS[0]
    if decoder != DECODERS[0] and args.backend != "fused":
        raise InputError(
            f"--decoder {decoder} needs --backend fused, which takes what it decodes on the "
            "GPU; leave one out"
        )
    return Job(
        images=args.images,
        backend=args.backend,
        spec=extractor_spec(args),
        max_size=args.max_size,
        masks=args.masks,
        batch_size=args.batch_size,
        threads=args.threads,
        lanes=2 if args.backend in TWO_LANES else 1,
        every=args.every or 1,
        max_frames=args.frames,
        strict=args.strict,
        half=args.half,
        decoder=decoder,
    )


def choose_backend(args: argparse.Namespace) -> str:
    """The backend that runs the model file; without one the fused kernels, or else PyTorch."""
    if args.model_path is None:
        on_gpu = args.device != "cpu" and get_backend("fused").unavailable() is None
        return "fused" if on_gpu else "pytorch"
    suffix = args.model_path.suffix
    for name, backend in BACKENDS.items():
        if backend.suffix == suffix:
            return name
    suffixes = sorted({backend.suffix for backend in BACKENDS.values() if backend.suffix})
    raise InputError(f"no backend runs {args.model_path}; give a file of {', '.join(suffixes)}")


def cameras_of(args: argparse.Namespace) -> Cameras:
    """How the images of the database share cameras."""
    given = {"mode": args.camera_mode, "model": args.camera_model}
    return Cameras(**{name: value for name, value in given.items() if value is not None})


def check_new(output: Path, database: Path | None, resume: bool) -> None:
    """Raise `InputError` where an output is there already, and is not to be gone on with."""
    parts = output.with_name(f"{output.name}.parts")
    for path in filter(None, (output, parts, database)):
        if path.exists() and not resume:
            raise InputError(f"{path} exists; pass --resume to go on with it, or name another file")


def run(
    args: argparse.Namespace, job: Job, store: FeatureStore, images: int, report: Report
) -> Tally:
    """Extract what is missing: in this process, in some for each GPU, or by Ray."""
    keep_freed_memory()
    if args.ray is not None:
        return extract_with_ray(job, store, args.ray, args.processes, report)
    most = MOST_PROCESSES * available_cores()
    if args.processes and args.processes > most:
        raise InputError(
            f"--processes {args.processes} would only be in each other's way; give at most {most}"
        )
    devices = [job.spec.device]
    if not is_video(job.images):
        devices = devices_of(job, images, args.processes)
    if len(devices) > 1:
        return extract_in_processes(job, store, devices, report)
    return extract(job, store, report)


@contextlib.contextmanager
def progress(what: str, total: int | None, done: int = 0) -> Iterator[tqdm]:
    """A bar, where there is a terminal."""
    unit = "pair" if what == "matches" else "image"
    with tqdm(desc=what, total=total, initial=done, unit=unit, disable=None) as bar:
        yield bar


def counting(bar: tqdm) -> Report:
    """Move the bar on with a run, and say which stage is busy."""
    before = 0

    def report(tally: Tally) -> None:
        nonlocal before
        count = tally.images + len(tally.skipped)
        bar.set_postfix_str(f"busy: {tally.shares()}", refresh=False)
        bar.update(count - before)
        before = count

    return report


def summarize(args: argparse.Namespace, tally: Tally, store: FeatureStore) -> None:
    """Say what was done; `InputError` where there is nothing."""
    for sentence in tally.skipped:
        print(f"skipped: {sentence}")
    if not len(store):
        raise InputError(
            f"no image of {args.images} could be used ({len(tally.skipped)} files); see above"
        )
    if tally.images:
        print(
            f"{tally.images} images in {tally.wall:.1f} s, {tally.rate:.1f} images/s; busy: "
            f"{tally.shares()}; {tally.keypoints / tally.images:.0f} keypoints per image"
        )
    skipped = f", {len(tally.skipped)} files skipped" if tally.skipped else ""
    print(f"{store.path}: {len(store)} images by {args.model} on {args.backend}{skipped}")


def write_colmap(
    args: argparse.Namespace,
    store: FeatureStore,
    names: list[str],
    cameras: Cameras,
    matcher: Matcher | None,
) -> None:
    """Write the database, and the matches that are asked for."""
    with progress("database", len(store)) as bar:
        write_features(args.colmap, store, args.images, args.model, cameras, bar.update)
    print(f"{args.colmap}: {len(store)} images")
    if args.model not in TYPES:
        print(
            f"COLMAP has no type for {args.model}: it maps these matches, but cannot match itself "
            "(--model aliked-n16rot is one of its own, and gives better maps)"
        )
    if matcher is None:
        return
    if args.match[0] != "pairs":  # whose file may name one that was skipped
        names = [name for name in names or store.names() if name in store]
    pairs, count = pairs_of(args, names or store.names())
    with progress("matches", count) as bar:
        matched = write_matches(args.colmap, store, pairs, matcher, bar.update)
    rest = f", {count - matched} matched before or of skipped files" if count > matched else ""
    print(f"{args.colmap}: {matched} pairs matched{rest}")


def pairs_of(
    args: argparse.Namespace, names: Sequence[str]
) -> tuple[Iterable[tuple[str, str]], int]:
    """The pairs of these images to match, and how many there are."""
    if args.match[0] == "exhaustive":
        return exhaustive_pairs(names), len(names) * (len(names) - 1) // 2
    if args.match[0] == "sequential":
        pairs = sequential_pairs(names, args.overlap or OVERLAP)
    else:
        pairs = read_pairs(Path(args.match[1]), names)
    return pairs, len(pairs)
