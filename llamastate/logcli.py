"""``llamastate log``: what is in a store of session logs, whether it holds, which session comes from which."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from llamastate.atomic import write_atomically
from llamastate.clitext import count
from llamastate.errors import LlamaStateError, LogTamperedError, SaveError, SessionNotFoundError
from llamastate.log import (
    RestoredState,
    SessionLog,
    SQLiteLogStore,
    StoredEntry,
    export_lines,
    forest,
    import_jsonl,
    item_kind,
    salvage,
    tree_dot,
    tree_svg,
    tree_text,
)
from llamastate.log.entries import plain
from llamastate.statefiles import reading

__all__ = ["add_commands"]

#: Columns that one entry takes on a terminal.
_WIDTH = 100


def add_commands(commands: Any, epilog: str, form: type[argparse.HelpFormatter]) -> None:
    """Add ``log`` and what belongs to it to the command line's parser."""
    log = commands.add_parser(
        "log",
        help="logs of sessions: list, show, verify, draw, export, import",
        description="Look into a store of session logs (SQLiteLogStore). Only import changes it.",
        epilog=epilog,
        formatter_class=form,
    )
    parts = log.add_subparsers(required=True, metavar="COMMAND")

    def part(name: str, run: Callable[[argparse.Namespace], int], text: str, *, as_json: bool = True) -> Any:
        parser = parts.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=form)
        parser.add_argument("store", metavar="STORE", help="the database")
        if as_json:
            parser.add_argument("--json", action="store_true", help="for programs")
        parser.set_defaults(run=run)
        return parser

    ls = part("ls", _ls, "what sessions there are, the newest first")
    ls.add_argument("--limit", type=count, metavar="N", help="at most so many")
    show = part("show", _show, "the entries of a session")
    show.add_argument("session", metavar="SESSION", help="its id, or a beginning that no other has")
    show.add_argument("--state", action="store_true", help="what they lead to instead")
    verify = part("verify", _verify, "whether the chains hold")
    verify.add_argument("sessions", metavar="SESSION", nargs="*", help="all, if none is named")
    tree = part("tree", _tree, "which session comes from which")
    tree.add_argument("session", metavar="SESSION", nargs="?", help="only the tree that it is in")
    drawn = tree.add_mutually_exclusive_group()
    drawn.add_argument("--svg", action="store_true", help="as a picture")
    drawn.add_argument("--dot", action="store_true", help="for Graphviz")
    export = part("export", _export, "write sessions as JSON Lines, hashes intact", as_json=False)
    export.add_argument("sessions", metavar="SESSION", nargs="*", help="all, if none is named")
    export.add_argument("-o", "--output", metavar="FILE", help="instead of standard output")
    export.add_argument("--damaged", action="store_true", help="whatever can still be read, also what does not hold")
    into = part("import", _import, "add the sessions of a JSON Lines file")
    into.add_argument("file", metavar="FILE", help="- for standard input")
    into.add_argument("--partial", action="store_true", help="of a session that does not hold, add what does")


def _open(options: argparse.Namespace) -> SQLiteLogStore:
    return SQLiteLogStore(options.store, read_only=True)


def _find(store: SQLiteLogStore, name: str) -> str:
    """The id that begins so."""
    try:
        return store.info(name).id
    except SessionNotFoundError:
        found = [info.id for info in store.sessions() if info.id.startswith(name)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise
    raise SessionNotFoundError(f"{name!r} is the beginning of {len(found)} sessions", name=name)


# --- commands ---------------------------------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    with _open(options) as store:
        infos = store.sessions(limit=options.limit)
    if options.json:
        print(json.dumps([info.to_dict() for info in infos], indent=2))
        return 0
    rows = [("ID", "ENTRIES", "CREATED", "LAST ENTRY", "FROM")]
    for info in infos:
        origin = "" if info.origin is None else _clean(f"{info.relation} of {info.origin.session_id}")
        rows.append((_clean(info.id), str(info.n_entries), _time(info.created), _time(info.updated), origin))
    _print_rows(rows)
    return 0


def _show(options: argparse.Namespace) -> int:
    with _open(options) as store:
        log = SessionLog.open(store, _find(store, options.session))
        if options.state:
            _print_state(log, log.restore(), as_json=options.json)
            return 0
        entries = list(log.entries())
    if options.json:
        print(json.dumps([_entry_facts(stored) for stored in entries], indent=2, ensure_ascii=False))
        return 0
    rows = [("INDEX", "HASH", "TIME", "KIND", "")]
    for stored in entries:
        facts = _readable(stored)
        rows.append((
            str(stored.index), stored.hash[:12], _time(facts.get("ts")), _cut(str(facts.get("kind"))), _summary(facts)
        ))  # fmt: skip
    _print_rows(rows)
    return 0


def _verify(options: argparse.Namespace) -> int:
    facts = []
    with _open(options) as store:
        for name in [_find(store, n) for n in options.sessions] or [i.id for i in reversed(store.sessions())]:
            fact: dict[str, Any] = {"id": name, "ok": True, "n_entries": None, "index": None, "error": None}
            try:
                fact["n_entries"] = SessionLog.open(store, name).verify()
            except LlamaStateError as error:
                index = error.index if isinstance(error, LogTamperedError) else None
                fact |= {"ok": False, "index": index, "error": str(error)}
            facts.append(fact)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for fact in facts:
            verdict = f"ok ({fact['n_entries']} entries)" if fact["ok"] else f"FAILED: {fact['error']}"
            print(_clean(f"{fact['id']}: {verdict}"))
    return int(not all(fact["ok"] for fact in facts))


def _tree(options: argparse.Namespace) -> int:
    with _open(options) as store:
        roots = forest(store, None if options.session is None else _find(store, options.session))
    if options.json:
        rows = [
            {**branch.info.to_dict(), "at_index": branch.at, "branches": [b.info.id for b in branch.branches]}
            for root in roots
            for branch in root.walk()
        ]
        print(json.dumps(rows, indent=2))
        return 0
    if options.svg or options.dot:
        print((tree_svg if options.svg else tree_dot)(roots), end="")
    else:
        for line in tree_text(roots).splitlines():
            print(_clean(line))
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.damaged:
        lines = salvage(options.store)
        if options.sessions:
            beginnings = tuple(f'{{"session":"{name}",'.encode() for name in options.sessions)
            lines = (line for line in lines if line.startswith(beginnings))
        _write(options.output, lines)
        return 0
    with _open(options) as store:
        names = [_find(store, name) for name in options.sessions] or None
        _write(options.output, export_lines(store, names))
    return 0


def _write(path: str | None, lines: Any) -> None:
    if path is None:
        out = sys.stdout.buffer
        for line in lines:
            out.write(line)
        out.flush()
        return
    try:
        write_atomically(path, lines)
    except (OSError, ValueError) as error:
        if isinstance(error, LlamaStateError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(f"cannot write {path!r}: {reason}", path=path, reason=reason) from None


def _import(options: argparse.Namespace) -> int:
    with SQLiteLogStore(options.store) as store:
        if options.file == "-":
            done = import_jsonl(store, sys.stdin.buffer, partial=options.partial)
        else:
            with reading(options.file) as file:
                lines = os.fdopen(os.dup(file.fileno()), "rb")
            with lines:
                done = import_jsonl(store, lines, partial=options.partial)
    if options.json:
        broken = {name: {"index": e.index, "error": str(e)} for name, e in done.broken.items()}
        print(json.dumps({"sessions": done.sessions, "broken": broken}, indent=2))
    else:
        for name, n in done.sessions.items():
            rest = f", then: {done.broken[name]}" if name in done.broken else ""
            print(f"{name}: {n} entries{rest}")
    return int(bool(done.broken))


# --- for people -------------------------------------------------------------------------------------------------------


def _entry_facts(stored: StoredEntry) -> dict[str, Any]:
    return {
        "index": stored.index,
        "hash": stored.hash,
        "prev_hash": stored.prev_hash,
        "entry": _readable(stored),
    }


def _readable(stored: StoredEntry) -> dict[str, Any]:
    try:
        facts: Any = plain(stored.data)
    except (ValueError, RecursionError) as error:
        return {"kind": "damaged", "error": str(error)}
    return facts if isinstance(facts, dict) else {"kind": "damaged"}


def _summary(facts: dict[str, Any]) -> str:
    items = facts.get("items") or ([facts["item"]] if isinstance(facts.get("item"), dict) else None)
    if isinstance(items, list):
        return _cut("; ".join(_item(item) for item in items))
    rest = {name: value for name, value in facts.items() if name not in ("kind", "ts", "history", "kept")}
    if isinstance(history := facts.get("history"), list):
        rest["history"] = f"{len(history)} items"
    return _cut(", ".join(f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in rest.items()))


def _item(item: Any) -> str:
    if not isinstance(item, dict):
        return repr(item)
    text = next((item[n] for n in ("content", "text", "name", "output", "arguments") if item.get(n)), "")
    return f"{item_kind(item)}: {text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)}"


def _print_state(log: SessionLog, state: RestoredState, *, as_json: bool) -> None:
    facts: dict[str, Any] = {
        "id": log.id,
        "head_hash": log.head_hash,
        "system_prompt": state.system_prompt,
        "config": state.config,
        "turn_count": state.turn_count,
        "outcome": None if state.outcome is None else state.outcome.outcome,
        "locked_prefix_len": state.locked_prefix_len,
        "output_tokens": sum(u.output_tokens for u in state.usage),
        "history": state.history,
    }
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, value in facts.items():
        if name != "history":
            print(f"{name:<20}{_cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}")
    for i, item in enumerate(state.history):
        print(f"{i:>6}  {_cut(_item(item))}")


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip())


def _clean(text: str) -> str:
    """What a log holds must not command the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _cut(text: str) -> str:
    line = _clean(text)
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _time(ms: Any) -> str:
    try:
        return f"{datetime.fromtimestamp(ms / 1000, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"
