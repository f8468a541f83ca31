"""Sources by name: what a config's `data.kind` may say."""

import inspect
from collections.abc import Callable
from typing import Any

from gigagan_jax.data.records import Source
from gigagan_jax.errors import UserError


def _digits(path: str, **options: Any) -> Source:
    from gigagan_jax.data.sources.digits import DigitsSource

    _check_options("digits", DigitsSource, options)
    return DigitsSource(**options)


def _folder(path: str, **options: Any) -> Source:
    from gigagan_jax.data.sources.folder import FolderSource

    _check_options("folder", FolderSource, options)
    return FolderSource(path, **options)


# Each maker imports its own source: a missing optional package concerns only those who ask for it.
_MAKERS: dict[str, Callable[..., Source]] = {"digits": _digits, "folder": _folder}


def make_source(kind: str, path: str = "", **options: Any) -> Source:
    """Makes the source `kind` at `path` (ignored by kinds that bring their own data).

    Raises UserError for an unknown kind or option, and whatever UserError the source itself has for its path.
    """
    if kind not in _MAKERS:
        raise UserError(f"unknown kind of data {kind!r}; there are {', '.join(sorted(_MAKERS))}")
    return _MAKERS[kind](path, **options)


def _check_options(kind: str, source: Callable[..., Source], options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(source).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise UserError(
                f"data of kind {kind!r} has no option {name!r}; it has {', '.join(known) if known else 'none'}"
            )
