"""Settings of a run that follow its data: classes and their names, what snapshots draw, augmentation of few images."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.checkpoint.workdir import read_stored_config
from gigagan_jax.config import Config, SnapshotConfig, chosen_prompts, class_labels, first_difference, with_fields
from gigagan_jax.config.augmentation import AUTOMATIC, FEW_IMAGES, with_augmentations
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources import survey_data
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.training.input_pipeline import make_data_source

_log = logging.getLogger(__name__)

# Examples that are looked at for captions to draw.
_CAPTIONS_READ = 64


def with_data_settings(config: Config, place: RunFolder) -> tuple[Config, Source | None]:
    """The config of a run with what its data decides, and the data where it was opened for that.

    A class-conditional config gets `num_classes`, `class_names` and `snapshot.prompts`; a text config without
    `snapshot.prompts` gets captions of the data; `discriminator.augment=("auto",)` is decided by the number of images. All
    processes read the same data, so they come to the same config; `assert_same_on_all_processes` compares it.

    Args:
      config: with `num_classes=0`, no `snapshot.prompts` and automatic augmentation where they are to follow the data.
      place: of the run, whose earlier settings count as set.

    Raises:
      UserError: the data cannot be opened, has other classes than the config or the run says, or does not know their number.
    """
    stored = read_stored_config(place) or {}
    config = _keep_stored(config, stored)
    automatic = tuple(config.discriminator.augment) == (AUTOMATIC,)
    draws_captions = config.condition == "text" and not config.snapshot.prompts
    if config.condition != "class" and not automatic and not draws_captions:
        return config, None
    surveys = survey_data(config.data, config.condition, place.folder)
    tars = [path for path, survey in surveys.items() if survey.kind == "tar"]
    # Tars hold numbers without names, and their number is known only when all are read.
    is_open = not (tars and config.condition == "class" and not automatic)
    # Process 0 makes the index of tars in a bucket, for all, when the run has begun (build_shared_index).
    if any("://" in path for path in tars) and jax.process_count() > 1:
        is_open = False
    source = make_data_source(config, place.folder, surveys) if is_open else None
    if automatic:
        # What is not opened here is a large data set.
        config = with_augmentations(config, FEW_IMAGES if source is None else len(source))
        names = config.discriminator.augment
        _log.info(
            "augmentation of what D sees: %s", ", ".join(names) if names else f"off, for {FEW_IMAGES:,} images or more"
        )
    if draws_captions:
        prompts = _varied_captions(source) if source is not None else SnapshotConfig().prompts
        config = with_fields(config, {"snapshot.prompts": prompts})
    return (with_data_classes(config, source, stored, str(place)) if config.condition == "class" else config), source


def _keep_stored(config: Config, stored: Mapping[str, Any]) -> Config:
    """The config with what an earlier start of this run chose by its data, which may have grown since."""
    fields: dict[str, Any] = {}
    if tuple(config.discriminator.augment) == (AUTOMATIC,) and "discriminator" in stored:
        fields["discriminator.augment"] = tuple(stored["discriminator"]["augment"])
    if config.condition == "text" and not config.snapshot.prompts and stored.get("condition") == "text":
        # The same rows in all snapshots of a run.
        fields["snapshot.prompts"] = tuple(stored["snapshot"]["prompts"])
    return with_fields(config, fields)


def _varied_captions(source: Source) -> tuple[str, ...]:
    """As many captions as a grid has rows, from all over the data and far from each other; the empty one where there is none."""
    count, found = len(SnapshotConfig().prompts), dict[str, set[str]]()
    for i in np.linspace(0, len(source) - 1, min(len(source), _CAPTIONS_READ)).astype(int).tolist():
        # What cannot be read is counted when it is trained on.
        with contextlib.suppress(BadExample):
            found |= {" ".join(words): set(words) for words in (text.split() for text in source.captions(i)[:1])}
    chosen: list[str] = []
    while found and len(chosen) < count:
        # Captions that differ in a number only would draw one subject in all rows.
        others = [set(text.split()) for text in chosen]
        nearest = {text: min((_word_distance(words, o) for o in others), default=0.0) for text, words in found.items()}
        chosen.append(max(nearest, key=nearest.__getitem__))
        del found[chosen[-1]]
    return tuple(chosen) or ("",)


def _word_distance(a: set[str], b: set[str]) -> float:
    """Share of the words of two captions that only one of them has."""
    return len(a ^ b) / max(len(a | b), 1)


def with_data_classes(config: Config, source: Source | None, stored: Mapping[str, Any] = {}, place: str = "") -> Config:
    """A class-conditional config with the classes of the data.

    Args:
      config: of a run.
      source: of its data; None for data that is not opened for that.
      stored: settings that a run in this workdir was started with; empty for a new one.
      place: of that run, for messages.

    Raises:
      UserError: see `with_data_settings`.
    """
    where = config.data.title
    names = tuple(getattr(source, "classes", None) or ())
    _check_typed(config, names, where)
    # A config of another condition is refused by open_workdir, which says so.
    begun = stored if stored.get("condition") == "class" else {}
    # Before anything else: what a run has learnt decides.
    if begun:
        _check_stored(config, source, names, begun, where, place)
    if not names:
        # What the user, or the run before, says: the data say nothing.
        names = config.class_names or tuple(begun.get("class_names") or ())
    count = len(names) or config.num_classes or int(begun.get("num_classes") or 0)
    if not count:
        raise UserError(
            f"{where}: how many classes it has is not known before all of it is read; set config.num_classes, or their "
            "names by config.class_names=cat,dog"
        )
    if count == 1:
        raise UserError(
            f"{where} has one class, {names[0] if names else 0!r}: there is nothing to tell apart; "
            "config.condition=none trains without classes"
        )
    prompts = _snapshot_prompts(dataclasses.replace(config, num_classes=count, class_names=names))
    # All at once: prompts are validated by the names.
    return with_fields(config, {"num_classes": count, "class_names": names, "snapshot.prompts": prompts})


def _check_typed(config: Config, names: Sequence[str], where: str) -> None:
    """The data must have the classes that the config has."""
    count = len(names)
    if count and config.num_classes and config.num_classes != count:
        raise UserError(
            f"{where} has {count} classes, config.num_classes={config.num_classes}: leave it out, or set it to {count}"
        )
    if count and config.class_names and (difference := first_difference(config.class_names, names)):
        raise UserError(f"config.class_names: {where} has other classes ({difference}); leave them out")


def _check_stored(
    config: Config, source: Source | None, names: Sequence[str], begun: Mapping[str, Any], where: str, place: str
) -> None:
    """A run keeps its classes: a label is a row of what it has learnt."""
    earlier, count = tuple(begun.get("class_names") or ()), int(begun.get("num_classes") or 0)
    remedy = "use the classes that it was started with, or another --workdir"
    if names and earlier and (difference := first_difference(earlier, names)):
        raise UserError(f"{place} holds a run of other classes than {where} has: {difference}; {remedy}")
    if names and count and len(names) != count:
        raise UserError(f"{place} holds a run of {count} classes, {where} has {len(names)}; {remedy}")
    # Earlier versions numbered the folders by their names as texts, and kept no names.
    if not earlier and isinstance(source, FolderSource) and list(names) != sorted(names):
        difference = first_difference(sorted(names), names)
        raise UserError(
            f"{place} holds a run whose classes were numbered as texts are sorted, and {where} is numbered otherwise now "
            f"({difference}); rename the folders so that both orders agree (007, 008), or use another --workdir"
        )


def _snapshot_prompts(config: Config) -> tuple[str, ...]:
    """One prompt a row: those of the config, its preferred classes, or the first ones."""
    snapshot, names, count = config.snapshot, config.class_names, config.num_classes
    if prompts := chosen_prompts(config):
        # The message of a prompt does not know where that was written.
        try:
            class_labels(config, prompts)
        except UserError as e:
            raise UserError(f"config.snapshot.prompts: {e}") from None
        return prompts
    # As many rows as a grid of captions has.
    preferred = snapshot.preferred_classes or SnapshotConfig().prompts
    labels = [names.index(p) if p in names else int(p) if p.isdecimal() else count for p in preferred]
    # ImageNet's classes are not those of twelve breeds of dogs.
    if max(labels) >= count:
        labels = list(range(min(len(preferred), count)))
    # A name that two classes share tells neither.
    is_unique = lambda name: sum(n.casefold() == name.casefold() for n in names) == 1
    return tuple(names[i] if names and is_unique(names[i]) else str(i) for i in labels)
