"""Every error as one sentence with its remedy."""

from __future__ import annotations

import contextlib
import errno
import sys


class Failed(Exception):
    """A run that started and could not end; its message says what to do. Exit status 1."""


EXPECTED = (ValueError, OSError, Failed, RuntimeError, ImportError, ArithmeticError)  # what a sentence was written for
REMEDIES = {
    errno.ENOSPC: "Free some space there.",
    errno.EDQUOT: "Free some space there.",
    errno.EACCES: "Give a folder that you may write to.",
    errno.EPERM: "Give a folder that you may write to.",
    errno.EROFS: "Give a folder that you may write to.",
}


def sentence_of(error: BaseException) -> str:
    """An error's words on one line, with a full stop."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror}. {REMEDIES.get(error.errno or 0, 'Give another folder.')}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        text = f"out of memory; lower batch_size, minibatch_size or heldout_samples ({text[:120]})"
    return text if text.endswith((".", "?", "!", "`")) else f"{text}."


def warn(sentence: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # `2>&1 | head`
        print(f"scoreact: {sentence}", file=sys.stderr)
