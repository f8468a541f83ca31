"""Splits and classes by the names of folders."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.survey.file_names import split_of


def choose_split(splits: Sequence[str], wanted: str, where: str) -> str:
    """The one of the splits that `config.data.split` names, by any of its spellings.

    Raises:
      UserError: none of them.
    """
    # Literally first: train2014 may be wanted, not train2017.
    if wanted in splits:
        return wanted
    # val for validation, train2017 for train.
    same = [s for s in splits if split_of(s) == (split_of(wanted) or wanted)]
    if same:
        # Of train2014 and train2017, the later.
        return max(same)
    raise UserError(
        f"{where} has the splits {', '.join(splits)}, and config.data.split={wanted!r} is none of them: "
        f"--config.data.split={splits[0]} takes that one"
    )


def find_split_folders(names: Sequence[str]) -> list[str]:
    """The folders of pictures that are the splits of classes: `train/cat/1.jpg`, `val/cat/2.jpg`; empty where none are.

    Args:
      names: paths of the pictures.
    """
    folders: dict[str, set[str]] = collections.defaultdict(set)
    for name in names:
        parts = name.split("/")
        if len(parts) > 1:
            # "" stands for pictures that lie directly in the folder.
            folders[parts[0]].add(parts[1] if len(parts) > 2 else "")
    # The folders of splits hold no picture themselves.
    splits = sorted(f for f, inside in folders.items() if split_of(f) and "" not in inside)
    if len(splits) == len(folders):
        return splits
    # Beside other folders, two of them must share classes: a class may be called "train" too.
    shared = [f for f in splits if any(folders[f] & folders[g] for g in splits if g != f)]
    return shared if any(split_of(f) == "train" for f in shared) else []


def order_classes(names: Sequence[str]) -> tuple[str, ...]:
    """Class folders in the order of their labels: by number where all are numbers, by name otherwise."""
    if names and all(n.isascii() and n.isdecimal() for n in names):
        # Python refuses to convert texts of more than 4,300 digits.
        return tuple(sorted(names, key=lambda n: (len(n.lstrip("0")), n.lstrip("0"), n)))
    return tuple(sorted(names))


def find_class_root(names: Sequence[str], wanted: str, where: str) -> tuple[str, str, dict[str, int]]:
    """Finds the folder whose sub-folders are classes: below a folder that wraps all, and below a split.

    Args:
      names: paths of the pictures.
      wanted: `config.data.split`.
      where: the folder, for messages.

    Returns:
      (its path relative to the surveyed folder, ending in "/", or ""; the split or ""; pictures by split)

    Raises:
      UserError: there are splits, and `wanted` is none of them.
    """
    root, split, splits = "", "", {}
    while True:
        # Relative to the folder looked at, one level deeper each time.
        inside = [n[len(root) :] for n in names if n.startswith(root)]
        counts = collections.Counter(n.split("/", 1)[0] for n in inside if "/" in n)
        found = [] if split else find_split_folders(inside)
        if found:
            # A single one is what there is.
            split = choose_split(found, wanted, where) if len(found) > 1 else found[0]
            splits = {f: counts[f] for f in found}
            root += split + "/"
        elif len(counts) == 1 and all(n.count("/") > 1 for n in inside) and _folders_below(inside) > 1:
            # A folder around all classes, as archives unpack to.
            root += next(iter(counts)) + "/"
        else:
            return root, split, splits


def _folders_below(inside: Sequence[str]) -> int:
    """Number of folders one level below the only one."""
    return len({n.split("/")[1] for n in inside})
