"""Parameters that had another place in the module tree once: checkpoints of then are read by it, and initial values drawn by it.

A change of the module tree raises `migrations.FORMAT` and adds a line here for each part that moved.
"""

from collections.abc import Mapping
from typing import Any

# (format of stored configs that the place came with, network, place now, place before), places as "entry/0/conv0"
RENAMED: tuple[tuple[int, str, str, str], ...] = ()


def place_at(network: str, path: str, number: int = 0) -> str:
    """Where the parameter that is now at `path` lay in checkpoints of a format; 0: at the very first."""
    for came, net, now, before in reversed(RENAMED):
        if came > number and net == network and (path == now or path.startswith(now + "/")):
            path = before + path[len(now) :]
    return path


def to_places_at(network: str, params: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A tree of parameters (or of what belongs to each) as checkpoints of a format have it."""
    return _nested({place_at(network, path, number): x for path, x in _flat(params).items()})


def from_places_at(network: str, params: Mapping[str, Any], like: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The way back, to the tree of `like`."""
    flat = _flat(params)
    return _nested({path: flat[place_at(network, path, number)] for path in _flat(like)})


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= _flat(value, name + "/") if isinstance(value, Mapping) else {name: value}
    return out


def _nested(flat: Mapping[str, Any]) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for path, value in flat.items():
        *groups, key = (int(k) if k.isdecimal() else k for k in path.split("/"))
        group = out
        for g in groups:
            group = group.setdefault(g, {})
        group[key] = value
    return out
