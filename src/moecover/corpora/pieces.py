"""Long documents in pieces: reads text in any parts, yields pieces that a sample is drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_CHARS = 20_000  # longer documents are cut at line ends, so that a sample does not come from one book


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """A document in pieces of about `PIECE_CHARS` characters, cut at line ends where there are any.

    Args:
        chunks: its text in any parts, in order.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > PIECE_CHARS:
            end = rest.rfind("\n", start + 1, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest
