"""What a file or a blob is that somebody gave where another kind belongs: the first bytes tell."""

from __future__ import annotations

__all__ = ["what_is"]

_KINDS = {
    b"GGUF": "a GGUF (a model), not a state",
    b"nsgg": "a GGSN (a whole context): use Context.state_load_file or Session.import_file",
    b"qsgg": "a GGSQ (one sequence): use Context.state_seq_load_file or Session.import_file",
    b"\xd8\x3c\x14\xaf": "the state of one sequence: use state_seq_set_data",
    b"\x89LLS": "a snapshot: use Snapshot.open or Session.load",
}
_MAX_ARCH_BYTES = 64


def what_is(head: bytes) -> str | None:
    """What begins like that and what to do with it, in words that follow "this is"; None if nothing known does.

    Parameters
    ----------
    head : bytes
        The first 68 of it; of whole-context states fewer do not suffice.
    """
    found = _KINDS.get(bytes(head[:4]))
    if found is not None:
        return found
    n = int.from_bytes(head[:4], "little")
    name = bytes(head[4 : 4 + n])
    # the state of a whole context begins with the name of the architecture
    if (
        0 < n == len(name) <= _MAX_ARCH_BYTES
        and name.isascii()
        and name.replace(b"-", b"").replace(b"_", b"").isalnum()
    ):
        return "the state of a whole context: use state_set_data"
    return None
