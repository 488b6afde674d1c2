"""Random operations on the sequences of a context, valid and not, beside a plain model of what they should do."""

from __future__ import annotations

import collections
import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llamastate import Batch, Context, LlamaStateError, NoKVSlotError, SeqFlags
from tests.fuzz.journal import Journal
from tests.fuzz.world import BAD_FLAGS, BAD_IDS, Settings, WrongError
from tests.helpers import context, nmse

#: Numbers that no position, count or divisor should be, and objects that are no numbers at all.
BAD_NUMBERS: tuple[Any, ...] = (-(2**31), -2, 2**31 - 1, 2**31, 2**40, 2**70, 1.5, "1", None, (), float("nan"))
BAD_TOKENS: tuple[Any, ...] = (
    [-1],
    [256],
    [2**31],
    [2**70],
    [0.5],
    ["a"],
    [[1]],
    [[1], [2, 3]],
    None,
    [],
    "ab",
    [None],
)

#: The tokens of a sequence; None once they say nothing about its logits any more (moved, merged, cut in the middle).
History = list[int] | None


class Play:
    """A context, and a history for each of its sequences."""

    def __init__(self, seed: str, settings: Settings, folder: Path, journal: Journal) -> None:
        self.seed, self.settings, self.folder, self.journal = seed, settings, folder, journal
        self.ctx = self._context(settings.n_seq_max, settings.kv_unified)
        self.fresh = self._context(1, True)
        self.histories: list[History] = [[] for _ in range(settings.n_seq_max)]
        self.kept: list[tuple[bytes, History, bool]] = []
        self.files = folder / "operations"

    def _context(self, n_seq_max: int, unified: bool) -> Context:
        n_ctx = 256 if unified else 256 * n_seq_max
        settings = self.settings
        params: dict[str, Any] = {"n_seq_max": n_seq_max, "kv_unified": unified, "n_ctx": n_ctx, "n_ubatch": 64}
        return context(settings.kind, flash_attn=settings.flash_attn, n_batch=128, **params)

    def run(self, n: int, until: float) -> collections.Counter[str]:
        """Do ``n`` operations; how often each succeeded, and how often it was refused with which error."""
        outcomes: collections.Counter[str] = collections.Counter()
        for i in range(n):
            if i % 16 == 0 and time.time() > until:
                break
            rng = random.Random(f"{self.seed}/{i}/operation")
            operation = rng.choice(OPERATIONS)
            note = f"{self.settings} seed {self.seed}, operation {i}: {operation.__name__} with {self.histories}"
            self.journal.write(note)
            before = self._positions()
            states = self._states() if i % 4 == 0 else None
            try:
                operation(self, rng)
                outcomes[operation.__name__] += 1
            except LlamaStateError as error:
                outcomes[f"{operation.__name__} {type(error).__name__}"] += 1
                for seq in getattr(error, "removed", None) or ():  # half decoded, and no way back: emptied, and said
                    self.histories[seq] = []
                    before[seq], states = (-1, -1), None
                now = self._positions()
                if operation is Play.prefill or isinstance(error, NoKVSlotError):
                    # undone chunk by chunk, or room was looked for: window cells may be gone that no next token needs
                    before, now, states = [(0, p) for _, p in before], [(0, p) for _, p in now], None
                if now != before or (states is not None and self._states() != states):
                    raise WrongError(f"{type(error).__name__} changed the context: {error}") from error
            except Exception as error:
                raise WrongError(f"{type(error).__name__} instead of an error of ours: {error}") from error
            self._check_positions()
            if i % 8 == 7:
                self._check_logits(rng)
        self.ctx.close()
        self.fresh.close()
        return outcomes

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _positions(self) -> list[tuple[int, int]]:
        return [(self.ctx.seq_pos_min(s), self.ctx.seq_pos_max(s)) for s in range(self.ctx.n_seq_max)]

    def _states(self) -> list[bytes] | None:
        try:
            return [self.ctx.state_seq_get_data(s).tobytes() for s in range(self.ctx.n_seq_max)]
        except LlamaStateError:  # a shift that is pending
            return None

    def _check_positions(self) -> None:
        for seq, history in enumerate(self.histories):
            last = self.ctx.seq_pos_max(seq)
            if history is not None and last != len(history) - 1:
                raise WrongError(f"sequence {seq} ends at {last}, not at {len(history) - 1}")

    def _check_logits(self, rng: random.Random) -> None:
        """One more token in a sequence gives what it gives in a context that has decoded nothing else."""
        seq = rng.randrange(self.ctx.n_seq_max)
        history = self.histories[seq]
        if history is None or len(history) > 250:
            return
        token = rng.randrange(256)
        try:
            self.ctx.decode([token], seq_id=seq)
        except LlamaStateError:  # full
            return
        history.append(token)
        self.fresh.clear()
        self.fresh.prefill(history)
        found, expected = self.ctx.logits(), self.fresh.logits()
        # The batches differ, and with them the last bits of everything: f16 caches of random weights keep three digits.
        if not nmse(found, expected) < 2e-3:
            raise WrongError(
                f"sequence {seq} has other logits (NMSE {nmse(found, expected)}) than its {len(history)} tokens"
            )

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _seq(self, rng: random.Random) -> Any:
        return rng.choice(BAD_IDS) if rng.random() < 0.03 else rng.randrange(self.ctx.n_seq_max)

    def _pos(self, rng: random.Random, seq: Any) -> Any:
        if rng.random() < 0.05:
            return rng.choice(BAD_NUMBERS)
        history = self.histories[seq] if isinstance(seq, int) and 0 <= seq < self.ctx.n_seq_max else None
        n = len(history) if history is not None else 40
        return rng.choice((-1, 0, n, n - 1, rng.randrange(-2, n + 3), rng.randrange(0, 100)))

    def _taint(self, seq: int) -> None:
        self.histories[seq] = None if self.ctx.seq_pos_max(seq) >= 0 else []

    # --- operations ---------------------------------------------------------------------------------------------------

    def decode(self, rng: random.Random) -> None:
        seq = self._seq(rng)
        if rng.random() < 0.05:
            self.ctx.decode(rng.choice(BAD_TOKENS), seq_id=seq)
            raise WrongError("bad tokens were decoded")
        ids = [rng.randrange(256) for _ in range(rng.choice((1, 1, 2, 5, 20, 40, 130)))]
        pos = self._pos(rng, seq) if rng.random() < 0.2 else None
        n = self.ctx.seq_pos_max(seq) + 1
        self.ctx.decode(ids, seq_id=seq, pos=pos, logits=rng.choice(("last", "all", None, [True] * len(ids))))
        history = self.histories[seq]
        if pos is not None and pos != n:  # M-RoPE lets positions jump
            history = self.histories[seq] = None
        if history is not None:
            history.extend(ids)

    def prefill(self, rng: random.Random) -> None:
        seq = self._seq(rng)
        ids = [rng.randrange(256) for _ in range(rng.choice((1, 30, 60, 200)))]
        chunk = rng.choice((None, 1, 7, 64, 0, 10**9, "x")) if rng.random() < 0.5 else None
        self.ctx.prefill(ids, seq_id=seq, chunk=chunk)
        if self.histories[seq] is not None:
            self.histories[seq] += ids

    def decode_batch(self, rng: random.Random) -> None:
        batch = Batch()
        want: dict[int, list[int]] = collections.defaultdict(list)
        for _ in range(rng.randrange(0, 8)):
            seq = rng.randrange(self.ctx.n_seq_max)
            pos = self.ctx.seq_pos_max(seq) + 1 + len(want[seq])
            token: Any = rng.randrange(256)
            ids: Any = seq
            damage = rng.random()
            if damage < 0.02:
                pos = rng.choice(BAD_NUMBERS)
            elif damage < 0.04:
                token = rng.choice((-1, 256, 2**40, "a", None, 0.5))
            elif damage < 0.06:
                ids = rng.choice(([], [seq, seq], [seq, 99], [-1], "0", None, [None], [2**70]))
            batch.add(token, pos=pos, seq_ids=ids, logits=rng.random() < 0.5)
            want[seq].append(token)
        self.ctx.decode_batch(batch if rng.random() > 0.02 else rng.choice((None, [], 5)))
        for seq, ids in want.items():
            if self.histories[seq] is not None:
                self.histories[seq] += ids

    def seq_rm(self, rng: random.Random) -> None:
        seq = self._seq(rng)
        p0, p1 = self._pos(rng, seq), self._pos(rng, seq)
        before = self._positions()
        done = self.ctx.seq_rm(seq, p0, p1)
        history = self.histories[seq]
        if not done:
            if self._positions() != before:
                raise WrongError("seq_rm said no and did something")
        elif history is not None:
            start, end = max(p0, 0), len(history) if p1 < 0 else min(p1, len(history))
            if start < end:
                self.histories[seq] = history[:start] if end == len(history) else None
        else:
            self._taint(seq)

    def seq_cp(self, rng: random.Random) -> None:
        src, dst = self._seq(rng), self._seq(rng)
        whole = rng.random() < 0.6
        p0, p1 = (-1, -1) if whole else (self._pos(rng, src), self._pos(rng, src))
        self.ctx.seq_cp(src, dst, p0, p1)
        if src == dst:
            return
        history, old = self.histories[src], self.histories[dst]
        n = len(history) if history is not None else 0
        if history is not None and p0 <= 0 and (p1 < 0 or p1 >= n):
            self.histories[dst] = list(history)
        elif history is not None and old is not None and p0 <= 0 and (old == [] or p1 >= len(old)) and p1 > 0:
            self.histories[dst] = history[:p1]
        else:
            self._taint(dst)

    def seq_keep(self, rng: random.Random) -> None:
        if rng.random() < 0.7:
            return
        seq = self._seq(rng)
        self.ctx.seq_keep(seq)
        self.histories = [h if s == seq else [] for s, h in enumerate(self.histories)]

    def clear(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            self.ctx.clear(data=rng.random() < 0.5)
            self.histories = [[] for _ in self.histories]

    def shift(self, rng: random.Random) -> None:
        seq = self._seq(rng)
        p0, p1 = self._pos(rng, seq), self._pos(rng, seq)
        amount = rng.choice((-3, -1, 0, 1, 5, 100, *BAD_NUMBERS)) if rng.random() < 0.8 else 2
        if rng.random() < 0.6:
            self.ctx.seq_add(seq, p0, p1, amount)
        else:
            self.ctx.seq_div(seq, p0, p1, amount)
        self._taint(seq)

    def take(self, rng: random.Random) -> None:
        seq = self._seq(rng)
        partial = rng.random() < 0.3
        data = self.ctx.state_seq_get_data(seq, SeqFlags.PARTIAL_ONLY if partial else SeqFlags.NONE).tobytes()
        history = self.histories[seq]
        self.kept = [*self.kept[-5:], (data, None if history is None else list(history), partial)]

    def put(self, rng: random.Random) -> None:
        if not self.kept:
            return
        data, history, partial = rng.choice(self.kept)
        seq = self._seq(rng)
        old = self.histories[seq] if isinstance(seq, int) and 0 <= seq < self.ctx.n_seq_max else None
        if partial and (old is None or history is None or old[: len(history)] != history):
            # onto other tokens: what comes of that is the caller's fault, but no crash
            self.ctx.state_seq_set_data(data, seq, SeqFlags.PARTIAL_ONLY)
            self._taint(seq)
            return
        self.ctx.state_seq_set_data(data, seq, SeqFlags.PARTIAL_ONLY if partial else SeqFlags.NONE)
        self.histories[seq] = None if history is None else list(history)

    def device(self, rng: random.Random) -> None:
        """Taken, changed, put back into any sequence."""
        seq, dest = self._seq(rng), self._seq(rng)
        data = self.ctx.state_seq_get_data(seq, SeqFlags.ON_DEVICE)
        history = self.histories[seq]
        self.ctx.state_seq_set_data(data, dest, SeqFlags.ON_DEVICE)
        self.histories[dest] = None if history is None else list(history)

    def whole(self, rng: random.Random) -> None:
        """Saved to a file, all changed, loaded."""
        self.ctx.state_save_file(self.files, [1, 2, 3])
        histories = [None if h is None else list(h) for h in self.histories]
        with contextlib.suppress(LlamaStateError):
            self.decode(rng)
        try:
            self.ctx.state_load_file(self.files, max_tokens=rng.choice((None, 3, 2)))
        except LlamaStateError:
            return  # it is the decoding that has changed something
        self.histories = histories

    def bad_call(self, rng: random.Random) -> None:
        """One argument that cannot be."""
        ctx, seq = self.ctx, rng.randrange(self.ctx.n_seq_max)
        number, flags = rng.choice(BAD_NUMBERS), rng.choice(BAD_FLAGS)
        call: Callable[[], Any] = rng.choice(
            (
                lambda: ctx.state_seq_get_size(seq, flags),
                lambda: ctx.state_seq_get_data(rng.choice(BAD_IDS)),
                lambda: ctx.state_seq_set_data(b"", seq),
                lambda: ctx.state_seq_set_data(None, seq),
                lambda: ctx.state_seq_get_data_into(bytearray(3), seq),
                lambda: ctx.logits(rng.choice((2**70, -(2**63), 2**31, 10**6, "0", None, 0.5))),
                lambda: ctx.embeddings(number),
                lambda: ctx.seq_pos_max(rng.choice(BAD_IDS)),
                lambda: ctx.decode([1], seq_id=seq, pos=rng.choice((-2, -1, 2**31 - 1, 2**40, "0", 1.5))),
                lambda: ctx.decode([1], seq_id=seq, logits=rng.choice(("none", [1, 1], 5, [[1]]))),
                lambda: ctx.decode(np.arange(129) % 256, seq_id=seq),
                lambda: ctx.state_load_file(rng.choice((None, "", "\0", self.folder, 5, b"/nowhere"))),
                lambda: ctx.state_seq_save_file(self.folder / "x", seq, rng.choice(BAD_TOKENS[:9])),
            )
        )
        call()
        raise WrongError("a call that cannot be was answered")


OPERATIONS = (
    *(Play.decode,) * 6, Play.prefill, *(Play.decode_batch,) * 3, *(Play.seq_rm,) * 4, *(Play.seq_cp,) * 3,
    Play.seq_keep, Play.clear, *(Play.shift,) * 2, *(Play.take,) * 3, *(Play.put,) * 4, Play.device, Play.whole,
    *(Play.bad_call,) * 3,
)  # fmt: skip
