"""HPatches' image sequences (Balntas et al., CVPR 2017): what belongs to them, and the download."""

import zipfile
from pathlib import Path

from tqdm import tqdm

from aliked.download import FileSet, RemoteFile, fetch
from aliked.errors import InputError
from aliked.files import whole_file

FOLDER = "hpatches-sequences-release"
# The authors' own archive. Size and checksum as two projects recorded them that use it.
ARCHIVE = FileSet(
    title="116 scenes of HPatches, 6 images each",
    licence="see the data set's own page",
    base_url="https://huggingface.co/datasets/vbalnt/hpatches/resolve",
    folder="main",
    files=(
        RemoteFile(
            f"{FOLDER}.zip",
            1279545572,
            "99cf7e1ca167896eb4ca2fe3d903beff6566243a3c0c8e07a13a2596648ad670",
        ),
    ),
)
ILLUMINATION = (
    "ajuntament autannes bologna books boutique bridger brooklyn castle chestnuts contruction "
    "crownday crownnight dc dome duda fenis fog fruits gonnenberg greenhouse greentea indiana "
    "kions ktirio kurhaus leuven lionday lionnight londonbridge melon miniature nescafe "
    "nijmegen nuts objects parking partyfood pencils pinard pool porta resort salon santuario "
    "school ski smurf steps table tools toy troulos veggies village whitebuilding yellowtent "
    "zion"
)
VIEWPOINT = (
    "abstract adam apprentices artisans astronautis azzola bark bees beyus bip bird birdwoman "
    "blueprint boat bricks busstop calder cartooncity charing churchill circus coffeehouse "
    "colors courses dirtywall dogman eastsouth feast fest gardens grace graffiti home laptop "
    "london machines man maskedman pomegranate posters samples soldiers strand sunseason "
    "tabletop talent tempera there underground vitro wall wapping war weapons woman wormhole "
    "wounded yard yuri"
)
NUM_FILES = 116 * (6 + 5)  # images and homographies
# More than 1600x1200 pixels: left out since D2-Net (Dusmanu et al., CVPR 2019), so 108 scenes stay.
LARGE = (
    "i_contruction",
    "i_crownnight",
    "i_dc",
    "i_pencils",
    "i_whitebuilding",
    "v_artisans",
    "v_astronautis",
    "v_talent",
)


def official_scenes() -> list[str]:
    """The names of all scenes."""
    illumination, viewpoint = ILLUMINATION.split(), VIEWPOINT.split()
    return [f"i_{name}" for name in illumination] + [f"v_{name}" for name in viewpoint]


def missing_scenes(folder: Path) -> list[str]:
    """The official scenes that `folder` lacks, or of which it has less than 6 images."""

    def complete(scene: Path) -> bool:
        numbers = range(2, 7)
        return all((scene / f"{number}.ppm").is_file() for number in (1, *numbers)) and all(
            (scene / f"H_1_{number}").is_file() for number in numbers
        )

    return [name for name in official_scenes() if not complete(folder / name)]


def download(parent: Path, archive: FileSet = ARCHIVE) -> int:
    """Download and unpack the scenes into `parent`/hpatches-sequences-release.

    Resumes; returns how many files it wrote, 0 where all were there. `InputError` where the archive
    cannot be had, or is not what it should be.
    """
    folder = parent / FOLDER
    if not missing_scenes(folder):
        return 0
    fetch(archive, parent)
    packed = parent / archive.files[0].name
    with zipfile.ZipFile(packed) as file:
        names = [name for name in file.namelist() if name.startswith(f"{FOLDER}/")]
        names = [name for name in names if not name.endswith("/")]
        for name in tqdm(names, desc="unpacking", unit="file", disable=None):
            with whole_file(parent / name) as partial:
                partial.write_bytes(file.read(name))
    missing = missing_scenes(folder)
    if missing:
        raise InputError(f"{packed} lacks {len(missing)} of the scenes, such as {missing[0]}")
    packed.unlink()
    return len(names)
