"""``llamastate store``: what a prefix store holds on disk, whether it is whole, and making room in it."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from llamastate.clitext import age, bytes_of, count, print_table, size
from llamastate.errors import FileAccessError, InvalidArgumentError, SaveError
from llamastate.prefix.disk import DiskTier
from llamastate.prefix.index import Root, RootUse, Row

__all__ = ["add_commands"]


def add_commands(commands: Any, epilog: str, form: type[argparse.HelpFormatter]) -> None:
    """Add ``store`` and what belongs to it to the command line's parser."""
    store = commands.add_parser(
        "store",
        help="prefix stores: list, count, verify, make room",
        description="Look into the folder of a PrefixStore, also while others use it.",
        epilog=epilog,
        formatter_class=form,
    )
    parts = store.add_subparsers(required=True, metavar="COMMAND")

    def part(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        parser = parts.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=form)
        parser.add_argument("path", metavar="PATH", help="the store's folder")
        parser.add_argument("--json", action="store_true", help="for programs")
        parser.set_defaults(run=run)
        return parser

    ls = part("ls", _ls, "what is stored, by model and settings")
    ls.add_argument("--entries", action="store_true", help="every block and anchor instead")
    ls.add_argument("--root", metavar="ROOT", help="only of this model: the beginning of its root")
    ls.add_argument("--limit", type=count, metavar="N", help="at most so many entries")
    part("stats", _stats, "how much there is of everything")
    verify = part("verify", _verify, "read every file and check every byte")
    verify.add_argument("--drop", action="store_true", help="remove what is damaged")
    gc = part("gc", _gc, "mend what crashes have left: files without a row, rows without a file, temporary files")
    gc.add_argument(
        "--to", type=bytes_of, metavar="SIZE", help="then evict until so much is left at most (such as 20GB)"
    )


@contextmanager
def _opened(path: str) -> Iterator[DiskTier]:
    """The store in a folder that is one: a wrong path must not become a store."""
    if not os.path.isfile(os.path.join(path, "store.json")):
        code = errno.ENOENT
        raise FileAccessError(f"{path!r} is not the folder of a prefix store", path=path, reason="no store", code=code)
    tier = DiskTier(path)
    try:
        yield tier
    finally:
        tier.close()


def _roots(tier: DiskTier, beginning: str | None) -> list[RootUse]:
    found = [use for use in tier.use() if use.root.root.hex().startswith(beginning or "")]
    if beginning is not None and not found:
        raise InvalidArgumentError(f"no root begins with {beginning!r}", name="root", value=beginning)
    return found


# --- commands ---------------------------------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    with _opened(options.path) as tier:
        uses = _roots(tier, options.root)
        if options.entries:
            rows = (row for use in uses for row in tier.entries(use.root.root))
            _print_entries(islice(rows, options.limit), as_json=options.json)
            return 0
    if options.json:
        print(json.dumps([_use_facts(use) for use in uses], indent=2))
        return 0
    table = [("ROOT", "MODEL", "KIND", "BLOCK", "BLOCKS", "ANCHORS", "TOKENS", "LONGEST", "SIZE", "USED")]
    for use in uses:
        totals = use.totals
        table.append((
            use.root.root.hex()[:12], _model(use.root), use.root.kind or "-", str(use.root.block_tokens or "-"),
            str(totals.blocks), str(totals.anchors), str(use.tokens), str(use.longest), size(totals.bytes),
            _ago(use.last_used),
        ))  # fmt: skip
    print_table(table, left=(0, 1, 2))
    return 0


def _stats(options: argparse.Namespace) -> int:
    with _opened(options.path) as tier:
        uses, stats = tier.use(), tier.stats()
    facts: dict[str, Any] = {
        "path": tier.path,
        "models": len(uses),
        "entries": stats.entries,
        "blocks": stats.blocks,
        "anchors": stats.anchors,
        "tokens": sum(use.tokens for use in uses),
        "bytes": stats.bytes,
        "anchor_bytes": stats.anchor_bytes,
        "pinned_bytes": stats.pinned_bytes,
        "first_used": min((use.first_used for use in uses if use.first_used is not None), default=None),
        "last_used": max((use.last_used for use in uses if use.last_used is not None), default=None),
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if name.endswith("bytes"):
            value = f"{size(value)} ({value} bytes)"
        elif name.endswith("used"):
            value = _ago(value)
        print(f"{name:<15}{value}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    with _opened(options.path) as tier:
        if options.drop and tier.readonly:
            reason = "it can only be read"
            raise SaveError(f"nothing can be removed from {tier.path!r}: {reason}", path=tier.path, reason=reason)
        entries = tier.stats().entries
        damaged = tier.verify(drop=options.drop)
    if options.json:
        rows = [{**dataclasses.asdict(d), "key": d.key.hex()} for d in damaged]
        print(json.dumps({"path": tier.path, "entries": entries, "damaged": rows, "dropped": options.drop}, indent=2))
        return int(bool(damaged))
    for one in damaged:
        print(f"{one.path}: {'dropped' if options.drop else 'FAILED'}: {one.reason}")
    print(f"{tier.path}: {entries} entries, {len(damaged) or 'none'} damaged")
    return int(bool(damaged))


def _gc(options: argparse.Namespace) -> int:
    with _opened(options.path) as tier:
        facts = dataclasses.asdict(tier.gc())
        left = tier.stats().bytes
        facts["evicted_bytes"] = 0 if options.to is None else tier.evict(max(0, left - options.to))
        after = tier.stats()
    facts |= {"bytes": after.bytes, "pinned_bytes": after.pinned_bytes}
    if options.json:
        print(json.dumps({"path": tier.path, **facts}, indent=2))
    else:
        print(
            f"{facts['adopted']} files found again, {facts['lost']} rows without a file; removed {facts['damaged']} "
            f"damaged and {facts['temporary']} unfinished files: {size(facts['nbytes'])}"
        )
        if options.to is not None:
            print(f"evicted {size(facts['evicted_bytes'])}")
        print(f"{size(facts['bytes'])} are left, {size(facts['pinned_bytes'])} of them pinned")
    return 0


# --- for people and programs ------------------------------------------------------------------------------------------


def _print_entries(rows: Iterator[Row], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_row_facts(row) for row in rows], indent=2))
        return
    table = [("KEY", "KIND", "FROM", "TO", "SIZE", "USED", "PINNED")]
    for row in rows:
        name, end = row.kind.name.lower(), row.start + row.tail
        table.append((
            row.key.hex()[:16], name, str(row.start), str(end), size(row.nbytes), _ago(row.used), str(row.pinned or "")
        ))  # fmt: skip
    print_table(table, left=(0, 1))


def _row_facts(row: Row) -> dict[str, Any]:
    names = {name: getattr(row, name).hex() for name in ("key", "parent", "root")}
    return {**dataclasses.asdict(row), **names, "kind": row.kind.name.lower()}


def _use_facts(use: RootUse) -> dict[str, Any]:
    return {
        "root": use.root.root.hex(),
        "kind": use.root.kind,
        "block_tokens": use.root.block_tokens,
        "created": use.root.created,
        "fingerprint": _fingerprint(use.root),
        **dataclasses.asdict(use.totals),
        "tokens": use.tokens,
        "longest": use.longest,
        "first_used": use.first_used,
        "last_used": use.last_used,
    }


def _fingerprint(root: Root) -> Any:
    try:
        return json.loads(root.fingerprint)
    except ValueError:
        return None


def _model(root: Root) -> str:
    facts = _fingerprint(root)
    if not isinstance(facts, dict):
        return "-"
    words = f"{facts.get('architecture')} {facts.get('type_k')}/{facts.get('type_v')} {str(facts.get('weights'))[:8]}"
    return "".join(c if c.isprintable() else " " for c in words)


def _ago(used: int | None) -> str:
    return "-" if used is None else age(max(0.0, time.time() - used / 1e6))
