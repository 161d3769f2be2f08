"""The one exception type that a user's mistake ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BillhookError(Exception):
    """A mistake or obstacle that the user can act on.

    The message is one sentence (or two) that says what is wrong, where, and what to do. The command
    line prints it without a traceback and exits with code 2; Python callers may catch it.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Phrase " (did you mean 'x'?)" for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
