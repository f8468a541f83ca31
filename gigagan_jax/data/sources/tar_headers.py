"""The members of a tar file and where their bytes lie, read from its headers alone; damaged files included.

Python's tarfile stops at the first broken header and reads ahead of what is asked for. Here a broken header costs the
members up to the next sound one. Formats: POSIX ustar and pax, GNU (long names, base-256 sizes), and old V7.
"""

import re
import typing
from collections.abc import Callable, Iterator

BLOCK = 512
_EXTENDED, _REGULAR, _WITHOUT_DATA = b"LKxgX", b"\0" + b"07", b"123456"  # type flags
_LONGEST_NAME = 1 << 20  # of an extended header; more is damage
_SIZE, _OCTAL = re.compile("[0-9]{1,18}"), re.compile(rb"[0-7]{1,12}")
_PAX = re.compile(rb"(\d{1,20}) ([^=]+)=")
_SHORT = 80  # characters of a key that is in its header with any suffix
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(typing.NamedTuple):
    """A regular file in a tar, or damage.

    Attributes:
      name: as stored; of damage, the name of the last sound member.
      offset: of its data, in bytes from the start of the tar.
      size: of its data, in bytes.
      fault: "", or `tar_truncated` (the tar ends before the data does) or `tar_corrupt` (no header where one belongs).
    """

    name: str
    offset: int
    size: int
    fault: str = ""


def compression(start: bytes) -> str | None:
    """The kind of compression by a file's first bytes; None where it is not compressed."""
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)


def members(read: Callable[[int, int], bytes], length: int) -> Iterator[Member]:
    """Regular files of a tar in their order, hard and symbolic links and special files left out.

    Args:
      read: (offset, size) to bytes; fewer at the end of the file.
      length: of the tar in bytes.
    """
    at, last = 0, ""
    extended: dict[str, str] = {}
    while at + BLOCK <= length:
        header = read(at, BLOCK)
        parsed = _parse(header)
        if parsed is None:
            if not header.strip(b"\0"):
                # The end is two blocks of zeros; one alone, or padding before more members, is passed over.
                ahead = _next_header(read, at + BLOCK, length)
                if ahead is None:
                    return
                at = ahead
                continue
            yield Member(last, at, 0, "tar_corrupt")
            ahead = _next_header(read, at + BLOCK, length)
            if ahead is None:
                return
            at, extended = ahead, {}
            continue
        name, size, kind = parsed
        start = at + BLOCK
        if kind in _EXTENDED:
            if size > _LONGEST_NAME or start + size > length:
                yield Member(last, at, 0, "tar_truncated" if start + size > length else "tar_corrupt")
                ahead = _next_header(read, start, length)
                if ahead is None:
                    return
                at, extended = ahead, {}
                continue
            data = read(start, size)
            if kind in b"L":
                extended["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind in b"xX":
                extended |= _pax(data)
            at = start + _padded(size)
            continue
        if _SIZE.fullmatch(extended.get("size", "")):
            size = int(extended["size"])
        name = extended.get("path", name)
        extended = {}
        if kind in _REGULAR and not name.endswith("/"):
            last = name
            yield Member(name, start, size, "tar_truncated" if start + size > length else "")
        at = start + (_padded(size) if kind not in _WITHOUT_DATA else 0)
    if at < length and read(at, length - at).strip(b"\0"):
        yield Member(last, at, 0, "tar_truncated")


def is_header_of(header: bytes, size: int, key: str) -> bool:
    """Whether 512 bytes are the header of a regular file of so many bytes (its size may stand in a pax header instead) whose
    name begins with `key` and a dot. Long names and those beyond ASCII, which stand elsewhere, are not compared."""
    parsed = _parse(header)
    if parsed is None or parsed[2] not in _REGULAR or parsed[1] not in (size, 0):
        return False
    return len(key) > _SHORT or not key.isascii() or parsed[0].startswith(f"{key}.") or parsed[0] == key


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next_header(read: Callable[[int, int], bytes], at: int, length: int) -> int | None:
    """Offset of the next sound header from `at` on, in steps of a block."""
    step = 1 << 20
    while at + BLOCK <= length:
        window = read(at, min(step, length - at))
        for place in range(0, len(window) - BLOCK + 1, BLOCK):
            # Data can look like an old header by chance, hardly ever like one with a magic number.
            if window[place + 257 : place + 262] == b"ustar" and _parse(window[place : place + BLOCK]) is not None:
                return at + place
        at += max(BLOCK, len(window) // BLOCK * BLOCK)
    return None


def _parse(header: bytes) -> tuple[str, int, int] | None:
    """(name, size, type flag) of a header, None if it is none."""
    if len(header) < BLOCK:
        return None
    stored = _number(header[148:156])
    if stored is None or not header[0]:
        return None
    # The checksum counts its own field as blanks.
    if sum(header) - sum(header[148:156]) + 8 * 32 != stored:
        return None
    size = _number(header[124:136])
    if size is None:
        return None
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, header[156]


def _number(field: bytes) -> int | None:
    if field[0] == 0x80:  # GNU: base 256
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if _OCTAL.fullmatch(digits) else None


def _pax(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a pax header; what cannot be read is left out."""
    out: dict[str, str] = {}
    at = 0
    while match := _PAX.match(data, at):
        length = int(match[1])
        if length < match.end() - at or at + length > len(data):
            break
        value = data[match.end() : at + length - 1]
        out[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return out
