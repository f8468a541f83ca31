"""Groups the members of a tar into examples: an image with the captions, the metadata and the class that share its name.

Webdataset's rule comes first: the key is the name up to the first dot of its last part. Names with further dots
(`IMG_2023.05.01.jpg`, `x.input.jpg` beside `x.outputs.txt`) are split one dot at a time until each group has one image.
"""

import dataclasses
import os
from collections.abc import Iterator

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import IMAGE_SUFFIXES
from gigagan_jax.data.sources.tar_headers import BLOCK, Member, decompression_command, detect_compression, iter_members
from gigagan_jax.data.storage import Storage, is_local

# The largest uint32, as a size: no such member. Members from this size on cannot be indexed.
NO_MEMBER = 2**32 - 1
# Bytes of a read while scanning. Between two members of an example lie a header and the other text member, so
# 8 KiB cover both on disk. In buckets a request costs more than bytes: 8 MiB read through the images.
_LOCAL_WINDOW, _REMOTE_WINDOW = 8 << 10, 8 << 20
# Other endings of caption files, and what stands before .txt in x.caption.txt.
_CAPTION_SUFFIXES = (".caption", ".cap", ".text", ".prompt")

Place = tuple[int, int]


@dataclasses.dataclass
class TarExample:
    """One example. Places are (offset, size)."""

    key: str
    image: Place | None = None
    text: Place | None = None
    json: Place | None = None
    label: int | None = None
    fault: str = ""
    # Further images of the key: x.seg.png beside x.jpg.
    unused_images: int = 0


@dataclasses.dataclass(frozen=True)
class _Part:
    """A member of a group.

    Attributes:
      middle: what stands between the group's key and the suffix: "" or ".05.01".
      suffix: in lower case, with its dot; "" where the name has none.
      place: (offset, size); None where it cannot be indexed.
      label: of a `.cls` member.
      fault: of FAULTS, or "".
    """

    middle: str
    suffix: str
    place: Place | None
    label: int | None = None
    fault: str = ""

    @property
    def is_image(self) -> bool:
        return self.suffix in IMAGE_SUFFIXES


def iter_examples(storage: Storage, path: str, length: int) -> Iterator[TarExample]:
    """Yields the examples of a tar in the order of their first members.

    Raises:
      UserError: the tar is compressed.
    """
    window = _WindowedReader(storage, path, length)
    kind = detect_compression(window.read(0, min(length, BLOCK)))
    if kind:
        raise UserError(
            f"{path} is compressed ({kind}): examples in it cannot be read one by one; decompress it (images are "
            f"compressed already: nothing is lost by it): {decompression_command(path, kind)}"
        )
    key, parts, seen = "", list[_Part](), set[str]()
    for member in iter_members(window.read, length):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, chain = base.partition(".")
        # The damage is one bad example of its own, so that it is counted; the example before it stays.
        if member.fault == "tar_corrupt" or not member.name:
            yield from _split_group(key, parts)
            parts, seen = [], set()
            yield TarExample(f"{folder + slash + stem or '?'}@{member.offset}", fault=member.fault or "tar_corrupt")
            continue
        # Archivers add hidden files, such as macOS's ._name.
        if base.startswith("."):
            continue
        # A repeated suffix starts a new example: two examples of one key follow each other.
        # The key keeps the folder: equal names in two folders are two examples.
        if not parts or folder + slash + stem != key or chain.lower() in seen:
            yield from _split_group(key, parts)
            key, parts, seen = folder + slash + stem, [], set()
        seen.add(chain.lower())
        middle, last_dot, suffix = (dot + chain).rpartition(".")
        parts.append(_describe_member(window, member, middle, (last_dot + suffix).lower(), key))
    yield from _split_group(key, parts)


def join_scattered(examples: list[TarExample]) -> list[TarExample]:
    """Joins members of one key that do not follow each other, as `tar cf x.tar *.jpg *.txt` writes them.

    Only a key with one image and without a second text of a kind is joined: everything else stays as it was.
    """
    # Nearly all tars have none, and cost one pass here.
    without_image = {e.key for e in examples if not e.image and not e.fault}
    if not without_image:
        return examples
    owners: dict[str, TarExample | None] = {}
    for example in examples:
        if example.image and example.key in without_image:
            # None: several images have this key.
            owners[example.key] = None if example.key in owners else example
    joined = []
    for example in examples:
        owner = owners.get(example.key)
        fields = [f for f in ("text", "json", "label") if getattr(example, f) is not None]
        if example.image or example.fault or owner is None or any(getattr(owner, f) is not None for f in fields):
            joined.append(example)
            continue
        # The example without an image ends here: its members have found their owner.
        for field in fields:
            setattr(owner, field, getattr(example, field))
    return joined


def _describe_member(window: "_WindowedReader", member: Member, middle: str, suffix: str, key: str) -> _Part:
    fault, place = member.fault, (member.offset, member.size)
    # A conversion to files would write such a name outside its folder.
    if key.startswith("/") or "/../" in f"/{key}/":
        fault = "unsafe_name"
    if member.size >= NO_MEMBER or member.offset // BLOCK >= NO_MEMBER:
        return _Part(middle, suffix, None, fault="member_too_large")
    label = None
    # A class number has at most 10 digits; 16 bytes leave room for a line end.
    if suffix == ".cls" and member.size <= 16:
        digits = window.read(*place).strip()
        label = int(digits) if digits.isdigit() and int(digits) < 2**31 else None
    return _Part(middle, suffix, place, label, fault)


def _split_group(key: str, parts: list[_Part]) -> Iterator[TarExample]:
    """Yields the examples of consecutive members that share a key: one, unless there are several images with more dots."""
    # A recursion in the number of dots of a name would let a hostile one exceed Python's limit.
    waiting = [(key, parts)] if parts else []
    while waiting:
        key, parts = waiting.pop()
        # Webdataset: x.jpg is the image of x; x.seg.png beside it is something else.
        if any(p.is_image and not p.middle for p in parts):
            yield _make_example(key, parts)
            continue
        images = sum(p.is_image for p in parts)
        # In one step, however many dots they share: IMG_2023.05.01 is the key of its .jpg and its .txt.
        shared = _common_components([p.middle for p in parts])
        if images and shared:
            waiting.append((key + shared, [_without_prefix(p, shared) for p in parts]))
            continue
        # x is the key of x.input.jpg and x.outputs.txt.
        if images <= 1:
            yield _make_example(key, parts)
            continue
        groups: dict[str, list[_Part]] = {}
        for part in parts:
            first = "." + part.middle[1:].partition(".")[0] if part.middle else ""
            groups.setdefault(first, []).append(part)
        # A text that belongs to none of several images belongs to no example. Reversed: the last one waiting is next.
        for component, group in reversed(groups.items()):
            if any(p.is_image for p in group):
                waiting.append((key + component, [_without_prefix(p, component) for p in group]))


def _common_components(middles: list[str]) -> str:
    """[".05.01", ".05.02"] -> ".05"."""
    # Characters, cut at the last dot: commonpath would compare parts between slashes.
    prefix = os.path.commonprefix([m + "." for m in middles])  # noqa: RUF071
    return prefix[: max(0, prefix.rfind("."))]


def _without_prefix(part: _Part, prefix: str) -> _Part:
    return dataclasses.replace(part, middle=part.middle[len(prefix) :])


def _make_example(key: str, parts: list[_Part]) -> TarExample:
    image = next((p for p in parts if p.is_image and not p.middle), None) or next(
        (p for p in parts if p.is_image), None
    )
    text, json = (_find_companion(parts, image, kind) for kind in (".txt", ".json"))
    label = _find_companion(parts, image, ".cls")
    return TarExample(
        key,
        image=image.place if image else None,
        text=text.place if text else None,
        json=json.place if json else None,
        label=label.label if label else None,
        # The last fault is the one that was found last.
        fault=next((p.fault for p in reversed(parts) if p.fault), ""),
        unused_images=sum(p.is_image for p in parts if p is not image),
    )


def _find_companion(parts: list[_Part], image: _Part | None, suffix: str) -> _Part | None:
    """Finds the member of a kind that belongs to an image; None where it is missing or several would fit."""
    image = image or _Part("", "", None)
    # x.txt, and for x.input.jpg also x.input.txt and x.input.jpg.txt.
    middles = ("", image.middle, image.middle + image.suffix)
    of_kind = [p for p in parts if p.suffix == suffix]
    found = next((p for m in middles for p in of_kind if p.middle == m), None)
    if found is None and suffix == ".txt":
        named = [p for p in parts if _names_caption(p, middles)]
        found = named[0] if named else None
    # x.input.jpg and x.outputs.txt: the key is all that they share. A plain x.jpg has its plain x.txt.
    if found is None and image.middle and len(of_kind) == 1:
        return of_kind[0]
    return found


def _names_caption(part: _Part, middles: tuple[str, ...]) -> bool:
    """Whether a member is x.caption or x.caption.txt, of one of some names."""
    if part.suffix == ".txt":
        return any(part.middle.lower() == m.lower() + s for m in middles for s in _CAPTION_SUFFIXES)
    return part.suffix in _CAPTION_SUFFIXES and part.middle in middles


class _WindowedReader:
    """Reads a file forwards in windows, so that adjacent headers cost one read."""

    def __init__(self, storage: Storage, path: str, length: int):
        self._storage, self._path, self._length = storage, path, length
        self._size = _LOCAL_WINDOW if is_local(path) else _REMOTE_WINDOW
        self._at, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        place = offset - self._at
        if place < 0 or place + size > len(self._data):
            self._at, place = offset, 0
            self._data = self._storage.read(self._path, offset, min(max(size, self._size), self._length - offset))
        return self._data[place : place + size]
