"""What llama.cpp's grammar parser does not survive, found before it reads the text.

It recurses with every parenthesis and with every rule that begins with another, until the stack ends; ``{2,1}`` makes
it write rules until memory ends; a long literal repeated two thousand times is two thousand long literals. Everything
else that is wrong with a grammar it says itself. This reads the text as the parser does, and need only be right about
what comes before the first mistake, for there the parser stops as well.
"""

from __future__ import annotations

import re

from llamastate.errors import SamplerError

__all__ = ["check_grammar"]

MAX_BYTES = 1 << 20
#: Parentheses inside parentheses.
MAX_DEPTH = 200
#: Rules, with those that groups and repetitions stand for: a third of what a stack of 8 MiB has room for.
MAX_RULES = 20_000
#: A larger upper end of a repetition is none to llama.cpp (MAX_REPETITION_THRESHOLD).
MAX_TIMES = 2000
#: Elements (characters, references) after all repetitions are written out.
MAX_ELEMENTS = 1_000_000

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|\#[^\r\n]*)
      | (?P<literal>"(?:\\.|[^"\\])*" | \[(?:\\.|[^\]\\])*\])
      | (?P<token>!?<[^>]*>)
      | (?P<name>[A-Za-z0-9-]+)
      | (?P<define>::=)
      | (?P<count>\{(?:[ \t\r\n]|\#[^\r\n]*)*(?P<low>[0-9]+)(?:[ \t\r\n]|\#[^\r\n]*)*
                  (?P<comma>,(?:[ \t\r\n]|\#[^\r\n]*)*(?P<high>[0-9]*)(?:[ \t\r\n]|\#[^\r\n]*)*)?\})
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def check_grammar(text: str) -> None:
    """Refuse a grammar that would take the process down with it.

    Parameters
    ----------
    text : str
        GBNF.

    Raises
    ------
    SamplerError
        ``reason`` says what is too much.

    Notes
    -----
    ``llama_grammar_parser::parse``, ``llama_grammar_detect_left_recursion``. O(length).
    """
    if not text:
        raise _refused("it is empty")  # llama.cpp takes that for no grammar, and lets everything pass
    if len(text) > MAX_BYTES:
        raise _refused(f"{len(text)} characters, more than {MAX_BYTES}")
    depth = rules = elements = 0
    item = 1  # elements that a repetition would repeat
    for match in _TOKEN.finditer(text):
        kind, found = match.lastgroup, match.group()
        if kind == "literal":
            item = len(found)
            elements += item
        elif kind in ("token", "name"):
            item = 1
            elements += 1
        elif kind == "define":
            rules += 1
        elif kind == "count":
            low = _number(match["low"])
            high = low if match["comma"] is None else _number(match["high"]) if match["high"] else None
            if high is not None and high < low:
                raise _refused(f"the repetition {found[:40]} has its ends the wrong way round")
            times = max(low, 1) if high is None or high > MAX_TIMES else max(high, 1)
            rules += times
            elements += item * times
            item *= max(low, 1)
        elif found == "(":
            depth += 1
            rules += 1
        elif found == ")":
            depth -= 1
            item = 1
        elif found in "*+?":
            rules += 1
            elements += item
        if depth > MAX_DEPTH:
            raise _refused(f"groups nested deeper than {MAX_DEPTH}")
        if rules > MAX_RULES:
            raise _refused(f"more than {MAX_RULES} rules, counting groups and repetitions")
        if elements > MAX_ELEMENTS:
            raise _refused(f"more than {MAX_ELEMENTS} elements, counting repetitions")


def _number(digits: str) -> int:
    # past what the parser takes anyway, the value makes no difference, and int() would refuse very long ones
    return int(digits) if len(digits) < 10 else 10**9


def _refused(reason: str) -> SamplerError:
    return SamplerError(f"grammar: {reason}", parameter="grammar", reason=reason)
