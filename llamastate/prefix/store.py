"""The prefix store: what it keeps, where it looks, and what it gives back."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llamastate.arrays import TokensLike, as_index, as_tokens
from llamastate.errors import (
    InvalidArgumentError,
    InvalidSequenceError,
    LoadError,
    NotEnoughCellsError,
    StoreFullError,
    TokensMismatchError,
)
from llamastate.flags import SeqFlags
from llamastate.params import I32
from llamastate.prefix.chain import anchor_key, block_keys, portable, root_key
from llamastate.prefix.checks import MOST_TOKENS, at_least, check_context, check_share, check_tier
from llamastate.prefix.entry import Entry, Kind, build, size_of
from llamastate.prefix.keeping import Keeping
from llamastate.prefix.levels import Levels
from llamastate.prefix.match import Chain, Match, find
from llamastate.prefix.ram import RamTier
from llamastate.prefix.rows import Placer, RowReader, place_of, take_partial
from llamastate.prefix.source import AnchorState, of_session
from llamastate.prefix.stats import Counters
from llamastate.prefix.tiers import Tier
from llamastate.sessioncore import SessionCore

if TYPE_CHECKING:
    from llamastate.context import Context
    from llamastate.prefix.disk import DiskTier

__all__ = ["PrefixStore"]


class PrefixStore(Keeping):
    """Blocks of KV rows, shared by everything that begins alike.

    Parameters
    ----------
    path : path-like or None
        A folder, made if it is not there; any number of processes may use it at once. None keeps everything in memory.
    ram_bytes : int
        What entries may take in memory. What is on its way to the disk counts.
    disk_bytes : int or None
        What they may take on disk; None for no bound but the disk's own.
    block_tokens : int
        Tokens of a block. Stores of different sizes of blocks share a folder, but no blocks.
    anchor_share : float
        The part of ``disk_bytes`` that states of sliding windows and recurrent models may take, in ``(0, 1]``.
    remote : Tier, optional
        A place beyond the disk, such as :class:`~llamastate.prefix.RemoteTier`. Stores may share it: whoever made it
        closes it, after them.
    write_behind : bool
        Write to disk and remote in a thread; :meth:`flush` waits for it.
    durable : bool
        Wait for the disk at every block. Without it a power cut may lose the last ones, or tear one, which its
        checksums then tell: it is as if it had never been stored.

    Notes
    -----
    Exact or a miss: a block is named by a hash over the fingerprint of the model and context and all tokens up to its
    end; its own tokens are compared, its bytes verified when they are read, and its rows checked before llama.cpp sees
    them. Use :meth:`put` after a prefill and :meth:`load` before one, or hand the store to
    :meth:`llamastate.Session.sync`. A store is safe to use from several threads.

    Examples
    --------
    >>> with PrefixStore("blocks", disk_bytes=10 << 30) as store:  # doctest: +SKIP
    ...     n = store.load(ctx, 0, tokens)
    ...     ctx.decode(tokens[n:])
    ...     store.put(ctx, 0, tokens)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        ram_bytes: int = 1 << 30,
        disk_bytes: int | None = None,
        block_tokens: int = 64,
        anchor_share: float = 0.5,
        remote: Tier | None = None,
        write_behind: bool = True,
        durable: bool = False,
    ) -> None:
        self.block_tokens = at_least("block_tokens", block_tokens, 1, MOST_TOKENS)
        ram_bytes = at_least("ram_bytes", ram_bytes, 0)
        check_share(anchor_share)
        check_tier(remote)
        self.path = None if path is None else os.fspath(path)
        self._ram = RamTier(ram_bytes)
        self._disk: DiskTier | None = None
        if path is not None:
            from llamastate.prefix.disk import DiskTier

            self._disk = DiskTier(path, disk_bytes=disk_bytes, anchor_share=anchor_share, durable=durable)
        self._counters = Counters()
        self._levels = Levels(self._ram, self._disk, remote, write_behind=write_behind, counters=self._counters)
        self._roots: dict[str, bytes] = {}
        self._last_root: tuple[bytes, str] | None = None
        weakref.finalize(self, self._levels.abandon, repr(self)).atexit = False

    # --- putting in ---------------------------------------------------------------------------------------------------

    def put(self, source: Context | SessionCore, seq_id: int | None = None, tokens: TokensLike | None = None) -> int:
        """Store what is new of a sequence.

        Parameters
        ----------
        source : Context or Session
            Of a session its tokens, its logits and its checkpoints are taken, and nothing else need be given.
        seq_id : int
        tokens : array-like of int
            What the sequence was decoded from. Whole blocks of them are stored; if the sequence ends here, also the
            state at the end where a model needs one (sliding window, recurrent, hybrid).

        Returns
        -------
        int
            Tokens whose blocks, or states, were not there before.

        Raises
        ------
        TokensMismatchError
            The sequence does not hold these tokens, each at its own position.
        PendingUpdateError
            Positions were moved and nothing has been decoded since.

        Notes
        -----
        A full store refuses new blocks and warns once; that is no error. Cost: one copy of what is new, where the
        context is unified and has an empty sequence to spare; else a copy of the whole sequence.
        """
        given: TokensLike
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if isinstance(source, SessionCore):
                stack.enter_context(source._alone())
                ctx, seq, given, anchors = of_session(source, seq_id, tokens)
            else:
                if seq_id is None or tokens is None:
                    raise InvalidArgumentError("a context needs seq_id and tokens", name="tokens", value=tokens)
                check_context(source, "source")
                ctx, seq, given, anchors = source, seq_id, tokens, []
            self._check_open()
            stack.enter_context(ctx._handle)
            chain = self._chain(ctx, given)
            stored = self._store(ctx, as_index(seq, "seq_id", InvalidSequenceError), chain, anchors)
        self._counters.add(puts=1, put_seconds=time.perf_counter() - began)
        return stored

    def _store(self, ctx: Context, seq: int, chain: Chain, anchors: list[AnchorState]) -> int:
        n = len(chain.ids)
        held = ctx.seq_pos_max(seq) + 1
        ctx._refuse_pending("put", seq)
        if held < n or ctx._handle.moved_cells:
            what = "moved positions" if held >= n else f"{held} tokens, not {n}"
            raise TokensMismatchError(
                f"sequence {seq} holds {what}", n_tokens=n, pos_min=ctx.seq_pos_min(seq), pos_max=held - 1
            )
        if held == n and n and chain.kind != "attention" and not any(a.n_tokens == n for a in anchors):
            anchors = [*anchors, AnchorState(n, None, None)]
        reader = RowReader(ctx, seq)
        stored = 0
        # where there is nothing but memory, the beginning of a chain does not go for its end
        with self._ram.using(chain.keys, hold=self._levels.lowest):
            try:
                for span in self._new_blocks(chain, reader):
                    stored += span
                for anchor in anchors:
                    stored += self._put_anchor(ctx, seq, chain, anchor, reader)
            except StoreFullError as error:
                self._levels.complain(error)
        self._counters.add(stored_tokens=stored)
        return stored

    def _new_blocks(self, chain: Chain, reader: RowReader) -> Iterator[int]:
        """Store the blocks that are not there; the tokens of each."""
        size, place = self.block_tokens, reader.place
        if not place.has_rows:
            return
        known = self._levels.known(chain.keys[1:])
        for i, key in enumerate(chain.keys[1:]):
            if key in known:
                continue
            tokens = chain.ids[i * size : (i + 1) * size]
            entry = build(
                Kind.BLOCK,
                key=key,
                parent=chain.keys[i],
                root=chain.root,
                start=i * size,
                tokens=tokens,
                rows=place.rows_bytes(size),
            )
            reader.read(i * size, (i + 1) * size, entry.rows)
            self._keep(entry)
            del entry  # it may leave memory before the next one is made
            yield size

    def _put_anchor(self, ctx: Context, seq: int, chain: Chain, anchor: AnchorState, reader: RowReader) -> int:
        block, tail = divmod(anchor.n_tokens, self.block_tokens)
        start = anchor.n_tokens - tail
        tokens = chain.ids[start : anchor.n_tokens]
        key = anchor_key(chain.keys[block], tokens)
        if self._levels.known([key]):
            return 0
        state = anchor.state
        if state is None:
            state = ctx.state_seq_get_data(seq, SeqFlags.PARTIAL_ONLY)
        place = reader.place
        entry = build(
            Kind.ANCHOR,
            key=key,
            parent=chain.keys[block],
            root=chain.root,
            start=start,
            tokens=tokens,
            rows=place.rows_bytes(tail),
            partial=take_partial(ctx, state),
            logits=anchor.logits,
        )
        if tail and place.has_rows:
            reader.read(start, anchor.n_tokens, entry.rows)
        self._keep(entry)
        return tail

    def _keep(self, entry: Entry) -> None:
        self._levels.keep(entry)
        self._counters.add(stored_bytes=entry.nbytes)

    # --- looking up ---------------------------------------------------------------------------------------------------

    def lookup(self, tokens: TokensLike, *, ctx: Context | None = None) -> int:
        """How many of these tokens :meth:`load` would restore.

        Parameters
        ----------
        tokens : array-like of int
        ctx : Context, optional
            For which; by default what the store was used with last, or what it holds if that is of one model only.

        Returns
        -------
        int

        Notes
        -----
        Reads no block. About 1 µs a block for the hashes, and one query of the index.
        """
        chain = self._chain_for(tokens, ctx)
        return 0 if chain is None else find(self._levels, chain, self.block_tokens).n_tokens

    def _chain_for(self, tokens: TokensLike, ctx: Context | None) -> Chain | None:
        self._check_open()
        if ctx is not None:
            return self._chain(ctx, tokens)
        ids, root = as_tokens(tokens, I32), self._only_root()
        return None if root is None else Chain(root[0], block_keys(root[0], ids, self.block_tokens), ids, root[1])

    def _only_root(self) -> tuple[bytes, str] | None:
        if self._last_root is not None or self._disk is None:
            return self._last_root
        roots = [r for r in self._disk.known_roots() if r.block_tokens == self.block_tokens]
        if len(roots) > 1:
            raise InvalidArgumentError(
                f"the store holds blocks of {len(roots)} models or settings: say which, by ctx", name="ctx", value=None
            )
        return (roots[0].root, roots[0].kind) if roots else None

    def _chain(self, ctx: Context, tokens: TokensLike) -> Chain:
        check_context(ctx)
        ids = as_tokens(tokens, ctx.model.n_vocab)
        kind = ctx.schema.kind
        fingerprint = ctx.fingerprint
        root = self._roots.get(fingerprint.digest)
        if root is None:
            shared = portable(fingerprint, ctx.schema)
            root = root_key(shared, self.block_tokens)
            if self._disk is not None:
                self._disk.add_root(root, shared.json.decode(), self.block_tokens, kind)
            self._roots[fingerprint.digest] = root
        self._last_root = root, kind
        return Chain(root, block_keys(root, ids, self.block_tokens), ids, kind)

    # --- taking out ---------------------------------------------------------------------------------------------------

    def load(self, ctx: Context, seq_id: int, tokens: TokensLike, *, max_tokens: int | None = None) -> int:
        """Restore the longest stored prefix.

        Parameters
        ----------
        ctx : Context
        seq_id : int
            Replaced, if it is not empty.
        tokens : array-like of int
        max_tokens : int, optional
            At most so many. One less than there are leaves one to decode, for its logits: with full attention, or where
            a sliding window's state was kept at the end, it is the only one then.

        Returns
        -------
        int
            How many tokens the sequence holds now, from the first on; the rest is to be decoded. 0 if nothing is
            stored: the sequence is empty then.

        Raises
        ------
        NotEnoughCellsError
            The prefix has no room in the cache; nothing has changed.

        Notes
        -----
        Where a block turns out to be damaged or gone the prefix is shorter. Cost: every byte moves once from memory to
        llama.cpp if the context is unified, ``seq_id`` empty and another sequence empty too; else twice. From the disk
        it passes through two buffers, and stays in memory from the second time on.
        """
        return self.load_with_logits(ctx, seq_id, tokens, max_tokens=max_tokens)[0]

    def load_with_logits(
        self, ctx: Context, seq_id: int, tokens: TokensLike, *, max_tokens: int | None = None
    ) -> tuple[int, npt.NDArray[np.float32] | None]:
        """As :meth:`load`; also the logits that follow, float32[n_vocab], if they are known.

        They are where a session put them, at the end of a prompt or turn, for models with a sliding window or a
        recurrent state. With full attention the last token can be decoded again.
        """
        self._check_open()
        check_context(ctx)
        with ctx._handle:
            began = time.perf_counter()
            chain = self._chain(ctx, tokens)
            limit = len(chain.ids) if max_tokens is None else at_least("max_tokens", max_tokens, 0)
            self._counters.add(queries=1, query_tokens=len(chain.ids))
            bad: set[bytes] = set()
            while True:
                match = find(self._levels, chain, self.block_tokens, limit, bad)
                if not match.n_tokens:
                    ctx.seq_rm(seq_id)
                    self._counters.add(load_seconds=time.perf_counter() - began)
                    return 0, None
                done = self._place(ctx, seq_id, chain, match, bad)
                if done is not None:
                    self._counters.add(
                        hits=int(done[0] > 0), hit_tokens=done[0], load_seconds=time.perf_counter() - began
                    )
                    return done

    def _place(
        self, ctx: Context, seq_id: int, chain: Chain, match: Match, bad: set[bytes]
    ) -> tuple[int, npt.NDArray[np.float32] | None] | None:
        """Put a match into the sequence; None, with new keys in ``bad``, if it was not what it seemed."""
        size, place = self.block_tokens, place_of(ctx.schema)
        ids = chain.ids.astype("<i4", copy=False).tobytes()
        anchor = None
        keys = chain.keys[1 : match.n_blocks + 1] if place.has_rows else []
        nbytes = size_of([4 * size, place.rows_bytes(size), 0, 0])
        with contextlib.ExitStack() as stack:
            # what goes for the sake of this load is never what is to be loaded, if it is nowhere else
            wanted = [*keys, match.anchor or b""]
            missing = stack.enter_context(self._ram.using(wanted, hold=self._disk is None))
            if match.anchor is not None:
                anchor = self._levels.fetch(match.anchor)
                if anchor is None or not _holds(anchor, ids, match.n_blocks * size, match.anchor_end):
                    bad.add(match.anchor)
                    return None
            placer = Placer(ctx, seq_id)
            if placer.needs_room:
                stack.enter_context(self._ram.lend(sum(key in missing for key in keys) * nbytes))
            blocks = self._levels.fetch_run(keys, nbytes, keep=placer.needs_room)
            stack.enter_context(contextlib.closing(blocks))
            entry = anchor
            try:
                for i, (key, entry) in enumerate(zip(keys, blocks, strict=True)):
                    if entry is None or not _holds(entry, ids, i * size, (i + 1) * size):
                        bad.add(key)
                        break
                    placer.add(entry)
                if not bad.isdisjoint(keys) and anchor is not None:
                    placer.abandon()
                    return None
                entry = anchor or entry
                n = placer.finish(anchor)
            except NotEnoughCellsError:
                placer.abandon()
                raise
            except LoadError:
                # sound bytes that are no state of this context: nobody ought to meet them again
                placer.abandon()
                assert entry is not None
                bad.add(entry.key)
                self._levels.drop(entry.key)
                return None
            except BaseException:
                placer.abandon()
                raise
        if n > match.n_tokens and not ctx.seq_rm(seq_id, match.n_tokens):
            assert match.anchor is not None  # rows alone can always be cut
            bad.add(match.anchor)
            return None
        self._levels.touch([*keys[: -(-n // size)], *([match.anchor] if match.anchor else [])])
        logits = None if anchor is None or n > match.n_tokens else anchor.logits
        return min(n, match.n_tokens), None if logits is None else logits.copy()

    def __repr__(self) -> str:
        where = "memory" if self.path is None else repr(self.path)
        return f"<llamastate.PrefixStore in {where}, blocks of {self.block_tokens} tokens>"


def _holds(entry: Entry, ids: bytes, start: int, end: int) -> bool:
    """Whether an entry holds these very tokens at this place; ``ids`` are all of them as little-endian int32."""
    return entry.start == start and entry.tokens.tobytes() == ids[4 * start : 4 * end]
