"""Lists the members of a tar file and the places of their bytes from the headers alone.

Python's tarfile stops at the first broken header. Here a broken header costs only the members up to the next sound one.
Formats: POSIX ustar and pax, GNU (long names, base-256 sizes), and old V7.
"""

import re
import shlex
import typing
from collections.abc import Callable, Iterator

# Tar consists of blocks: a header is one, and data is padded to whole ones.
BLOCK = 512
# Type flags. L, K: GNU long name and link; x, g, X: pax. 7: contiguous file. 1 to 6: links, devices, folders, pipes.
_EXTENDED, _REGULAR, _WITHOUT_DATA = b"LKxgX", b"\0" + b"07", b"123456"
# Bytes of an extended header. A longer one is damage, and reading it would fill the memory.
_LONGEST_NAME = 1 << 20
# 18 digits stay below 2**63. Python's int() would also accept signs, underscores and other scripts' digits.
_SIZE, _OCTAL = re.compile("[0-9]{1,18}"), re.compile(rb"[0-7]{1,12}")
_PAX = re.compile(rb"(\d{1,20}) ([^=]+)=")
# A key of up to 80 characters fits into the 100 bytes of the name field together with its suffix.
_SHORT = 80
# The endings that the name of a compressed tar loses.
_PACKED = re.compile(r"(\.tar)?(\.(gz|bz2|xz|zst))?$|\.t(gz|bz2|xz)$", re.IGNORECASE)
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


def detect_compression(start: bytes) -> str | None:
    """Detects the kind of compression from a file's first bytes; None if it is not compressed."""
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)


def decompression_command(path: str, kind: str) -> str:
    """The command that writes an archive as a plain tar beside it."""
    # An archive in a bucket is copied here first.
    path = path.rpartition("/")[2] if "://" in path else path
    plain = _PACKED.sub("", path) + ".tar"
    # A compressed archive by the name of a plain one must not be its own target.
    plain = plain if plain != path else plain.removesuffix(".tar") + "-unpacked.tar"
    return f"{kind} -dc {shlex.quote(path)} > {shlex.quote(plain)}"


def iter_members(read: Callable[[int, int], bytes], length: int) -> Iterator[Member]:
    """Yields the regular files of a tar in their order, without links and special files.

    Args:
      read: maps (offset, size) to bytes; fewer at the end of the file.
      length: size of the tar in bytes.
    """
    offset, last_name = 0, ""
    extended: dict[str, str] = {}
    while offset + BLOCK <= length:
        header = read(offset, BLOCK)
        parsed = _parse_header(header)
        if parsed is None:
            if not header.strip(b"\0"):
                # Two blocks of zeros end a tar. Concatenated tars have members after them, so the search goes on.
                next_offset = _find_next_header(read, offset + BLOCK, length)
                if next_offset is None:
                    return
                offset = next_offset
                continue
            yield Member(last_name, offset, 0, "tar_corrupt")
            next_offset = _find_next_header(read, offset + BLOCK, length)
            if next_offset is None:
                return
            # Extended headers before the damage belong to a member that is lost.
            offset, extended = next_offset, {}
            continue
        name, size, kind = parsed
        start = offset + BLOCK
        if kind in _EXTENDED:
            if size > _LONGEST_NAME or start + size > length:
                yield Member(last_name, offset, 0, "tar_truncated" if start + size > length else "tar_corrupt")
                next_offset = _find_next_header(read, start, length)
                if next_offset is None:
                    return
                offset, extended = next_offset, {}
                continue
            data = read(start, size)
            # L, x and X describe the next member. K (link target) and g (global) change nothing that is read here.
            if kind in b"L":
                extended["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind in b"xX":
                extended |= _parse_pax(data)
            offset = start + _round_up_to_block(size)
            continue
        if _SIZE.fullmatch(extended.get("size", "")):
            size = int(extended["size"])
        name = extended.get("path", name)
        extended = {}
        # V7 tars mark folders by a slash at the end of the name of a regular file.
        if kind in _REGULAR and not name.endswith("/"):
            last_name = name
            yield Member(name, start, size, "tar_truncated" if start + size > length else "")
        # Links and devices may state a size, but no data follows.
        offset = start + (_round_up_to_block(size) if kind not in _WITHOUT_DATA else 0)
    # Less than a block is left: anything but zeros is a member cut short.
    if offset < length and read(offset, length - offset).strip(b"\0"):
        yield Member(last_name, offset, 0, "tar_truncated")


def is_header_of(header: bytes, size: int, key: str) -> bool:
    """Returns whether 512 bytes are the header of a regular file of `size` bytes, named `key` with a suffix."""
    # Size 0: the size may stand in a pax header, which is not read here.
    parsed = _parse_header(header)
    if parsed is None or parsed[2] not in _REGULAR or parsed[1] not in (size, 0):
        return False
    # Long names and names beyond ASCII stand in an extended header, so they are not compared.
    return len(key) > _SHORT or not key.isascii() or parsed[0].startswith(f"{key}.") or parsed[0] == key


def _round_up_to_block(size: int) -> int:
    # Negated floor division rounds up.
    return -(-size // BLOCK) * BLOCK


def _find_next_header(read: Callable[[int, int], bytes], at: int, length: int) -> int | None:
    """Finds the offset of the next sound header from `at` on; None if there is none."""
    # Windows of 1 MiB: after damage, the search may cross a large member.
    step = 1 << 20
    while at + BLOCK <= length:
        window = read(at, min(step, length - at))
        for place in range(0, len(window) - BLOCK + 1, BLOCK):
            # Image data may pass for a V7 header by chance. The magic number excludes that.
            if (
                window[place + 257 : place + 262] == b"ustar"
                and _parse_header(window[place : place + BLOCK]) is not None
            ):
                return at + place
        at += max(BLOCK, len(window) // BLOCK * BLOCK)
    return None


def _parse_header(header: bytes) -> tuple[str, int, int] | None:
    """Parses a header into (name, size, type flag); None if it is not sound."""
    if len(header) < BLOCK:
        return None
    stored = _parse_number(header[148:156])
    if stored is None or not header[0]:
        return None
    # The checksum counts its own 8 bytes as blanks.
    if sum(header) - sum(header[148:156]) + 8 * 32 != stored:
        return None
    size = _parse_number(header[124:136])
    if size is None:
        return None
    name = header[:100].split(b"\0", 1)[0]
    # GNU's magic is "ustar  ": it uses the prefix field for times.
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, header[156]


def _parse_number(field: bytes) -> int | None:
    # GNU stores sizes of 8 GiB and more in base 256.
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if _OCTAL.fullmatch(digits) else None


def _parse_pax(data: bytes) -> dict[str, str]:
    """Parses the records `LENGTH KEY=VALUE\\n` of a pax header; parsing stops at a damaged record."""
    records: dict[str, str] = {}
    position = 0
    while match := _PAX.match(data, position):
        length = int(match[1])
        # A length of zero or past the end would loop for ever or read the next record's bytes.
        if length < match.end() - position or position + length > len(data):
            break
        value = data[match.end() : position + length - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records
