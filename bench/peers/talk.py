"""How the programs of this folder speak with the bench: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = ["Talk"]


class Talk:
    """The two ends; whatever a library prints from now on is none of the answers."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[Any]:
        """What is asked, until the other side closes."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, value: object) -> None:
        """Write one line."""
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()
