"""The report on a folder of each kind, word for word, and what is read of it."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data import decoding
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.pipeline import build_pipeline
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.data.survey import file_names, survey_path
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.data.survey.folders import HEIC, LFS, PNG, coco, write_all, write_parquet

PICTURES = {f"p{i}.png": None for i in range(4)}
TEXTS = {f"p{i}.txt": f"picture {i}" for i in range(4)}
ROWS = [{"file_name": name, "text": f"row of {name}"} for name in PICTURES]


def write_tar(path, names, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name in names:
            for member, data in ((f"{name}.png", PNG), (f"{name}.txt", b"text")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def report(folder, condition="text", **fields):
    """The lines of a survey, with FOLDER for the folder."""
    survey = survey_path(str(folder), DataConfig(**fields), condition)
    return [line.replace(str(folder), "FOLDER") for line in survey.lines()]


def jsonl(rows):
    import json

    return "\n".join(json.dumps(row) for row in rows)


GOLDEN = {
    "text files": (
        PICTURES | TEXTS,
        ["data: FOLDER, read as folder: 4 pictures (4 .png)", "  captions: 4 in .txt"],
    ),
    "usual names of caption files": (
        PICTURES | {"p0.TXT": "a", "p1.caption": "b", "p2.png.txt": "c", "p3.json": {"prompt": "d"}, "notes.txt": "x"},
        [
            "data: FOLDER, read as folder: 4 pictures (4 .png)",
            "  captions: 1 in .caption, 1 in .json, 1 in .txt, 1 in NAME.png.txt",
            "  note: 1 text file of no picture (notes.txt)",
        ],
    ),
    "what is passed over": (
        PICTURES
        | TEXTS
        | {
            "a.svg": "",
            "b.mp4": "",
            "c.CR2": "",
            ".ipynb_checkpoints/p0.png": None,
            "__MACOSX/._p0.png": "",
            "._p1.png": "",
        }
        | {
            "Thumbs.db": "",
            "@eaDir/p0.png": None,
            "run/config.json": {},
            "run/metrics.jsonl": "",
            "run/snapshots/1.png": None,
        },
        [
            "data: FOLDER, read as folder: 4 pictures (4 .png)",
            "  captions: 4 in .txt",
            "  passed over: 1 camera raw; develop it to .jpg or .png first (c.CR2)",
            "  passed over: 1 hidden files and folders (.ipynb_checkpoints/p0.png)",
            "  passed over: 1 in folders of runs (run/snapshots/1.png)",
            "  passed over: 2 in folders that systems make (@eaDir/p0.png)",
            "  passed over: 1 resource forks of macOS (._p1.png)",
            "  passed over: 1 vector graphics; draw them to .png first (a.svg)",
            "  passed over: 1 videos; extract frames first (b.mp4)",
        ],
    ),
    "imagefolder": (
        {f"{split}/{name}": None for split in ("train", "test") for name in PICTURES}
        | {"train/metadata.jsonl": jsonl([*ROWS[1:], {"file_name": "gone.png", "text": "x"}])},
        [
            "data: FOLDER/train, read as folder: 4 pictures (4 .png)",
            "  captions: 3 in metadata.jsonl, 1 without (p0.png)",
            "  split: train of test 4, train 4; --config.data.split=test reads another",
            "  passed over: 4 outside of train/ (test/p0.png)",
            "  note: 1 of the files that metadata.jsonl names are not there",
        ],
    ),
    "COCO": (
        {f"{split}/{name}": None for split in ("train2017", "val2017") for name in PICTURES}
        | {f"annotations/captions_{split}.json": coco(PICTURES) for split in ("train2017", "val2017")},
        [
            "data: FOLDER, read as folder: 4 pictures (4 .png)",
            "  captions: 4 in annotations/captions_train2017.json",
            "  split: train2017 of train2017 4, val2017 4; --config.data.split=val2017 reads another",
            "  passed over: 4 outside of split train2017 (val2017/p0.png)",
        ],
    ),
    "files and a table": (
        PICTURES | TEXTS | {"metadata.csv": "file_name,text\np0.png,row\n"},
        [
            "data: FOLDER, read as folder: 4 pictures (4 .png)",
            "  captions: 4 in .txt",
            "  note: 1 picture has captions in files and in metadata.csv: the files are taken; "
            "--config.data.caption_keys='(\"COLUMN\",)' takes the table",
        ],
    ),
    "labels in JSON": (
        PICTURES | TEXTS | {"x.png": None, "x.json": {"shapes": []}},
        [
            "data: FOLDER, read as folder: 5 pictures (5 .png)",
            "  captions: 4 in .txt, 1 without (x.png)",
            "  note: the .json files hold no captions; their keys: shapes: name one by --config.data.caption_keys",
        ],
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_report_of_a_folder_with_captions(tmp_path, kind):
    files, expected = GOLDEN[kind]
    write_all(tmp_path, files)
    assert report(tmp_path) == expected


def test_report_of_classes_and_splits(tmp_path):
    names = [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in ("cat", "dog") for i in range(2)]
    write_all(tmp_path, dict.fromkeys([*names, "example.png"]))
    assert report(tmp_path, "class") == [
        "data: FOLDER/train, read as folder: 4 pictures (4 .png)",
        "  classes: 2: cat 2, dog 2",
        "  split: train of train 4, val 4; --config.data.split=val reads another",
        "  passed over: 5 outside of train/ (example.png)",
    ]
    assert make_source(DataConfig(path=str(tmp_path), split="validation"), condition="class").classes == ("cat", "dog")
    with pytest.raises(UserError, match=r"has the splits train, val, and config\.data\.split='test' is none of them"):
        report(tmp_path, "class", split="test")
    # For text, all is read, and that is said.
    assert report(tmp_path, "none")[-1] == (
        "  note: train, val are all read; --config.data.path=FOLDER/val reads one of them"
    )


def test_classes_may_be_called_train(tmp_path):
    write_all(tmp_path, {f"{c}/{i}.png": None for c in ("train", "plane") for i in range(2)})
    assert list(survey_path(str(tmp_path), DataConfig(), "class").classes) == ["plane", "train"]


def test_class_folders_that_are_numbers_are_ordered_by_number(tmp_path):
    few = write_all(tmp_path / "few", {f"{i}/a.png": None for i in range(10)})
    many = write_all(tmp_path / "many", {f"{i}/a.png": None for i in range(12)})
    source = FolderSource(many, labels="folder")
    assert source.classes == tuple(map(str, range(12)))
    assert {source.name(i): source.read(i).label for i in range(12)} == {f"{i}/a.png": i for i in range(12)}
    # Sorted order is that of earlier versions: the identity is theirs only where the order is.
    assert FolderSource(few, labels="folder").identity() == FolderSource(few, caption_required=False).identity()
    earlier = FolderSource(many, caption_required=False).identity()
    assert source.identity() != earlier
    # A run of an earlier version is refused, even where other data are accepted: its labels mean other classes.
    with build_pipeline(source, resolution=8, batch_size=4, seed=0, tokenizer=ByteTokenizer(8), num_threads=0) as data:
        state = data.state() | {"source": earlier}
        for accepted in (False, True):
            with pytest.raises(UserError, match=r"class folders in sorted order \(0, 1, 10, 11, 2 "):
                data.restore(state, accept_data=accepted)


def test_report_of_tars_and_tables(tmp_path):
    write_tar(tmp_path / "clone" / "data" / "train-0000.tar", "ab")
    assert report(tmp_path / "clone") == [
        "data: FOLDER/data, read as tar: 1 tar (data/train-0000.tar)",
        "  split: train of train 1",
    ]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "hub" / "data" / f"{name}.parquet", image=[PNG] * 2, text=["a", "b"])
    assert report(tmp_path / "hub") == [
        "data: FOLDER/data/train-0000*.parquet, read as parquet: 2 Parquet files (data/train-00000-of-00002.parquet ...)",
        "  split: train of test 1, train 2; --config.data.split=test reads another",
    ]
    assert len(make_source(DataConfig(path=str(tmp_path / "hub")))) == 4
    # img2dataset's files: the Parquet beside the folders is metadata.
    write_all(tmp_path / "files", {f"00000/{name}": x for name, x in (PICTURES | TEXTS).items()})
    write_parquet(tmp_path / "files" / "00000.parquet", url=["x"] * 4, caption=["y"] * 4)
    assert report(tmp_path / "files") == ["data: FOLDER, read as folder: 4 pictures (4 .png)", "  captions: 4 in .txt"]


@pytest.mark.parametrize("suffix", file_names.ZIPS)
def test_an_archive_is_named_with_what_to_do(tmp_path, suffix):
    archive = tmp_path / f"photos{suffix}"
    archive.write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"photos\{suffix} is an archive.*unpack it"):
        report(archive)
    with pytest.raises(UserError, match=rf"1 archive \(photos\{suffix}\).*unpack it"):
        report(tmp_path)
    write_tar(tmp_path / "0.tar", "ab")
    assert report(tmp_path)[-1] == f"  note: 1 archive (photos{suffix}): what is inside is not read; unpack it"


def test_an_archive_beside_pictures_is_not_the_data(tmp_path):
    write_all(tmp_path, PICTURES | TEXTS)
    write_tar(tmp_path / "photos.tgz", "abcdefgh", "w:gz")
    assert report(tmp_path)[-1] == "  note: 1 archive (photos.tgz): what is inside is not read; unpack it"
    write_tar(tmp_path / "backup.tar", "abcd")
    assert report(tmp_path)[0] == "data: FOLDER, read as folder: 4 pictures (4 .png)"
    assert "  other reading: 1 tar (backup.tar): --config.data.source=tar" in report(tmp_path)
    assert len(make_source(DataConfig(path=str(tmp_path), source="tar"), workers=1)) == 4
    # More pictures in it than beside it.
    write_tar(tmp_path / "backup.tar", "abcdef")
    assert report(tmp_path) == [
        "data: FOLDER/backup.tar, read as tar: 1 tar (backup.tar)",
        "  other reading: 4 pictures (p0.png ...): --config.data.source=folder",
        "  note: 1 packed tar (photos.tgz): not read; unpack the packing, not the tar",
    ]


def test_ids_of_the_hub_and_names_of_tfds(refused, tmp_path, monkeypatch):
    kinds = {
        "lambda/pokemon-blip:large@main": "hub",
        "hf://datasets/lambda/pokemon-blip": "hub",
        "lambda/pokemon-blip": "hub",
        "Someone/Set": "hub",
        "imagenet2012": "tfds",
        "coco_captions/2014:1.1.0": "tfds",
    }
    assert {name: survey_path(name, DataConfig(), "text").kind for name in kinds} == kinds
    # A folder of the first name is here: a misspelled path.
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(lambda: survey_path("photos/cat", DataConfig(), "text"), "there is nothing at this path")


def test_without_any_caption_it_says_what_was_seen(tmp_path, refused):
    write_all(tmp_path, PICTURES | {"readme.txt": "x"})
    make = lambda **fields: make_source(DataConfig(path=str(tmp_path), **fields))
    refused(make, "4 of 4 images", "seen: 1 text file (readme.txt)", "data.captions=optional", "condition=none")
    assert report(tmp_path, captions="optional")[-1] == (
        "  WARNING: NO picture has a caption: training sees no text at all (--config.condition=none says so)"
    )


def test_pointers_of_git_lfs(tmp_path, refused):
    write_all(tmp_path, dict.fromkeys(PICTURES, LFS) | TEXTS)
    refused(lambda: report(tmp_path), "a pointer of Git LFS: run 'git lfs install' and 'git lfs pull'")
    write_all(tmp_path, {"p0.png": None})
    assert "git lfs pull" in report(tmp_path)[-1]
    with pytest.raises(BadExample, match="git_lfs_pointer"):
        FolderSource(tmp_path)[1]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(LFS)
    refused(lambda: report(tmp_path / "tars"), "0.tar is a pointer of Git LFS")


def test_heic_is_read_whatever_its_name(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = Image.fromarray(np.full((64, 48, 3), (200, 30, 90), np.uint8))
    pillow_heif.from_pillow(picture).save(tmp_path / "a.heic", quality=-1)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    source = FolderSource(tmp_path, caption_required=False)
    for i in range(2):
        np.testing.assert_allclose(source[i].image, np.asarray(picture), atol=6)


def test_what_lies_under_the_name_of_a_picture_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_enable_heic", lambda: None)
    # Registered by another test of this process.
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("HEIF", "AVIF")])
    for data, cause, detail in (
        (HEIC, "image_heic", "pip install -e '.[heic]'"),
        (LFS, "git_lfs_pointer", "git lfs pull"),
        (b"<!DOCTYPE html><p>404", "image_undecodable", "a web page"),
        (b"\0\0\0\x20ftypisom" + bytes(50), "image_undecodable", "a video"),
        (b"PK\3\4" + bytes(50), "image_undecodable", "an archive"),
        (b'{"error": "not found"}', "image_undecodable", "a text"),
    ):
        with pytest.raises(BadExample) as bad:
            decoding.decode_image(data)
        assert bad.value.cause == cause
        assert detail in bad.value.detail


def test_heic_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(file_names, "reads_heic", lambda: False)
    file_names.picture_suffixes.cache_clear()
    try:
        write_all(tmp_path, PICTURES | TEXTS | {"IMG_1.HEIC": HEIC})
        assert report(tmp_path)[-1] == "  passed over: 1 HEIC; pip install -e '.[heic]' reads them (IMG_1.HEIC)"
    finally:
        file_names.picture_suffixes.cache_clear()


def test_names_with_special_characters_are_taken_literally(tmp_path):
    folder = write_all(tmp_path / "My Drive [2024] {new}, café 🐱", PICTURES | TEXTS)
    assert report(folder)[0] == "data: FOLDER, read as folder: 4 pictures (4 .png)"


def test_a_workdir_inside_the_pictures_is_no_data(tmp_path):
    write_all(tmp_path, PICTURES | TEXTS)
    first = make_source(DataConfig(path=str(tmp_path)), workdir=tmp_path / "run").identity()
    # Before its config.json, and after it.
    write_all(tmp_path, {"run/snapshots/1.png": None})
    assert make_source(DataConfig(path=str(tmp_path)), workdir=tmp_path / "run").identity() == first
    write_all(tmp_path, {"run/config.json": {}, "run/checkpoints/1/x": ""})
    assert make_source(DataConfig(path=str(tmp_path))).identity() == first
    # The workdir may be the folder itself.
    write_all(tmp_path, {"config.json": {}, "checkpoints/1/x": "", "snapshots/1.png": None})
    assert make_source(DataConfig(path=str(tmp_path)), workdir=tmp_path).identity() == first


def test_broken_links_are_counted_and_loops_end(tmp_path):
    write_all(tmp_path, PICTURES | TEXTS)
    (tmp_path / "x.png").symlink_to("/nowhere/x.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "loop").symlink_to(".")
    lines = report(tmp_path)
    assert lines[0] == "data: FOLDER, read as folder: 6 pictures (6 .png)"
    assert lines[-1] == "  WARNING: 2 broken links, which count as unreadable (self.png)"
    (tmp_path / "self.png").unlink()
    assert report(tmp_path)[-1] == "  WARNING: 1 broken link, which counts as unreadable (x.png)"
    with pytest.raises(BadExample, match="image_unreadable"):
        FolderSource(tmp_path, caption_required=False).read(4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", jsonl(ROWS)),
        ("metadata.csv", "file_name,text\n" + "\n".join(f'"{r["file_name"]}","{r["text"]}"' for r in ROWS)),
        ("captions.tsv", "image\tcaption\n" + "\n".join(f"{r['file_name']}\t{r['text']}" for r in ROWS)),
        ("list.csv", "\ufefffilename;Caption\r\n" + "\r\n".join(f".\\{r['file_name']};{r['text']}" for r in ROWS)),
        ("meta_cap.json", {r["file_name"][:-4]: {"caption": r["text"], "tags": "a, b"} for r in ROWS}),
        ("captions.json", {r["file_name"]: r["text"] for r in ROWS}),
        ("data.json", [{"image": r["file_name"], "captions": [r["text"]]} for r in ROWS]),
    ],
)
def test_tables_of_captions(tmp_path, name, text):
    write_all(tmp_path, PICTURES | {name: text})
    source = FolderSource(tmp_path)
    assert [source.read(i).captions for i in range(4)] == [(r["text"],) for r in ROWS]


def test_caption_keys_choose_the_column(tmp_path):
    write_all(tmp_path, PICTURES | TEXTS)
    write_parquet(tmp_path / "metadata.parquet", file_name=[*PICTURES], long=["long"] * 4, text=["short"] * 4)
    data = DataConfig(path=str(tmp_path))
    assert make_source(data)[0].captions == ("picture 0",)
    assert make_source(dataclasses.replace(data, caption_keys=("long", "text")))[0].captions == ("long", "short")
    (tmp_path / "p0.txt").unlink()
    assert make_source(data)[0].captions == ("short",)
