"""Classes of a class-conditional model: how many there are, what they are called, and which one a prompt means."""

import difflib
import functools
from collections.abc import Sequence
from typing import Any

from gigagan_jax.config.run import SnapshotConfig
from gigagan_jax.core.errors import UserError

# Close names in a message, and names of a short list that is shown whole.
_CLOSE, _SHORT = 5, 12


def needs_prompts(config: Any) -> bool:
    """Whether images of a model are asked for by prompts: captions or classes. An unconditional model takes none."""
    return config.condition != "none"


def class_labels(config: Any, prompts: Sequence[str]) -> list[int]:
    """The labels of prompts of a class-conditional model; see `class_label`."""
    return [class_label(config, prompt) for prompt in prompts]


def class_label(config: Any, prompt: str) -> int:
    """The label of a prompt that is the name or the number of a class.

    A name may be spelled in upper or lower case where that leaves one class. Where classes are called by numbers, a number
    is a name.

    Args:
      config: of a class-conditional model.
      prompt: "golden retriever", or "207".

    Returns:
      0 to config.class_count - 1

    Raises:
      UserError: no class is meant, or several; the message lists close names and says how many classes there are.
    """
    text, names, count = prompt.strip(), config.class_names, config.class_count
    exact, folded = _index_names(names)
    # The exact spelling wins: "Polish" and "polish" may be two classes.
    found = exact.get(text) or folded.get(text.casefold()) or ()
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"prompt {prompt!r} may be class {' or '.join(map(str, found))} of {config.name}: give the number"
        )
    # Of classes "1", "2" and "3", "1" would otherwise be one class and "0" the same.
    is_number = text.isascii() and text.isdecimal()
    if is_number and int(text) < count and not _are_numbers(names):
        return int(text)
    raise UserError(f"prompt {prompt!r}: {config.name} has no such class; {describe_classes(config, text)}")


def describe_classes(config: Any, near: str = "") -> str:
    """The classes of a model in a few words, for messages.

    Args:
      config: of a class-conditional model.
      near: text whose closest names are listed where there are many.
    """
    names, count = config.class_names, config.class_count
    if not names:
        return f"its {count} classes have no names: give a number, 0 to {count - 1}"
    numbers = "" if _are_numbers(names) else f", or give a number, 0 to {count - 1}"
    if len(names) <= _SHORT:
        return f"its {count} classes are {', '.join(names)}{numbers}"
    _, folded = _index_names(names)
    close = difflib.get_close_matches(near.casefold(), folded, _CLOSE)
    shown = [names[folded[name][0]] for name in close] or names[:_CLOSE]
    return f"of its {count} classes, {'close ones' if close else 'the first'} are {', '.join(shown)}{numbers}"


def chosen_prompts(config: Any) -> tuple[str, ...]:
    """The prompts of a class-conditional config's snapshots; empty where nobody chose any."""
    prompts = config.snapshot.prompts
    # The default captions are of text models.
    return () if prompts == SnapshotConfig().prompts else prompts


def first_difference(before: Sequence[str], now: Sequence[str]) -> str:
    """The first class in which two lists differ, "class 3 was 'cat' and is now 'dog'"; empty for equal lists."""
    for i, (a, b) in enumerate(zip(before, now, strict=False)):
        if a != b:
            return f"class {i} was {a!r} and is now {b!r}"
    if len(before) > len(now):
        return f"class {len(now)} was {before[len(now)]!r} and is now missing"
    return f"class {len(before)}, {now[len(before)]!r}, is new" if len(now) > len(before) else ""


def check_classes(config: Any) -> None:
    """Raises UserError for a number of classes, or names, that cannot be."""
    if config.condition != "class":
        return
    # With one class there is nothing to condition on. 0 is "as the data".
    if config.num_classes == 1:
        raise UserError(
            "config.num_classes=1: condition='class' needs at least 2; config.condition=none trains without classes"
        )
    # Names alone are a number too.
    if config.class_names and config.num_classes not in (0, len(config.class_names)):
        raise UserError(
            f"config.class_names has {len(config.class_names)} names, config.num_classes={config.num_classes}: leave the "
            "names out, the data gives them"
        )
    # Without names a prompt can only be judged when the data is known (training/data_settings.py).
    if config.class_names:
        class_labels(config, chosen_prompts(config))


@functools.lru_cache(maxsize=8)
def _index_names(names: tuple[str, ...]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """({name: its labels}, the same by the name without case)"""
    exact: dict[str, list[int]] = {}
    folded: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        exact.setdefault(name, []).append(label)
        folded.setdefault(name.casefold(), []).append(label)
    return exact, folded


def _are_numbers(names: Sequence[str]) -> bool:
    return any(name.isdecimal() for name in names)
