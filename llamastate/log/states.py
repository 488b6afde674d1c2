"""Where the state of a session is: what a log records of it, and whether it still serves.

A state is in a snapshot's file or in a prefix store. Either way the log has its hash: of the file, or of the last
block's chain. What is found there later and has another hash is another state, whatever its name.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from llamastate.arrays import Int32Array
from llamastate.errors import (
    CorruptStateError,
    StateFileNotFoundError,
    StoreFullError,
    TokensMismatchError,
)
from llamastate.fingerprint import Fingerprint, require_same
from llamastate.log.chaining import HASH_BYTES
from llamastate.log.store import LogStore
from llamastate.snapshot import Snapshot

if TYPE_CHECKING:
    from llamastate.context import Context
    from llamastate.prefix import PrefixStore
    from llamastate.session import Session

__all__ = ["put_into", "require_stored", "saved_to", "usable_snapshot"]


# --- a file -----------------------------------------------------------------------------------------------------------


def saved_to(path: str | os.PathLike[str], snapshot: Snapshot, store: LogStore) -> dict[str, Any]:
    """Save a snapshot; what is to be recorded of it."""
    size = snapshot.save(path)
    with memoryview(snapshot) as image:
        digest = _digest(image)
    return {
        "path": _recorded_path(store, path),
        "blake2b": digest,
        "size": size,
        "n_tokens": snapshot.n_tokens,
        "tokens": _digest(snapshot.tokens.astype("<i4").tobytes()),
        "fingerprint": snapshot.fingerprint.to_dict(),
    }


def usable_snapshot(store: LogStore, recorded: dict[str, Any], ctx: Context) -> Snapshot:
    """Open what was recorded.

    Raises
    ------
    FingerprintMismatchError
        It is of another model or other settings.
    LlamaStateError
        It is not there, or not what was recorded.
    """
    # told by the log alone, so that a wrong model is one also when the file is gone
    _require_same(recorded, ctx)
    snapshot = Snapshot.open(_found_path(store, recorded.get("path")), verify=False)
    try:
        with memoryview(snapshot) as image:
            found = _digest(image)
        if found != recorded.get("blake2b"):
            raise CorruptStateError(
                f"{snapshot.path!r} is not the file that the log has on record",
                path=snapshot.path,
                reason="another hash",
                section="file",
            )
        require_same(snapshot.fingerprint, ctx.fingerprint)
    except BaseException:
        snapshot.close()
        raise
    return snapshot


def _require_same(recorded: dict[str, Any], ctx: Context) -> None:
    if isinstance(fingerprint := recorded.get("fingerprint"), dict):
        require_same(Fingerprint.from_dict(fingerprint), ctx.fingerprint)


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest()


def _folder(store: LogStore) -> str | None:
    path = getattr(store, "path", None)
    return os.path.dirname(os.path.realpath(path)) if isinstance(path, (str, os.PathLike)) else None


def _recorded_path(store: LogStore, path: str | os.PathLike[str]) -> str:
    whole, folder = os.path.realpath(os.fsdecode(path)), _folder(store)
    if folder is not None and os.path.splitdrive(whole)[0] == os.path.splitdrive(folder)[0]:
        relative = os.path.relpath(whole, folder)
        if relative.split(os.sep, 1)[0] != os.pardir:
            return relative.replace(os.sep, "/")
    return whole


def _found_path(store: LogStore, recorded: Any) -> str:
    if not isinstance(recorded, str):
        raise StateFileNotFoundError("the log names no file", reason="no path")
    folder = _folder(store)
    path = recorded if folder is None else os.path.join(folder, recorded)
    # a log can come from anywhere: what it names must not be a device that never ends or a pipe that waits
    try:
        plain = os.path.isfile(path)
    except ValueError:
        plain = False
    if not plain:
        raise StateFileNotFoundError(f"there is no file {path!r:.200}", path=path, reason="not there")
    return path


# --- a prefix store ---------------------------------------------------------------------------------------------------


def put_into(prefix: PrefixStore, session: Session) -> dict[str, Any]:
    """Put a session's state into a prefix store; what is to be recorded of it.

    Raises
    ------
    StoreFullError
        Not all of it has found room.
    """
    prefix.put(session)
    prefix.flush()
    tokens, ctx = session.tokens, session.ctx
    if (n := prefix.lookup(tokens, ctx=ctx)) < len(tokens) // prefix.block_tokens * prefix.block_tokens:
        raise StoreFullError(f"the prefix store has no room for this session: {n} of {len(tokens)} tokens are in it")
    return {
        "block": _keys(prefix, ctx, tokens)[-1],
        "block_tokens": prefix.block_tokens,
        "n_tokens": len(tokens),
        "fingerprint": ctx.fingerprint.to_dict(),
    }


def require_stored(prefix: PrefixStore | None, recorded: dict[str, Any], ctx: Context, tokens: Int32Array) -> None:
    """Make sure that what was recorded is the beginning of these tokens, and still there.

    Raises
    ------
    FingerprintMismatchError
        It is of another model or other settings.
    LlamaStateError
        It is not there, or of other tokens.
    """
    _require_same(recorded, ctx)
    if prefix is None:
        raise StateFileNotFoundError("the state is in a prefix store, and none was given", reason="no prefix store")
    n, size = recorded.get("n_tokens"), prefix.block_tokens
    if recorded.get("block_tokens") != size:
        raise StateFileNotFoundError(
            f"its blocks have {recorded.get('block_tokens')!r:.40} tokens, those of the prefix store {size}",
            reason="another size of blocks",
        )
    keys = _keys(prefix, ctx, tokens)
    if not isinstance(n, int) or not 0 <= n // size < len(keys) or keys[n // size] != recorded.get("block"):
        raise TokensMismatchError("the history is written in other tokens than it was when its state was kept")
    if (found := prefix.lookup(tokens, ctx=ctx)) < n // size * size:
        raise StateFileNotFoundError(f"of {n} tokens the prefix store has {found} left", reason="evicted")


def _keys(prefix: PrefixStore, ctx: Context, tokens: Int32Array) -> list[str]:
    from llamastate.prefix.chain import block_keys, portable, root_key

    root = root_key(portable(ctx.fingerprint, ctx.schema), prefix.block_tokens)
    return [key.hex() for key in block_keys(root, tokens, prefix.block_tokens)]
