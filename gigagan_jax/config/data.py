"""Settings of the data: where it comes from, which of it is used, and what is done to it on the host."""

import dataclasses

# Kinds of data sources: data/sources/__init__.py opens them.
SOURCE_KINDS = ("tar", "folder", "arrayrecord", "tfds", "parquet", "arrow", "hub", "digits", "shapes")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which examples are used, by their metadata: img2dataset's `.parquet` beside each tar (or the `.json` members of the
    tar), or columns of a Parquet data set. An example without a value that is asked for is dropped; but one without a
    hash is nobody's duplicate, and is kept. Column names are found by their usual spellings (data/sources/filter_columns.py)."""

    min_width: int = 0  # pixels of the image as it was found; 0: any
    min_height: int = 0  # pixels; 0: any
    max_aspect: float = 0.0  # longer side by shorter side; 0: any
    min_clip_score: float = 0.0  # cosine of image and caption; 0: any
    min_aesthetic: float = 0.0  # LAION's aesthetic score, 0 to 10; 0: any
    max_watermark: float = 1.0  # probability of a watermark; 1: any
    max_nsfw: float = 1.0  # probability of unsafe content; 1: any
    nsfw: tuple[str, ...] = ()  # allowed classes where it is given as a word ("UNLIKELY"); empty: any
    languages: tuple[str, ...] = ()  # allowed languages of the caption ("en"); empty: any
    min_caption: int = 0  # characters; 0: any
    max_caption: int = 0  # characters; 0: any
    duplicates: str = ""  # column of a hash by which all but the first are dropped ("sha256", "hash"); empty: keep all


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """Scenes that are drawn (data/sources/shapes.py), for `data.source="shapes"`."""

    examples: int = 1_000_000  # scenes of an epoch
    max_objects: int = 1  # 1: single objects; 2, 3: groups, pairs and trios too
    side: int = 32  # pixels, 16 to 256; the run's resolution spares a resize
    held_out: bool = True  # leave out the pairs of shape and color that are never trained
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where captioned images come from and what is done to them on the host."""

    # "tar" (webdataset), "folder", "arrayrecord", "tfds", "parquet", "arrow" (a folder by save_to_disk), "hub" (an id of the
    # Hugging Face hub), "digits" and "shapes" (no path); "auto": by the path
    source: str = "auto"
    path: str = ""  # files or folder; addresses (gs://, s3://), ranges {00000..01234}, wildcards; tfds, hub: the data set's name
    mixture: tuple[str, ...] = ()  # instead of path: "WEIGHT:PATH" for each part, in exact proportions
    index: str = ""  # folder of the tars' index; empty: beside the tars, or in the workdir where that is not writable
    captions: str = "required"  # "required" or "optional": is an image without a caption an error?
    caption_keys: tuple[
        str, ...
    ] = ()  # tables: columns that hold captions; tar: keys of .json; empty: the .txt, or by their usual names
    image_key: str = (
        ""  # tfds, parquet, arrow, hub: column that holds the image, or its path; empty: by its usual names
    )
    label_key: str = "label"  # tfds, parquet, arrow, hub: column that holds the class
    split: str = "train"  # where the data have several: folders, tables, tfds, arrow, hub
    filters: FilterConfig = FilterConfig()
    shapes: ShapesConfig = ShapesConfig()
    clean_captions: bool = False  # strip markup, web addresses and control characters, join blanks (data/captions.py)
    # after the short side is resized: "center" or "random"; at the file's own pixels: "patch", a random window; whole image:
    # "none" squeezes, "pad" pads
    crop: str = "center"
    flip: bool = False  # random horizontal flips
    caption_dropout: float = 0.0  # share of captions replaced by the null caption
    resize_filter: str = "lanczos"  # lanczos, bicubic, bilinear, box or nearest
    fast_decode: bool = False  # decode large JPEGs at a fraction of their size, 3 times the resolution or more
    embeddings: str = ""  # folder of text features made ahead of time (tools/prepare_data.py embed); empty: in the step
    workers: int = 0  # processes that read and decode on each host; 0: threads of this process alone
    threads: int = 8  # reader threads in each of them; 0 reads in the main thread
    retry_seconds: float = 300.0  # how long storage that does not answer is asked again
    max_bad_fraction: float = 0.05  # stop when more than this share of the examples tried cannot be read

    @property
    def title(self) -> str:
        """What the user named: the path, the parts of the mixture, or the source that needs no path."""
        return self.path or ", ".join(self.mixture) or self.source
