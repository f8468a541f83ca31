"""Where weights are looked for: whatever is wrong is one line that names the setting, the place and the way to mend it."""

import json
import os
import pickle
import re
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from gigagan_jax.models.pretrained.hub import CONFIG, INDEX, SINGLE, Requirement, find_cached, find_folder
from gigagan_jax.models.pretrained.weights import Weights

INSTEAD = "config.loss.clip=(0,0) does without"
NEED = Requirement("config.clip.path", INSTEAD)


@pytest.fixture
def folder(tmp_path):
    """With a network in one file: nothing is opened yet."""
    (tmp_path / "net").mkdir()
    for name in (CONFIG, SINGLE):
        (tmp_path / "net" / name).touch()
    return tmp_path / "net"


@pytest.fixture
def shards(tmp_path):
    """With a network in shards."""
    (tmp_path / "shards").mkdir()
    for name in (CONFIG, INDEX):
        (tmp_path / "shards" / name).touch()
    return tmp_path / "shards"


def test_a_path_that_is_not_set(refused):
    refused(lambda: find_folder("", NEED), "config.clip.path is not set", "folder or hub id", INSTEAD)


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./here/weights", "../weights", "weights", "a/b/c", "clip vit/large"]
)
def test_a_path_that_is_no_folder(path, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(
        lambda: find_folder(path, NEED), f"config.clip.path={path}", "no such folder", "no hub id (org/name)", INSTEAD
    )


def test_a_home_that_is_not_there(refused):
    refused(lambda: find_folder("~no_such_user_here/clip", NEED), "config.clip.path=~no_such_user_here/clip", INSTEAD)


def test_a_folder_is_found_by_any_of_its_names(folder, shards, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_folder(str(folder), NEED) == folder
    assert find_folder(str(shards), NEED) == shards
    assert find_folder("~/net", NEED) == folder
    assert find_folder(f"{folder.parent.name}/net", NEED).samefile(
        folder
    )  # a folder comes before a hub id of that form


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, revision): the folder of a snapshot in a cache of its own, where nothing can be downloaded."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def make(name, revision="main"):
        place, commit = cache / f"models--{name.replace('/', '--')}", "0123456789" * 4
        ref = place / "refs" / revision
        ref.parent.mkdir(parents=True)
        ref.write_text(commit)
        (place / "snapshots" / commit).mkdir(parents=True)
        return place / "snapshots" / commit

    make.cache = cache
    return make


@pytest.mark.parametrize("revision", ["", "@v1.0", "@refs/pr/3"])
def test_a_hub_id_that_is_not_in_the_cache(hub, revision, refused):
    path = f"some-org/clip.large{revision}"
    message = refused(
        lambda: find_folder(path, NEED), f"config.clip.path={path}: ", CONFIG, SINGLE, "tokenizer", hub.cache, INSTEAD
    )
    option = f" --revision {revision[1:]}" if revision else ""
    assert f"`hf download some-org/clip.large{option}`" in message


def test_a_hub_id_that_can_be_none(hub, refused):
    refused(lambda: find_folder("some--org/clip", NEED), "config.clip.path=some--org/clip", INSTEAD)


def test_a_hub_id_in_the_cache(hub, folder, shards, refused):
    snapshot = hub("org/name")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    assert find_folder("org/name", NEED) == snapshot
    assert find_folder(f"org/name@{snapshot.name}", NEED) == snapshot
    refused(lambda: find_folder("org/name@v2", NEED), "hf download org/name --revision v2")
    other = hub("org/other", revision="v1")
    shutil.copytree(shards, other, dirs_exist_ok=True)
    assert find_folder("org/other@v1", NEED) == other


def test_a_hub_id_of_which_we_downloaded_what_we_need(hub, folder):
    """The hub lists all files of a network, also those for other frameworks, which are left there."""
    snapshot = hub("org/name")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    listed = {name: {"size": 0, "blob_id": "0"} for name in (CONFIG, SINGLE, "README.md", "pytorch_model.bin")}
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    (trees / f"{snapshot.name}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    assert find_folder("org/name", NEED) == snapshot
    assert find_cached("org/name") == snapshot  # without asking the hub
    assert find_cached("org/other") is None


def test_a_hub_id_of_which_only_parts_are_in_the_cache(hub, folder, refused):
    shutil.copy(folder / CONFIG, hub("org/config"))
    refused(
        lambda: find_folder("org/config", NEED),
        "config.clip.path=org/config",
        SINGLE,
        "`hf download org/config`",
        INSTEAD,
    )
    shutil.copy(folder / SINGLE, hub("org/weights"))
    refused(
        lambda: find_folder("org/weights", NEED),
        "config.clip.path=org/weights",
        f"no {CONFIG}",
        "`hf download org/weights`",
    )


def test_a_hub_id_with_nothing_but_a_pickle_in_the_cache(hub, trap, refused):
    """After `hf download` of a network without safetensors: asking for the same download again would not help."""
    snapshot = hub("org/pickle")
    (snapshot / CONFIG).write_text("{}")
    trap(snapshot / "pytorch_model.bin")
    refused(
        lambda: find_folder("org/pickle", NEED), "config.clip.path", "pytorch_model.bin", "pickle", "save_pretrained"
    )


# ---------------------------------------------------------------- what a folder holds


def test_a_folder_without_weights_or_without_a_config(folder, tmp_path, refused):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(lambda: find_folder(str(empty), NEED), f"config.clip.path={empty}", SINGLE, INDEX, INSTEAD)
    shutil.copy(folder / CONFIG, empty)
    refused(lambda: find_folder(str(empty), NEED), f"config.clip.path={empty}", SINGLE, INDEX, INSTEAD)
    (folder / CONFIG).unlink()
    refused(lambda: find_folder(str(folder), NEED), f"config.clip.path={folder}", f"no {CONFIG}", INSTEAD)


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def trap(tmp_path):
    """trap(file): writes a pickle that must not be opened."""
    mark = tmp_path / "opened"

    def make(file):
        file.write_bytes(pickle.dumps(Trap(mark)))
        pickle.loads(file.read_bytes())  # it works
        mark.rmdir()
        return file

    yield make
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.ckpt", "x.pkl"]
)
def test_a_folder_with_a_pickle_only(name, tmp_path, trap, refused):
    (tmp_path / CONFIG).write_text("{}")
    file = trap(tmp_path / name)
    refused(
        lambda: find_folder(str(tmp_path), NEED),
        "config.clip.path",
        file,
        "is a pickle",
        "convert it",
        "save_pretrained",
    )


@pytest.mark.parametrize("name", ["ViT-B-32.pt", "clip.pth", "pytorch_model.bin"])
def test_a_path_that_is_a_pickle(name, tmp_path, trap, refused):
    file = trap(tmp_path / name)
    refused(lambda: find_folder(str(file), NEED), "config.clip.path", file, "is a pickle", "convert it")


def test_a_path_that_is_a_file(folder, refused):
    for name in (SINGLE, CONFIG):
        refused(
            lambda name=name: find_folder(str(folder / name), NEED),
            f"config.clip.path={folder / name}",
            "give the folder",
        )


def test_a_pickle_beside_safetensors_is_no_matter(folder, trap):
    trap(folder / "pytorch_model.bin")
    assert find_folder(str(folder), NEED) == folder


def test_the_conversion_that_is_named_works(clip_folder, tmp_path, monkeypatch, refused):
    source = tmp_path / "pickled"
    source.mkdir()
    shutil.copy(clip_folder / CONFIG, source)
    torch.save(safetensors.torch.load_file(clip_folder / SINGLE), source / "pytorch_model.bin")
    message = refused(lambda: find_folder(str(source), NEED), "pytorch_model.bin", "OUT")
    code = re.search(r'python -c "(.*?)"', message).group(1)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})
    out = Weights(find_folder(str(tmp_path / "OUT"), NEED))
    there = Weights(clip_folder)
    assert out.keys() == there.keys()
    for key in there.keys():  # noqa: SIM118
        np.testing.assert_array_equal(out.read_tensor(key), there.read_tensor(key))
