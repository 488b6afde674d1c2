"""What there is to store of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llamastate.arrays import Int32Array, TokensLike
from llamastate.errors import InvalidArgumentError
from llamastate.sessioncore import SessionCore

if TYPE_CHECKING:
    from llamastate.context import Context

__all__ = ["AnchorState", "of_session"]


class AnchorState(NamedTuple):
    """What cannot be cut, after ``n_tokens`` tokens of a sequence."""

    n_tokens: int
    state: npt.NDArray[np.uint8] | None
    logits: npt.NDArray[np.float32] | None


def of_session(
    session: SessionCore, seq_id: int | None, tokens: TokensLike | None
) -> tuple[Context, int, Int32Array, list[AnchorState]]:
    """Context, sequence, tokens and states of a session, under its lock."""
    if seq_id not in (None, session.seq_id) or tokens is not None:
        raise InvalidArgumentError("a session knows its sequence and tokens itself", name="tokens", value=tokens)
    session._check_step()
    n = session.n_past
    states = {
        p.n_tokens: AnchorState(p.n_tokens, np.asarray(p.state), p.logits)
        for p in session._history
        if p.state is not None and p.kind == "partial" and p.n_tokens <= n
    }
    if n and session._history.needs_states:
        end = states.get(n, AnchorState(n, None, None))
        states[n] = end._replace(logits=session._logits.copy() if session._has_logits else end.logits)
    return session.ctx, session.seq_id, session._tokens, list(states.values())
