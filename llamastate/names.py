"""Names of sessions: such as are a file name on every common disk, and one file name only."""

from __future__ import annotations

import unicodedata

from llamastate.errors import SessionNameError

__all__ = ["MAX_BYTES", "check_name", "fold"]

#: Of UTF-8. With a suffix and the longer name of a temporary file this stays below 255 everywhere.
MAX_BYTES = 100

_FORBIDDEN = frozenset('<>:"/\\|?*')
#: Control and invisible characters, halves of pairs, ends of line, and code points that may mean something one day.
_CATEGORIES = {
    "Cc": "a control character",
    "Cf": "an invisible character",
    "Cs": "half a character",
    "Cn": "an unassigned character",
    "Zl": "an end of line",
    "Zp": "an end of line",
}
#: Windows opens a device of that name, whatever follows the first dot.
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{d}{n}" for d in ("com", "lpt") for n in "0123456789¹²³"
}


def check_name(name: object) -> str:
    """The name in NFC, so that two spellings of one text are one session.

    Raises
    ------
    SessionNameError
        ``reason`` says what is wrong with it.
    """
    if not isinstance(name, str):
        raise SessionNameError(
            f"a session's name is text, not {type(name).__name__}", name=repr(name), reason="no text"
        )
    reason = _reason(name := unicodedata.normalize("NFC", name))
    if reason is not None:
        raise SessionNameError(f"{name!r:.120} cannot be the name of a session: {reason}", name=name, reason=reason)
    return name


def fold(name: str) -> str:
    """What names that some disk takes for one have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).upper().casefold())


def _reason(name: str) -> str | None:
    if not name:
        return "it is empty"
    for char in name:
        if char in _FORBIDDEN:
            return f"it has {char!r} in it"
        if (what := _CATEGORIES.get(unicodedata.category(char))) is not None:
            return f"it has {what} in it, {char!a}"
    if (n_bytes := len(name.encode())) > MAX_BYTES:
        return f"it has {n_bytes} bytes, more than {MAX_BYTES}"
    if name[0] == ".":
        return "it begins with a dot"
    if name[-1] == ".":
        return "it ends with a dot"
    if name[0].isspace() or name[-1].isspace():
        return "it begins or ends with a space"
    if (device := name.partition(".")[0].rstrip().casefold()) in _DEVICES:
        return f"{device.upper()} is a device on Windows"
    return None
