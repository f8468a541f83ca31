"""Places that parameters had in the module tree before: earlier checkpoints are read by them, initial values drawn by them.

A change of the module tree raises `migrations.FORMAT` and adds a line here for each part that moved.
"""

from collections.abc import Mapping
from typing import Any

# (format that the place came with, network, place now, place before); "*" stands for the number of a level
RENAMED: tuple[tuple[int, str, str, str], ...] = (
    (2, "generator", "levels/*/entry", "entry/*"),
    (2, "generator", "levels/*/blocks", "rest/*"),
    (2, "generator", "levels/*/attention", "attention/*"),
    (2, "generator", "levels/*/to_rgb", "to_rgb/*"),
    (2, "discriminator", "levels/*/entry", "entries/*"),
    (2, "discriminator", "levels/*/blocks", "stages/*/blocks"),
    (2, "discriminator", "levels/*/attention", "stages/*/attention"),
    (2, "discriminator", "levels/*/down", "stages/*/down"),
    (2, "discriminator", "levels/*/head", "heads/*"),
)


def path_at_format(network: str, path: str, number: int = 0) -> str:
    """Where the parameter that is now at `path` lies in checkpoints of a format; 0 is the first."""
    for came, net, now, before in reversed(RENAMED):
        if came > number and net == network:
            path = _replace_start(path, now, before)
    return path


def to_paths_at_format(network: str, params: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A tree of parameters (or of what belongs to each) as checkpoints of a format have it."""
    return nest({path_at_format(network, path, number): x for path, x in _flatten(params).items()})


def from_paths_at_format(
    network: str, params: Mapping[str, Any], like: Mapping[str, Any], number: int
) -> dict[str, Any]:
    """The way back, to the tree of `like`."""
    flat = _flatten(params)
    return nest({path: flat[path_at_format(network, path, number)] for path in _flatten(like)})


def _replace_start(path: str, now: str, before: str) -> str:
    """`path` with `before` in place of `now`, where it starts with `now`."""
    parts, pattern = path.split("/"), now.split("/")
    matches = len(parts) >= len(pattern) and all(q in ("*", p) for p, q in zip(parts, pattern, strict=False))
    if not matches:
        return path
    numbers = iter([p for p, q in zip(parts, pattern, strict=False) if q == "*"])
    start = [next(numbers) if q == "*" else q for q in before.split("/")]
    return "/".join([*start, *parts[len(pattern) :]])


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, name + "/") if isinstance(value, Mapping) else {name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """{path: value} -> nested as parameters are."""
    nested: dict[Any, Any] = {}
    for path, value in flat.items():
        # nnx keys the entries of a list by integers.
        *groups, key = (int(k) if k.isdecimal() else k for k in path.split("/"))
        group = nested
        for g in groups:
            group = group.setdefault(g, {})
        group[key] = value
    return nested
