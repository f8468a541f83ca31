"""What the name of a file says: pictures that are read, pictures that are not, captions, archives, splits."""

from __future__ import annotations

import functools
import importlib.util
import os

from gigagan_jax.data.decoding import IMAGE_SUFFIXES

# Pillow reads these too. They are rare, and tars do not look for them.
_RARE_SUFFIXES = (
    *(".jif", ".pjpeg", ".pjp", ".mpo", ".apng", ".dib", ".j2c", ".jpc"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
# {reason: endings of files that a person takes for pictures and that are not read}
_NOT_READ = {
    "vector graphics; draw them to .png first": (".svg", ".svgz", ".eps", ".ai", ".wmf", ".emf", ".cdr"),
    "camera raw; develop it to .jpg or .png first": (
        *(".raw", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf"),
        *(".pef", ".srw", ".3fr", ".erf", ".kdc", ".mrw", ".rwl", ".iiq", ".x3f", ".dcr", ".gpr"),
    ),
    "documents of image editors; export them to .png first": (
        *(".psd", ".psb", ".xcf", ".kra", ".clip", ".procreate", ".sai", ".sai2", ".afphoto", ".ora", ".mdp"),
    ),
    "JPEG XL, which Pillow does not read; convert it to .png": (".jxl",),
    "videos; extract frames first": (
        *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".gifv", ".mts"),
        *(".m2ts", ".ogv"),
    ),
    "high dynamic range; tone-map it to .png first": (".exr", ".hdr", ".pfm"),
    "arrays; save them as .png first": (".npy", ".npz", ".mat"),
    "medical images; convert them to .png first": (".dcm", ".dicom", ".nii"),
    "icons and cursors": (".ico", ".icns", ".cur", ".ani"),
    "old or rare formats; convert them to .png": (
        *(".pcx", ".dds", ".sgi", ".rgb", ".bw", ".xbm", ".xpm", ".ras", ".fits", ".fit", ".djvu", ".jxr", ".wdp"),
        *(".bpg", ".jng", ".mng", ".qoi", ".ktx", ".pict", ".pct", ".heics", ".heifs", ".avifs", ".jls", ".flif"),
    ),
    "documents; extract their pictures first": (".pdf",),
}
NOT_READ = {suffix: reason for reason, suffixes in _NOT_READ.items() for suffix in suffixes}

# In the order of preference: the first that a picture has is taken.
CAPTION_SUFFIXES = (".txt", ".caption", ".captions", ".json")
# Usual names of captions, in the order of preference, for JSON files and columns of tables.
CAPTION_NAMES = ("caption", "captions", "text", "prompt", "description", "sentences", "title", "tags")

TAR_SUFFIXES = (".tar",)
# Not read: only unpacked, or written anew, can they be read one example at a time.
ARCHIVE_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tbz2", ".txz"),
    *(".zip", ".7z", ".rar", ".gz", ".xz", ".zst", ".bz2"),
    *(".tfrecord", ".tfrecords", ".lmdb", ".mdb", ".h5", ".hdf5", ".beton"),
)
# Archives that are no webdataset, whatever they hold.
ZIPS = (".zip", ".7z", ".rar")
# A webdataset, packed in another way: their source refuses them with a reason.
PACKED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
SHARD_SUFFIXES = (*TAR_SUFFIXES, *PACKED_TARS)
# Without a leading dot: what systems leave beside pictures.
LITTER_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "lost+found", "system volume information", "#recycle")

# {name of a split as `config.data.split` has it: spellings, as folders and files have them}
SPLITS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "val", "valid", "dev", "eval", "holdout"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}


@functools.cache
def reads_heic() -> bool:
    """Whether the package that reads HEIC is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def picture_suffixes() -> tuple[str, ...]:
    """Endings of the picture files that a folder's source reads, in lower case."""
    return (*IMAGE_SUFFIXES, *_RARE_SUFFIXES, *(HEIC_SUFFIXES if reads_heic() else ()))


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; "" without one."""
    # Cameras write upper case.
    return os.path.splitext(name)[1].lower()


def unread_reason(suffix: str) -> str | None:
    """Why a file that looks like a picture is not read; None for pictures that are, and for all else."""
    if suffix in HEIC_SUFFIXES and not reads_heic():
        return "HEIC; pip install -e '.[heic]' reads them"
    return NOT_READ.get(suffix)


def is_picture_name(name: str) -> bool:
    """Whether a person takes a file for a picture, whether it is read or not."""
    suffix = suffix_of(name)
    return suffix in picture_suffixes() or unread_reason(suffix) is not None


def split_of(name: str) -> str | None:
    """'train', 'validation' or 'test' for the name of a folder or a split ("val2017", "Training"); None for others."""
    # Years and digits are those of COCO and of shards.
    return _SPLIT_OF.get(name.lower().rstrip("0123456789").rstrip("_- ."))
