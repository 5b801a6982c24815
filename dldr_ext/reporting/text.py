"""Text for terminals and pages, of names that may hold anything."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""Return text with what cannot be shown as escapes, so that a line stays a line.

    Parameters
    ----------
    text : object
        Bytes of a file name that are not UTF-8, which come as surrogates, become ``\xe9``; line
        breaks and other control characters become ``\n`` and the like.

    Returns
    -------
    str

    Examples
    --------
    >>> from dldr_ext.reporting.text import printable
    >>> print(printable("epoch\n1"), printable("\udce9poque"))
    epoch\n1 \xe9poque
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode("ascii")
