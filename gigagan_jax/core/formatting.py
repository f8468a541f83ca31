"""Formats numbers and tables as text for people."""

from collections.abc import Iterable


def format_gib(n: float | None) -> str:
    """12.34 GiB"""
    return "unknown" if n is None else f"{n / 2**30:.2f} GiB"


def format_milliseconds(seconds: float | None) -> str:
    """430 ms"""
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.3g} ms"


def format_percent(share: float | None) -> str:
    """38.2 %, with as many digits as a small share needs."""
    if share is None:
        return "unknown"
    # At least two significant digits for shares down to 0.01 %.
    digits = 1 if share >= 0.1 or share == 0 else 2 if share >= 0.001 else 4
    return f"{100 * share:.{digits}f} %"


def format_table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Aligned text: columns of numbers to the right, others to the left."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    # An empty cell does not make a column of numbers text.
    right = [all(_is_numeric(line[i]) for line in lines[1:]) for i in range(len(header))]
    show = lambda line: "  ".join(
        c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
    ).rstrip()
    return "\n".join([show(header), "  ".join("-" * w for w in widths), *map(show, lines[1:])])


def _is_numeric(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").isdecimal() or not text


def format_duration(seconds: float) -> str:
    """'42 s', '3 min 05 s', '2 h 10 min'."""
    # Rounded once, so that 59.6 s is "1 min 00 s" and not "60 s".
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def format_bytes(size: float) -> str:
    """ "512 B", "3.4 kB", "1.2 GB"."""
    # Decimal units, as disks and buckets have. 999.5 would round to "1e+03".
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
