"""A run takes the classes of its data: their number, their names, and what its snapshots draw."""

import types

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.mixture import MixtureSource
from gigagan_jax.training.data_settings import with_data_classes, with_data_settings

NAMES = ("chelsea", "coffee", "flower")


def config_of(**values):
    return from_dict({"condition": "class", "data": {"path": "photos"}} | values)


def source_of(*names):
    return types.SimpleNamespace(classes=names)


def refused(*args):
    with pytest.raises(UserError) as e:
        with_data_classes(*args)
    return str(e.value)


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / name / "0.png")
    return tmp_path / "photos"


def test_classes_follow_the_data():
    config = with_data_classes(config_of(), source_of(*NAMES))
    assert (config.num_classes, config.class_names, config.snapshot.prompts) == (3, NAMES, NAMES)
    # The same again: a config with the classes of its data stays as it is.
    assert with_data_classes(config, source_of(*NAMES)) == config


def test_preferred_classes_are_drawn_where_the_data_have_them():
    config = config_of(snapshot={"prompts": (), "preferred_classes": ("0", "207")})
    many = [f"n{i:04d}" for i in range(1000)]
    assert with_data_classes(config, source_of(*many)).snapshot.prompts == ("n0000", "n0207")
    assert with_data_classes(config, source_of(*NAMES)).snapshot.prompts == ("chelsea", "coffee")
    without = config_of(num_classes=1000, snapshot={"prompts": (), "preferred_classes": ("0", "207")})
    assert with_data_classes(without, None).snapshot.prompts == ("0", "207")


def test_a_name_of_two_classes_is_drawn_by_number():
    assert with_data_classes(config_of(), source_of("crane", "Crane", "bird")).snapshot.prompts == ("0", "1", "bird")
    # The classes 10, 20 and 30 are called so, not numbered so.
    assert with_data_classes(config_of(), source_of("10", "20", "30")).snapshot.prompts == ("10", "20", "30")


def test_what_the_user_types_is_held_against_the_data():
    typed = config_of(num_classes=3, snapshot={"prompts": ("flower", "0")})
    assert with_data_classes(typed, source_of(*NAMES)).snapshot.prompts == ("flower", "0")
    message = refused(config_of(num_classes=5), source_of(*NAMES))
    assert message == "photos has 3 classes, config.num_classes=5: leave it out, or set it to 3"
    message = refused(config_of(snapshot={"prompts": ("flower", "cofee")}), source_of(*NAMES))
    assert message.startswith(
        "config.snapshot.prompts: prompt 'cofee': gigagan has no such class; its 3 classes are chelsea"
    )
    message = refused(config_of(class_names=("chelsea", "tea", "flower")), source_of(*NAMES))
    assert (
        message
        == "config.class_names: photos has other classes (class 1 was 'tea' and is now 'coffee'); leave them out"
    )


def test_data_that_does_not_know_its_classes():
    for source in (None, source_of()):
        assert "photos: how many classes it has is not known" in refused(config_of(), source)
        config = with_data_classes(config_of(num_classes=7), source)
        assert (config.num_classes, config.class_names, config.snapshot.prompts) == (7, (), ("0", "1", "2", "3"))
        named = with_data_classes(config_of(class_names=("cat", "dog")), source)
        assert (named.num_classes, named.snapshot.prompts) == (2, ("cat", "dog"))
    assert "photos has one class, 'chelsea': there is nothing to tell apart" in refused(
        config_of(), source_of("chelsea")
    )


def test_a_run_keeps_its_classes():
    begun = {"condition": "class", "num_classes": 3, "class_names": list(NAMES)}
    assert with_data_classes(config_of(), source_of(*NAMES), begun, "runs/x").class_names == NAMES
    # Tars: what the run began with counts as set.
    assert with_data_classes(config_of(), None, begun, "runs/x").class_names == NAMES
    message = refused(config_of(), source_of("chelsea", "tea", "flower"), begun, "runs/x")
    assert message.startswith(
        "runs/x holds a run of other classes than photos has: class 1 was 'coffee' and is now 'tea'; use"
    )
    assert "class 3, 'zebra', is new" in refused(config_of(), source_of(*NAMES, "zebra"), begun, "runs/x")


def test_a_run_from_before_there_were_names():
    begun = {"condition": "class", "num_classes": 3, "class_names": []}
    assert with_data_classes(config_of(), source_of(*NAMES), begun, "runs/x").class_names == NAMES
    assert with_data_classes(config_of(), None, begun, "runs/x").num_classes == 3
    assert "runs/x holds a run of 3 classes, photos has 2" in refused(config_of(), source_of("a", "b"), begun, "runs/x")


def test_parts_of_a_mixture_have_the_same_classes():
    assert MixtureSource([(1, ["a"]), (1, ["b"])]).classes == ()

    class Part(list):
        def __init__(self, *names):
            super().__init__("x")
            self.classes = names

    assert MixtureSource([(1, Part(*NAMES)), (2, Part(*NAMES))]).classes == NAMES
    assert MixtureSource([(1, Part(*NAMES)), (2, Part())]).classes == ()
    with pytest.raises(UserError, match=r"part 1 has other classes than part 0 .class 1 was 'coffee' and is now 'tea'"):
        _ = MixtureSource([(1, Part(*NAMES)), (2, Part("chelsea", "tea", "flower"))]).classes


def test_from_a_folder_to_the_stored_config_and_back(folder, tmp_path):
    config = config_of(data={"path": str(folder)})
    place = RunFolder.open(tmp_path / "run")
    resolved, source = with_data_settings(config, place)
    assert len(source) == 3
    assert resolved.snapshot.prompts == NAMES
    open_workdir(place, resolved)
    assert '"coffee"' in (tmp_path / "run" / "config.json").read_text()
    # Before its first checkpoint a run binds nothing.
    (folder / "coffee").rename(folder / "tea")
    assert with_data_settings(config, place)[0].class_names == ("chelsea", "flower", "tea")
    text = from_dict({"data": {"path": str(folder)}})
    assert with_data_settings(text, place) == (text, None)


# ---------------------------------------------------------------- captions to draw, and augmentation


@pytest.fixture
def captioned(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(f"photo\t number {i // 2}\nanother wording\n")
    return tmp_path / "photos"


def own_config(captioned, **values):
    values = {"discriminator": {"augment": ("auto",)}, "snapshot": {"prompts": ()}} | values
    return from_dict({"condition": "text", "data": {"path": str(captioned)}} | values)


def test_snapshots_draw_captions_of_the_data_and_few_images_are_augmented(captioned, tmp_path):
    config, source = with_data_settings(own_config(captioned), RunFolder.open(tmp_path / "run"))
    assert config.snapshot.prompts == tuple(f"photo number {i}" for i in range(4))
    assert config.discriminator.augment == ("color", "translation", "cutout")
    assert len(source) == 8


def test_captions_that_are_drawn_are_far_from_each_other(captioned, tmp_path):
    (captioned / "7.txt").write_text("a red flower")
    (captioned / "6.txt").write_text("a tabby cat on a table")
    prompts = with_data_settings(own_config(captioned), RunFolder.open(tmp_path / "run"))[0].snapshot.prompts
    assert prompts[0] == "photo number 0"
    assert set(prompts[1:3]) == {"a red flower", "a tabby cat on a table"}
    assert len(prompts) == 4


def test_a_run_keeps_what_its_first_start_chose_by_the_data(captioned, tmp_path, monkeypatch):
    place = RunFolder.open(tmp_path / "run")
    begun, _ = with_data_settings(own_config(captioned), place)
    open_workdir(place, begun)
    (place.folder / "checkpoints" / "1").mkdir(parents=True)
    # The data grew past the limit, and its captions were mended.
    monkeypatch.setattr("gigagan_jax.config.augmentation.FEW_IMAGES", 3)
    (captioned / "0.txt").write_text("mended")
    assert with_data_settings(own_config(captioned), place)[0] == begun


def test_settings_that_are_chosen_open_no_data(tmp_path):
    config = own_config(tmp_path / "nowhere", discriminator={"augment": ("color",)}, snapshot={"prompts": ("a cat",)})
    assert with_data_settings(config, RunFolder.open(tmp_path / "run")) == (config, None)


def test_data_without_captions_draws_the_empty_one(captioned, tmp_path):
    for file in captioned.glob("*.txt"):
        file.unlink()
    config = own_config(captioned, data={"path": str(captioned), "captions": "optional"})
    assert with_data_settings(config, RunFolder.open(tmp_path / "run"))[0].snapshot.prompts == ("",)
