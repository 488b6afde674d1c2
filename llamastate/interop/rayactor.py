"""What runs in Ray's workers: a model, a batch runner and a store for each actor, and a prefill for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from llamastate.arrays import Int32Array, TokensLike, as_tokens
from llamastate.batch import BatchRunner
from llamastate.context import Context
from llamastate.errors import InvalidArgumentError, LlamaStateError
from llamastate.interop import rayrows
from llamastate.interop.rayservice import Service
from llamastate.model import Model
from llamastate.prefix import PrefixStore
from llamastate.sessioncore import common_prefix
from llamastate.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

    from llamastate.interop.ray import ProcessorConfig

__all__ = ["Given", "Worker", "check_keywords", "prefill"]

#: Endings that show which of a text's last tokens another text could change.
_PROBES = ("", "a", " a", "\n", "1", ".", "é", "\n\n# ")


class Worker:
    """One actor: a callable that tables go through.

    Parameters
    ----------
    config : ProcessorConfig
    """

    def __init__(self, config: ProcessorConfig) -> None:
        self._config = config
        self._failure: LlamaStateError | None = None
        try:
            self._start()
        except LlamaStateError as error:
            # An actor that does not begin fails the job with a text. The first table fails it with this.
            self._failure = error

    def _start(self) -> None:
        config = self._config
        self._model = Model(config.model_source, **config.model_kwargs)
        snapshots = []
        if config.prefixes:
            import ray

            # they stay where they are, in memory that all workers of the machine share
            snapshots = ray.get(list(config.prefixes))
        self._store = _open_store(config)
        store: Any = Given(snapshots, self._store) if snapshots else self._store
        runner = BatchRunner(self._model, store=cast("PrefixStore", store), **_runner_kwargs(config))
        embed = config.task_type == "embed"
        reader = rayrows.Reader(
            self._model,
            embed=embed,
            logprobs=config.logprobs,
            sampling_params=config.sampling_params,
            seed=config.seed,
        )
        self._service = Service(runner, reader, strict=not config.should_continue_on_error)
        self._columns = rayrows.schema(embed=embed, logprobs=config.logprobs)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """One table that :func:`~llamastate.interop.rayrows.pack` has seen, with its answers, in the order of its rows.

        Ray calls it from as many threads as batches may be under way.

        Raises
        ------
        LlamaStateError
            A row failed, and the job is not to go on without it.
        """
        # A generator: Ray puts errors of a mere function into another that tells a text.
        if self._failure is not None:
            raise of_user_code(self._failure)
        try:
            answers = self._service.answers(table)
        except LlamaStateError as error:
            raise of_user_code(error) from None
        if self._store is not None and self._service.idle:
            # An actor ends without a farewell, and others may want it now. While others are under way there is no end
            # to what is to be written; it is, all the same.
            self._store.flush()
        yield rayrows.append(table, answers, self._columns)


class Given:
    """A prefix store before the store: snapshots that somebody else has made, in memory that belongs to all.

    Parameters
    ----------
    snapshots : sequence of Snapshot
    store : PrefixStore, optional
        Asked for what has no better snapshot, and given everything.
    """

    def __init__(self, snapshots: Sequence[Snapshot], store: PrefixStore | None = None) -> None:
        self._snapshots = list(snapshots)
        self._tokens = [snapshot.tokens for snapshot in snapshots]
        self._store = store

    def lookup(self, tokens: TokensLike, *, ctx: Context) -> int:
        """As :meth:`PrefixStore.lookup`."""
        stored = 0 if self._store is None else self._store.lookup(tokens, ctx=ctx)
        return max(stored, self._best(as_tokens(tokens, ctx.model.n_vocab), ctx)[0])

    def load(self, ctx: Context, seq_id: int, tokens: TokensLike, *, max_tokens: int | None = None) -> int:
        """As :meth:`PrefixStore.load`: each byte moves once, from the snapshot to llama.cpp."""
        ids = as_tokens(tokens, ctx.model.n_vocab)[:max_tokens]
        n, snapshot = self._best(ids, ctx)
        if self._store is not None and (snapshot is None or self._store.lookup(ids, ctx=ctx) > n):
            return self._store.load(ctx, seq_id, ids)
        if snapshot is None:
            ctx.seq_rm(seq_id)
            return 0
        snapshot.restore(ctx, seq_id)
        if n < len(snapshot.tokens):
            ctx.seq_rm(seq_id, n)
        return n

    def put(self, ctx: Context, seq_id: int, tokens: TokensLike) -> int:
        """As :meth:`PrefixStore.put`."""
        return 0 if self._store is None else self._store.put(ctx, seq_id, tokens)

    def _best(self, ids: Int32Array, ctx: Context) -> tuple[int, Snapshot | None]:
        best: tuple[int, Snapshot | None] = 0, None
        for snapshot, held in zip(self._snapshots, self._tokens, strict=True):
            n = common_prefix(held, ids)
            # what a window or a recurrent state has become cannot be cut
            if n > best[0] and (n == len(held) or ctx.model.memory_kind == "attention"):
                best = n, snapshot
        return best


# --- errors -----------------------------------------------------------------------------------------------------------


def of_user_code(error: LlamaStateError) -> LlamaStateError:
    """An equal error that is one of Ray's as well: for a job that failed by no fault of Ray's.

    Ray raises it where the dataset is executed, still of its own type and with its facts.
    """
    facts = {name: getattr(error, name) for name in error.fields}
    return _failed(type(error), error.message, facts)


def _failed(cls: type[LlamaStateError], message: str, facts: dict[str, Any]) -> LlamaStateError:
    return _both(cls)(message, **facts)


def _both(cls: type[LlamaStateError]) -> type[LlamaStateError]:
    from ray.exceptions import UserCodeException

    def reduce(self: LlamaStateError) -> tuple[Any, ...]:
        return _failed, (cls, self.message, {name: getattr(self, name) for name in self.fields})

    names = {"__reduce__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, UserCodeException), names)


# --- what an actor is made of -----------------------------------------------------------------------------------------


def _open_store(config: ProcessorConfig) -> PrefixStore | None:
    if config.store is None and config.remote is None:
        return None
    remote = None
    if config.remote is not None:
        from llamastate.prefix import RemoteTier

        remote = RemoteTier(config.remote, **config.storage_options)
    return PrefixStore(config.store, remote=remote, **config.store_kwargs)


def _runner_kwargs(config: ProcessorConfig) -> dict[str, Any]:
    return {"n_threads": max(1, int(config.num_cpus)), **config.engine_kwargs}


def check_keywords(what: str, given: Mapping[str, Any], function: Any, taken: Sequence[str]) -> None:
    """Refuse keywords that a function does not have, or that are said otherwise, before any actor starts."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    allowed = [name for name in known if name not in taken]
    for name in given:
        if name not in allowed:
            raise InvalidArgumentError(
                f"{what}: there is no {name!r} here, only {', '.join(allowed)}", name=what, value=name, limit=allowed
            )


# --- a prefill for all ------------------------------------------------------------------------------------------------


def prefill(config: ProcessorConfig, prefix: Any) -> tuple[int, Snapshot]:
    """Decode a prefix as an actor of this configuration would; how many tokens it has, and their state."""
    with (
        Model(config.model_source, **config.model_kwargs) as model,
        BatchRunner(model, **_runner_kwargs(config)) as runner,
    ):
        ctx, chunk = runner.ctx, runner._engine.rules.grid
        tokens = prefix_tokens(model, prefix)
        if chunk is not None:
            # only whole chunks are the same in any company
            tokens = tokens[: len(tokens) - len(tokens) % chunk]
        if not 0 < len(tokens) < ctx.n_ctx_seq:
            raise InvalidArgumentError(
                f"a prefix of {len(tokens)} tokens, in a context of {ctx.n_ctx_seq}",
                name="prefix",
                value=len(tokens),
                limit=ctx.n_ctx_seq - 1,
            )
        ctx.prefill(tokens, chunk=chunk, logits=None)
        return len(tokens), Snapshot.take(ctx, 0, tokens)


def prefix_tokens(model: Model, prefix: Any) -> Int32Array:
    """The tokens that a prompt begins with, whatever it goes on with."""
    chat = isinstance(prefix, Sequence) and len(prefix) > 0 and isinstance(prefix[0], Mapping)
    if not chat and not isinstance(prefix, str):
        return as_tokens(prefix, model.n_vocab)
    text: str = model.apply_chat_template(prefix, add_generation_prompt=False) if chat else prefix
    written = [model.tokenize(text + end, add_special=not chat, parse_special=chat) for end in _PROBES]
    return written[0][: min(common_prefix(written[0], other) for other in written[1:])]
