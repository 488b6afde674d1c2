"""The chain: each entry's hash covers its bytes and the hash before it, so that the last one stands for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from llamastate.errors import InvalidArgumentError, LogTamperedError
from llamastate.log.entries import Decoded, Entry, UnknownEntry, decode, encode

__all__ = ["HASH_BYTES", "StoredEntry", "chain", "chain_hash", "checked"]

#: Of a hash; in text it has twice as many hexadecimal digits, lower case.
HASH_BYTES = 32

_NOTHING = bytes(HASH_BYTES)


class StoredEntry(msgspec.Struct, frozen=True, gc=False):
    """An entry in its place.

    Attributes
    ----------
    index : int
        From 0.
    hash : str
        Of ``prev_hash`` and ``data``, in hexadecimal.
    prev_hash : str or None
        The hash of the entry before; None for the first.
    data : bytes
        The entry, as it is hashed.
    """

    index: int
    hash: str
    prev_hash: str | None
    data: bytes

    @property
    def entry(self) -> Entry | UnknownEntry:
        """The entry, decoded anew with every use.

        Raises
        ------
        LogTamperedError
            It is none.
        """
        return self.decoded().entry

    def decoded(self) -> Decoded:
        """The entry, and what of it only a newer version understands."""
        try:
            return decode(self.data)
        except ValueError as error:
            raise LogTamperedError(
                f"entry {self.index} cannot be read: {error}", index=self.index, reason=str(error)
            ) from None


def chain_hash(prev_hash: str | None, data: bytes) -> str:
    """BLAKE2b-256 over the 32 bytes of the hash before (zeros if there is none) and the bytes of an entry."""
    digest = hashlib.blake2b(_NOTHING if prev_hash is None else bytes.fromhex(prev_hash), digest_size=HASH_BYTES)
    digest.update(data)
    return digest.hexdigest()


def chain(
    entries: Iterable[Entry | UnknownEntry | bytes], *, index: int = 0, prev_hash: str | None = None
) -> list[StoredEntry]:
    """Continue a chain.

    Parameters
    ----------
    entries : iterable of entries or bytes
        Bytes are entries that have been encoded already.
    index, prev_hash
        Where the first goes, and the hash before it.

    Raises
    ------
    InvalidArgumentError
        An entry cannot be recorded.
    """
    stored = []
    for entry in entries:
        data = entry if isinstance(entry, bytes) else encode(entry)
        found = chain_hash(prev_hash, data)
        stored.append(StoredEntry(index, found, prev_hash, data))
        index, prev_hash = index + 1, found
    return stored


def checked(
    entries: Iterable[StoredEntry], *, n_entries: int | None = None, head_hash: str | None = None
) -> Iterator[StoredEntry]:
    """Let entries through, from the first on, as long as they hold.

    Parameters
    ----------
    entries : iterable of StoredEntry
    n_entries, head_hash
        How many there should be, and the hash of the last; not compared if None.

    Raises
    ------
    LogTamperedError
        At the first that does not hold.
    """
    n, last = 0, None
    blake2b, fromhex, place = hashlib.blake2b, bytes.fromhex, _NOTHING
    for stored in entries:
        if stored.index != n:
            raise tampered(n, f"entry {n} is missing: after it comes {stored.index}")
        if stored.prev_hash != last:
            raise tampered(n, f"entry {n} does not follow the one before it")
        digest = blake2b(place + stored.data, digest_size=HASH_BYTES).hexdigest()
        if digest != stored.hash:
            raise tampered(n, f"entry {n} was changed: its hash is {digest}, not {stored.hash}")
        n, last, place = n + 1, digest, fromhex(digest)
        yield stored
    if n_entries is not None and n != n_entries:
        raise tampered(min(n, n_entries), f"there are {n} entries, not {n_entries}")
    if head_hash is not None and last != head_hash:
        raise tampered(max(n - 1, 0), f"the last entry has the hash {last}, not {head_hash}")


def tampered(index: int, reason: str) -> LogTamperedError:
    """The error for an entry that does not hold."""
    return LogTamperedError(reason, index=index, reason=reason)


def is_hash(value: object) -> bool:
    """Whether something can be a hash of the chain."""
    return isinstance(value, str) and len(value) == 2 * HASH_BYTES and set(value) <= set("0123456789abcdef")


def require_chain(entries: Sequence[StoredEntry], index: int, prev_hash: str | None) -> None:
    """Refuse entries that do not continue a chain: a store must not take in what it could never verify.

    Raises
    ------
    LogTamperedError
    InvalidArgumentError
        An entry is not on one line, which is how logs are exported.
    """
    for stored in entries:
        if b"\n" in stored.data or b"\r" in stored.data:
            raise InvalidArgumentError("an entry has no ends of lines in it", name="entries", value=stored.index)
        if (stored.index, stored.prev_hash) != (index, prev_hash) or chain_hash(prev_hash, stored.data) != stored.hash:
            raise tampered(stored.index, f"entry {stored.index} does not follow entry {index - 1}")
        index, prev_hash = index + 1, stored.hash
