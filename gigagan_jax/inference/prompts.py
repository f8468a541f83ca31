"""Prompts from the command line and from files: text with one a line, JSON lines, JSON, CSV and TSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import decode_text
from gigagan_jax.data.example import BadExample

_log = logging.getLogger(__name__)

# The standard input, as an argument.
STDIN = "-"
# Fields that hold the prompt; the first one that a file has is taken.
PROMPT_FIELDS = ("prompt", "text", "caption", "class", "label")
# Fields that name the output file.
NAME_FIELDS = ("file_name", "id")
# Longest name that is taken from a file. Endings and the number of the image come after it.
_NAME_LENGTH = 100
# Endings of files that are no text.
_BINARY = {
    ".parquet",
    ".arrow",
    ".gz",
    ".zip",
    ".tar",
    ".tgz",
    ".xlsx",
    ".xls",
    ".npy",
    ".npz",
    ".pkl",
    ".docx",
    ".pdf",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of which one or several images are made.

    Attributes:
      text: the prompt, or a class by its name or number; "" for a model without a condition.
      seed: of its first image; None where its file gives none.
      name: of its images' files, without an ending; None for a name of index, prompt and seed.
      file: where it was read; "" for a prompt of the command line.
      line: in this file, from 1.
    """

    text: str
    seed: int | None = None
    name: str | None = None
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """The place for an error message, `FILE line 3: `; "" for a prompt of the command line."""
        return f"{self.file} line {self.line}: " if self.file else ""


def read_prompts(file: str) -> list[Prompt]:
    """Reads a file of prompts.

    A text file has one prompt a line. JSON lines, a JSON list, and a CSV or TSV with a header have a field of `PROMPT_FIELDS`,
    and may have `seed`, and `file_name` or `id`, which names the output. COCO's captions JSON is read too. Text is UTF-8, or
    what its byte-order mark says.

    Args:
      file: its ending says what it is, .jsonl, .ndjson, .json, .csv or .tsv; all other names are text. "-" is text from the
        standard input.

    Returns:
      the prompts in the file's order; blank lines are left out, and the log counts them.

    Raises:
      UserError: the file is missing or no text, has no prompts, or a line of it is wrong; the message names file and line.
    """
    shown = "the standard input" if file == STDIN else file
    text = _read_text(file, shown)
    ending = "" if file == STDIN else Path(file).suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        prompts = _from_rows(_json_lines(text, shown), shown)
    elif ending == ".json":
        prompts = _from_rows(_json_rows(text, shown), shown)
    elif ending in (".csv", ".tsv"):
        prompts = _from_rows(_csv_rows(text, shown, ending), shown)
    else:
        # Not splitlines: it also cuts at form feeds and at separators that a prompt may hold.
        lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
        prompts = [Prompt(line.strip(), file=shown, line=n) for n, line in lines if line.strip()]
        blank = text.rstrip("\r\n").count("\n") + 1 - len(prompts)
        if prompts and blank:
            _log.info("%s: %d blank lines are left out", shown, blank)
    if not prompts:
        raise UserError(f"--prompts={file}: there are no prompts in it; write one a line")
    check_names(prompts)
    return prompts


def _read_text(file: str, shown: str) -> str:
    path = Path(os.path.expanduser(file))
    if file != STDIN and path.suffix.lower() in _BINARY:
        raise UserError(f"--prompts={file}: {path.suffix} is no text; write the prompts as .txt, .jsonl or .csv")
    try:
        data = sys.stdin.buffer.read() if file == STDIN else path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"--prompts={file} is a folder: name a file of prompts in it") from None
    except OSError as e:
        raise UserError(
            f"--prompts={file} cannot be read ({e.strerror or e}): name a .txt with one prompt a line, a .jsonl or a .csv; a "
            "prompt itself is --prompt"
        ) from None
    try:
        text = decode_text(data)
    except BadExample as e:
        cause = e.__cause__
        assert isinstance(cause, UnicodeDecodeError)
        line = data[: cause.start].count(b"\n") + 1
        raise UserError(f"{shown} line {line}: this is not {cause.encoding.upper()}; save it as UTF-8") from None
    # Text of UTF-16 without its mark is valid UTF-8 with these in it.
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{shown} line {line}: this is not text; write the prompts as .txt, .jsonl or .csv")
    return text


def _json_lines(text: str, shown: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON lines."""
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield n, _parse_json(line, shown, n)


def _parse_json(text: str, shown: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{shown} line {line + e.lineno - 1}: no valid JSON ({e.msg}, column {e.colno})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{shown} line {line}: no JSON that can be read") from None


def _json_rows(text: str, shown: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of a JSON list, or of the annotations of COCO's captions JSON."""
    values = _parse_json(text, shown, 1)
    if isinstance(values, dict) and isinstance(values.get("annotations"), list):
        # COCO's id of the caption: an image has five of them.
        values = values["annotations"]
    if not isinstance(values, list):
        raise UserError(f"{shown}: expected a list of prompts or objects; one object a line belongs in a .jsonl")
    # The place in the list: JSON has no lines that count.
    yield from enumerate(values, 1)


def _csv_rows(text: str, shown: str, ending: str) -> Iterator[tuple[int, Any]]:
    """(line, {column: value}) of a table with a header."""
    header = text.partition("\n")[0]
    # Spreadsheets write semicolons where a comma is the decimal point.
    delimiter = "\t" if ending == ".tsv" else ";" if ";" in header and "," not in header else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        if columns and not set(map(str.lower, columns)) & set(PROMPT_FIELDS):
            raise UserError(
                f"{shown} line 1: no column is called {', '.join(PROMPT_FIELDS[:3])}; there are: {', '.join(columns)[:200]}; "
                "a file of plain prompts is a .txt"
            )
        for row in reader:
            # Cells past the header have no name, and cells that a short row lacks are None.
            yield reader.line_num, {k.strip(): v or "" for k, v in row.items() if isinstance(k, str)}
    except csv.Error as e:
        raise UserError(f"{shown} line {reader.line_num}: no valid CSV ({e})") from None


def _from_rows(rows: Iterator[tuple[int, Any]], shown: str) -> list[Prompt]:
    prompts, blank, said = [], 0, False
    for line, row in rows:
        if isinstance(row, str):
            # A list of plain texts.
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise UserError(f'{shown} line {line}: expected an object such as {{"prompt": ...}}, got {str(row)[:60]!r}')
        fields = {str(k).lower(): v for k, v in row.items()}
        found = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
        # Of a wrong file this is the first line; of a right one, a slip that would shift an evaluation by one.
        if not found:
            raise UserError(
                f"{shown} line {line}: no field is called {', '.join(PROMPT_FIELDS[:3])}; there are: "
                f"{', '.join(map(str, row))[:200] or 'none'}"
            )
        if len(found) > 1 and not said:
            _log.info("%s: prompts are those of %s, and not of %s", shown, found[0], ", ".join(found[1:]))
            said = True
        text = fields[found[0]]
        # Classes are numbers. True is one too, to Python.
        if not isinstance(text, (str, int)) or isinstance(text, bool):
            raise UserError(f"{shown} line {line}: {found[0]} must be text, got {str(text)[:60]!r}")
        if not str(text).strip():
            blank += 1
            continue
        prompts.append(Prompt(str(text), _read_seed(fields, shown, line), _read_name(fields), shown, line))
    if prompts and blank:
        _log.info("%s: %d rows with a blank prompt are left out", shown, blank)
    return prompts


def _read_seed(fields: Mapping[str, Any], shown: str, line: int) -> int | None:
    seed = fields.get("seed")
    if seed is None or seed == "":
        return None
    # Tables of pandas write 3.0 where another row has none.
    text = str(seed).strip().removesuffix(".0")
    if isinstance(seed, bool) or not re.fullmatch(r"[0-9]{1,10}", text) or int(text) >= 2**32:
        raise UserError(f"{shown} line {line}: seed {str(seed)[:60]!r} must be a whole number, 0 to {2**32 - 1}")
    return int(text)


def _read_name(fields: Mapping[str, Any]) -> str | None:
    """A name without folders and ending that is valid on any file system and is a key of WebDataset's; None without one."""
    for field in NAME_FIELDS:
        value = fields.get(field)
        if value is None or isinstance(value, (bool, dict, list)):
            continue
        name = str(value)
        if field == "file_name":
            name = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", name)
        # A dot would end the key of a tar's member. A dash at the begin is a flag to other programs.
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:_NAME_LENGTH]
        if name:
            return name
    return None


def check_names(prompts: Sequence[Prompt]) -> None:
    """Raises UserError where two prompts, perhaps of two files, would have one name."""
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.name is None:
            continue
        # Some file systems do not tell capitals apart.
        other = seen.setdefault(prompt.name.casefold(), prompt)
        if other is not prompt:
            place = f"line {other.line}" if other.file == prompt.file else f"{other.file} line {other.line}"
            raise UserError(
                f"{prompt.where}its images would be called {prompt.name}, as those of {place}: give each row an id of "
                "its own, or leave id and file_name out"
            )
