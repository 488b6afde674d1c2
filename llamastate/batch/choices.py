"""What is chosen where nobody says: how much runs at once, and which of llama.cpp's two ways of attention it runs with.

On a processor the two ways cost differently. With flash attention a step of fewer than 64 sequences goes through each
one's own cells, row by row; a chunk of a prompt goes through them in tiles, and past what none of its rows may see.
Without, one multiplication takes all rows by all cells in use, whosever they are. Of a row and a cell the first takes
about twelve times as long as each of the others (SmolLM2, two cores, with AMX and without), so that what pays follows
from how much of all cells each sequence can see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from llamastate._native import handles
from llamastate.arrays import Int32Array
from llamastate.batch.journal import Journal
from llamastate.batch.openai import Defaults, Line, parse, read_line
from llamastate.batch.request import Request
from llamastate.batch.rows import CLEARLY, STEP_COST
from llamastate.batch.tasks import prompt_tokens
from llamastate.errors import InvalidRequestError, LlamaStateError
from llamastate.sessioncore import common_prefix

if TYPE_CHECKING:
    from llamastate.batch.source import Source
    from llamastate.model import Model

__all__ = ["flash_attn_for", "is_tiled", "n_ctx_for", "n_parallel_for", "settled"]

#: Cells for each request that runs, if nobody says how many.
CELLS_EACH = 512
#: Tokens that an answer is thought to have, if it may have more.
EXPECTED = 128


def n_parallel_for(model: Model) -> int:
    """How many outputs are generated at once: 16 on a processor, where more gain nothing, else 32."""
    return 16 if _on_processor(model) else 32


def n_ctx_for(model: Model, n_parallel: int | None) -> int:
    """Cells of the cache: of nothing that changes from day to day, or with the machine, for it decides what fits."""
    return max((n_parallel or 32) * CELLS_EACH, min(model.n_ctx_train, 8192))


def is_tiled(model: Model, flash_attn: str, type_k: str, type_v: str) -> bool:
    """Whether a batch of many rows is attended to in tiles: flash attention, as processors have it."""
    return _on_processor(model) and flash_attn != "off" and type_k == type_v and type_k in ("f16", "f32")


def flash_attn_for(model: Model, requests: Iterable[Request], *, n_parallel: int | None = None, n_ctx: int = 0) -> str:
    """Whether a runner on a processor is faster without flash attention for such requests.

    Parameters
    ----------
    model : Model
    requests : iterable of Request
        Four times ``n_parallel`` of them are looked at, at most.
    n_parallel, n_ctx : int, optional
        Of the runner.

    Returns
    -------
    {"off", "auto"}
        For :class:`~llamastate.batch.BatchRunner`. "off" where most of what is in the cache is common to what runs;
        "auto" where it is not, and where nothing is known of it: on a GPU, or if the model has a sliding window or a
        recurrent state.

    Notes
    -----
    Tokenises what it looks at. The same requests give the same answer on every machine without a GPU. States of one
    kind are of no use to the other: a store that sessions are to share with batches wants the same for both.

    Examples
    --------
    >>> how = flash_attn_for(model, requests)  # doctest: +SKIP
    >>> runner = BatchRunner(model, flash_attn=how)  # doctest: +SKIP
    """
    if not _on_processor(model) or model.memory_kind != "attention":
        return "auto"
    n_cells = n_ctx or n_ctx_for(model, n_parallel)
    n_parallel = n_parallel or n_parallel_for(model)
    prompts: list[tuple[Int32Array, int]] = []
    for request in islice(requests, 4 * n_parallel):
        with contextlib.suppress(LlamaStateError, TypeError, ValueError, AttributeError):
            if request.kind == "generate":
                n_made = request.n * min(request.max_tokens, EXPECTED)
                prompts.append((prompt_tokens(request, model), n_made))
    on, off = _costs(prompts, n_parallel, n_cells)
    return "off" if off < CLEARLY * on else "auto"


def _costs(prompts: Sequence[tuple[Int32Array, int]], n_parallel: int, n_cells: int) -> tuple[float, float]:
    """What attention costs with flash attention and without, if what begins alike runs together."""
    # big-endian bytes have the order of the tokens
    ordered = sorted(prompts, key=lambda prompt: prompt[0].astype(">i4").tobytes())
    on = off = 0.0
    start = 0
    before: Int32Array | None = None
    while start < len(ordered):
        used = n = rows = 0
        for tokens, n_made in ordered[start : start + n_parallel]:
            shared = 0 if before is None else common_prefix(before, tokens)
            own = len(tokens) - (shared if n else 0) + n_made // 2
            if n and used + own > n_cells:
                break
            before, used, n = tokens, used + own, n + 1
            computed = len(tokens) - shared
            rows += computed + n_made
            on += STEP_COST * n_made * (len(tokens) + n_made / 2) + computed * (len(tokens) - computed / 2)
        off += rows * min(used, n_cells)
        start += n
    return on, off


# --- for files --------------------------------------------------------------------------------------------------------


def settled(
    options: Mapping[str, Any], source: Source, results: str | None, model: Model, defaults: Defaults
) -> dict[str, Any]:
    """The options of a runner with ``flash_attn`` said, if "auto" leaves it open.

    Parameters
    ----------
    options : mapping
    source : Source
        What is to be run; only files are looked at.
    results : str, optional
        Where the results will be. What is there already was computed with one of the two, and so is what is not.
    model : Model
    defaults : Defaults
    """
    chosen = dict(options)
    plain = all(chosen.get(name, "f16") in ("f16", "f32", "bf16") for name in ("type_k", "type_v"))
    n_parallel, n_ctx = chosen.get("n_parallel"), chosen.get("n_ctx", 0)
    # what cannot be is for the runner to tell
    sound = isinstance(n_ctx, int) and (n_parallel is None or (isinstance(n_parallel, int) and 0 < n_parallel <= 200))
    if chosen.get("flash_attn", "auto") != "auto" or chosen.get("fixed_shapes") or not (plain and sound):
        return chosen
    was = None if results is None else _transposed(f"{results}.journal")
    if was is not None:
        chosen["flash_attn"] = "off" if was else "on"
    elif source.again:
        lines = islice(source.lines(), 4 * (n_parallel or n_parallel_for(model)))
        chosen["flash_attn"] = flash_attn_for(model, _requests(lines, defaults), n_parallel=n_parallel, n_ctx=n_ctx)
    return chosen


def _transposed(journal: str) -> bool | None:
    """Whether V was, in the cache of the run that has written last; None if there is none."""
    with contextlib.suppress(OSError, LlamaStateError):  # whoever writes there says it better
        found = Journal(journal, {}).last_run.get("v_trans")
        return found if isinstance(found, bool) else None
    return None


def _requests(lines: Iterable[tuple[int, bytes | Line]], defaults: Defaults) -> Iterator[Request]:
    for number, raw in lines:
        line = raw if isinstance(raw, Line) else read_line(raw, number)
        if line.error is None:
            with contextlib.suppress(InvalidRequestError):
                yield from parse(line, defaults).requests(None)


def _on_processor(model: Model) -> bool:
    return not model._n_gpu_layers or not handles.gpu_alignments()
