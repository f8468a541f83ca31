"""Photographs for upsamplers: read out of packages, cut into patches to train on, or kept whole to be judged.

Debian packages, wheels and their unpacked folders give the photographs of `photograph_list.PHOTOGRAPHS`; any other folder
gives all its images.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import decode_image, decode_to_pil
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.photograph_list import PHOTOGRAPHS, Photograph
from gigagan_jax.preparation.shards import image_suffix

MANIFEST = "manifest.json"
_BY_PATH = {photograph.path: photograph for photograph in PHOTOGRAPHS}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Photographs that stay decoded: patches are read in the order of their photographs.
_DECODED = 2
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


@dataclasses.dataclass(frozen=True)
class PhotographFile:
    """A photograph and its file.

    Attributes:
      photograph: what is known of it.
      data: the image file, as the package has it.
    """

    photograph: Photograph
    data: bytes

    @property
    def name(self) -> str:
        """Package and file name without suffix: "plasma-workspace-wallpapers/Path"; distinct for the listed ones."""
        path = Path(self.photograph.path)
        # Plasma's files are called after their size.
        stem = path.parts[-4] if path.parts[-3:-1] == ("contents", "images") else path.stem
        return f"{self.photograph.package}/{stem}"


def read_photographs(places: Sequence[str]) -> list[PhotographFile]:
    """Reads the photographs of packages and folders, in the order of the places and of `PHOTOGRAPHS`.

    Args:
      places: `.deb` files, `.whl` files, folders of unpacked packages (where `usr` or `skimage` lies), or folders of images.

    Raises:
      UserError: a place is missing or damaged, or has no photograph.
    """
    files = []
    for place in places:
        found = list(_read_place(Path(place)))
        if not found:
            packages = ", ".join(dict.fromkeys(p.package for p in PHOTOGRAPHS))
            raise UserError(f"{place} has no photograph: name a folder of images, or a package of {packages}")
        files += found
    return files


def _read_place(place: Path) -> Iterator[PhotographFile]:
    if place.is_dir():
        listed = [p for p in PHOTOGRAPHS if (place / p.path).is_file()]
        others = [] if listed else list_images(place)
        own = [Photograph(place.resolve().name, f.relative_to(place).as_posix()) for f in others]
        for photograph in listed or own:
            yield PhotographFile(photograph, (place / photograph.path).read_bytes())
        return
    readers = {".deb": read_debian_package, ".whl": read_wheel}
    if place.suffix not in readers:
        raise UserError(f"{place} is no folder, no .deb and no .whl")
    try:
        found = readers[place.suffix](place, _BY_PATH.__contains__)
    # Damaged archives raise errors of several libraries, which share no base.
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{place} cannot be read as a package ({error}): download it again") from error
    for photograph in PHOTOGRAPHS:
        if photograph.path in found:
            yield PhotographFile(photograph, found[photograph.path])


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, by their endings, in order."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())


def read_wheel(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """{file name: contents} of the wanted files of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if wanted(name)}


def read_debian_package(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """{file name, without ./: contents} of the wanted regular files of a Debian package.

    A package is an ar archive whose member data.tar, data.tar.gz, data.tar.xz or data.tar.zst has the files (deb(5)).

    Raises:
      ValueError: the file is no such archive.
      UserError: a data.tar.zst without the package zstandard.
    """
    with open(path, "rb") as file:
        suffix = _seek_data_tar(file)
        stream: IO[bytes] = _decompress_zstandard(file) if suffix == ".zst" else file
        # Streams: tarfile must not seek before the member. It tells gz and xz by their first bytes.
        with tarfile.open(fileobj=stream, mode="r|" if suffix == ".zst" else "r|*") as tar:
            found = {}
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and wanted(name):
                    found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
            return found


def _seek_data_tar(file: IO[bytes]) -> str:
    """Moves to the contents of the ar member data.tar*; returns its suffix after .tar."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("it is no ar archive")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        # ar: 16 bytes of name, 10 of size in decimal from byte 48; a slash may end the name.
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return name.removeprefix("data.tar")
        # Members begin at even places.
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no data.tar")


def _decompress_zstandard(file: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("packages with data.tar.zst need zstandard: pip install zstandard") from error
    return zstandard.ZstdDecompressor().stream_reader(file)


def gradient_energy(image: np.ndarray) -> float:
    """Mean of squared differences of neighbouring pixels, horizontal plus vertical, in squared grey levels.

    Args:
      image: uint8 [H, W, 3], two pixels or more in both directions.
    """
    grey = np.asarray(image, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return float(np.mean(np.diff(grey, axis=0) ** 2) + np.mean(np.diff(grey, axis=1) ** 2))


@dataclasses.dataclass(frozen=True)
class Patch:
    """A square of a photograph.

    Attributes:
      file: number of the photograph.
      reduction: by what factor its sides were reduced; pixels are means of reduction x reduction pixels.
      top, left: of the square, in pixels of the reduced photograph.
    """

    file: int
    reduction: int
    top: int
    left: int


class PatchSource(Source):
    """Squares on a grid of photographs and of their reduced copies; flat ones are left out.

    Full-size camera pictures are soft, reduced ones are sharp: upsamplers train on both. The grid steps by half a patch of
    the full-size picture at every reduction, so sharp patches are as many as soft ones.

    Args:
      files: the photographs.
      size: side of a patch in pixels.
      reductions: factors; 1 is the photograph as it is.
      least_energy: `gradient_energy` below which a patch is flat.
      most: patches of one photograph; evenly spaced ones where it has more, so that no large photograph outweighs the others.

    Attributes:
      patches: in the order of photographs, reductions, rows and columns.
      flat: number of flat patches.

    Raises:
      UserError: a photograph cannot be decoded, bad sizes, or no patch is left.
    """

    def __init__(
        self,
        files: Sequence[PhotographFile],
        size: int,
        *,
        reductions: Sequence[int] = (1, 2, 4),
        least_energy: float = 20.0,
        most: int = 400,
    ):
        if not 16 <= size <= 4096:
            raise UserError(f"--size={size}: patches have sides of 16 to 4096 pixels")
        if not reductions or min(reductions) < 1:
            raise UserError(f"--reductions={','.join(map(str, reductions))}: factors are whole numbers from 1")
        if most < 1:
            raise UserError(f"--most={most}: a photograph gives at least 1 patch")
        self.files, self.size = tuple(files), size
        self._settings = f"{size} {tuple(reductions)} {least_energy} {most}"
        self._decoded: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
        self.patches: list[Patch] = []
        self.flat = 0
        for number in range(len(self.files)):
            found = [p for reduction in reductions for p in self._choose_patches(number, reduction, least_energy)]
            kept = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
            self.patches += [found[i] for i in kept]
        if not self.patches:
            raise UserError(f"--train: no patch of {size} px is left of {len(self.files)} photographs")

    def _choose_patches(self, number: int, reduction: int, least_energy: float) -> list[Patch]:
        try:
            image = self._decode(number, reduction)
        except BadExample as bad:
            raise UserError(f"--train: {self.files[number].name} cannot be decoded ({bad})") from bad
        step = max(1, self.size // (2 * reduction))
        corners = [
            (top, left)
            for top in range(0, image.shape[0] - self.size + 1, step)
            for left in range(0, image.shape[1] - self.size + 1, step)
        ]
        found = [
            Patch(number, reduction, top, left)
            for top, left in corners
            if gradient_energy(image[top : top + self.size, left : left + self.size]) >= least_energy
        ]
        self.flat += len(corners) - len(found)
        return found

    def _decode(self, number: int, reduction: int) -> np.ndarray:
        """A photograph, uint8 [H, W, 3]. Threads may decode it twice."""
        image = self._decoded.get((number, reduction))
        if image is None:
            image = reduce_photograph(self.files[number].data, reduction)
            self._decoded[number, reduction] = image
            while len(self._decoded) > _DECODED:
                self._decoded.popitem(last=False)
        return image

    def __getstate__(self):
        return self.__dict__ | {"_decoded": collections.OrderedDict()}

    def __len__(self) -> int:
        return len(self.patches)

    def read(self, i: int) -> Record:
        patch = self.patches[i]
        image = self._decode(patch.file, patch.reduction)
        pixels = image[patch.top : patch.top + self.size, patch.left : patch.left + self.size]
        known = self.files[patch.file].photograph
        license = ", ".join(text for text in (known.license, known.author) if text)
        return Record(np.ascontiguousarray(pixels), captions=(), label=-1, name=self.name(i), license=license)

    def captions(self, i: int) -> tuple[str, ...]:
        return ()

    def name(self, i: int) -> str:
        patch = self.patches[i]
        return f"{self.files[patch.file].name}/{patch.reduction}_{patch.top}_{patch.left}"

    def identity(self) -> str:
        digest = hashlib.sha256(self._settings.encode())
        for file in self.files:
            digest.update(f"\0{file.name}\0{hashlib.sha256(file.data).hexdigest()}".encode())
        return digest.hexdigest()[:16]


def reduce_photograph(data: bytes, reduction: int) -> np.ndarray:
    """Decodes an image file, uint8 [H, W, 3], and makes it smaller by averaging squares of pixels. Raises BadExample."""
    if reduction == 1:
        return decode_image(data)
    image: Image.Image = decode_to_pil(data)
    # Cut first: Pillow would average what is left at the right and bottom edges over fewer pixels.
    width, height = (side // reduction * reduction for side in image.size)
    return np.array(image.crop((0, 0, width, height)).reduce(reduction))


def check_apart(train: Sequence[PhotographFile], test: Sequence[PhotographFile]) -> None:
    """Raises UserError where a photograph is in both parts."""
    seen = {hashlib.sha256(file.data).digest(): file.name for file in train}
    for file in test:
        if (name := seen.get(hashlib.sha256(file.data).digest())) is not None:
            raise UserError(
                f"--test: {file.name} is in --train too ({name}): judge photographs that training never shows"
            )


def write_photographs(files: Sequence[PhotographFile], out: Output) -> int:
    """Writes photographs as they are, and manifest.json with the size, package, licence and author of each.

    Returns:
      Their number.

    Raises:
      UserError: two have one name, one cannot be decoded, or the folder cannot be written.
    """
    lines: list[dict[str, Any]] = []
    for file in files:
        name = file.name.replace("/", "_") + (image_suffix(file.data) or Path(file.photograph.path).suffix)
        if any(line["file"] == name for line in lines):
            raise UserError(f"--test: two photographs are called {name}: give one another name")
        try:
            width, height = decode_to_pil(file.data).size
        except BadExample as bad:
            raise UserError(f"--test: {file.name} cannot be decoded ({bad})") from bad
        known = dataclasses.asdict(file.photograph)
        digest = hashlib.sha256(file.data).hexdigest()
        lines.append({"file": name, "width": width, "height": height, **known, "sha256": digest})
        with out.scratch_folder() as folder:
            (folder / "image").write_bytes(file.data)
            out.publish(folder / "image", name)
    # Last: a folder with a manifest is whole.
    out.write_text(MANIFEST, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
    out.clear_scratch()
    return len(lines)


def provenance(parts: dict[str, Sequence[PhotographFile]]) -> str:
    """A line a photograph: part, package, file, licence, author."""
    rows = [(part, file.photograph) for part, files in parts.items() for file in files]
    return "".join(
        f"{part}: {p.package}: {p.path}: {p.license or 'licence not known'}, {p.author or 'author not known'}\n"
        for part, p in rows
    )
