"""Which session comes from which: as text, as SVG and for Graphviz."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import datetime, timezone
from xml.sax.saxutils import escape

from llamastate.errors import LlamaStateError
from llamastate.log.store import LogInfo, LogStore

__all__ = ["Branch", "forest", "tree_dot", "tree_svg", "tree_text"]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A session and those that come from it.

    Attributes
    ----------
    info : LogInfo
    at : int or None
        The index of the entry of its origin that it comes from; None for a root, or if that cannot be told.
    branches : list of Branch
        In the order of the entries that they come from.
    """

    info: LogInfo
    at: int | None
    branches: list[Branch]

    def walk(self) -> Iterator[Branch]:
        """It and all below."""
        yield self
        for branch in self.branches:
            yield from branch.walk()


def forest(store: LogStore, session_id: str | None = None) -> list[Branch]:
    """Sessions with what comes from them.

    Parameters
    ----------
    store : LogStore
    session_id : str, optional
        Only the tree that has this one in it.

    Returns
    -------
    list of Branch
        The roots, the oldest first. A session whose origin is not in this store is one.

    Raises
    ------
    SessionNotFoundError
    """
    infos = {info.id: info for info in reversed(store.sessions())}
    order = {name: i for i, name in enumerate(infos)}
    children: dict[str, list[LogInfo]] = {}
    roots = []
    for info in infos.values():
        # An origin is always older. What was imported can name one that came later; it must not become a circle.
        at = order.get(info.origin.session_id) if info.origin is not None else None
        if info.origin is not None and at is not None and (at < order[info.id] or not _circular(info, infos)):
            children.setdefault(info.origin.session_id, []).append(info)
        else:
            roots.append(info)
    if session_id is not None:
        top = store.info(session_id)
        starts = {root.id for root in roots}
        while top.origin is not None and top.id not in starts and top.origin.session_id in infos:
            top = infos[top.origin.session_id]
        roots = [top]
    return [_branch(store, root, children) for root in roots]


def _circular(info: LogInfo, infos: dict[str, LogInfo]) -> bool:
    seen = {info.id}
    at: LogInfo | None = info
    while at is not None and at.origin is not None:
        at = infos.get(at.origin.session_id)
        if at is not None:
            if at.id in seen:
                return at.id == info.id
            seen.add(at.id)
    return False


def _branch(store: LogStore, root: LogInfo, children: dict[str, list[LogInfo]]) -> Branch:
    made = Branch(root, _place(store, root), [])
    # a chain of a thousand compactions is nothing unusual, and deeper than Python's stack
    todo = [made]
    while todo:
        branch = todo.pop()
        below = [Branch(info, _place(store, info), []) for info in children.get(branch.info.id, ())]
        branch.branches.extend(sorted(below, key=lambda b: (b.at is None, b.at)))
        todo += below
    return made


def _place(store: LogStore, info: LogInfo) -> int | None:
    if info.origin is None:
        return None
    try:
        return store.find(info.origin.session_id, info.origin.at_hash)
    except LlamaStateError:
        return None  # the origin is not here, or not readable: the tree is still one


def describe(branch: Branch) -> str:
    """One line on a session."""
    info = branch.info
    where = ""
    if info.relation is not None:
        verb = "forked" if info.relation == "fork" else "compacted"
        where = f"  {verb} at entry {'?' if branch.at is None else branch.at}"
    entries = "1 entry" if info.n_entries == 1 else f"{info.n_entries} entries"
    return f"{info.id}  {entries}  {_time(info.created)}{where}"


def _time(ms: int) -> str:
    try:
        return f"{datetime.fromtimestamp(ms / 1000, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "-"


def _lines(roots: list[Branch]) -> Iterator[tuple[str, Branch, int]]:
    """What stands before each session, the session, its depth; in the order of the lines."""
    todo: list[tuple[str, str, Branch, int]] = [("", "", root, 0) for root in reversed(roots)]
    while todo:
        lead, below, branch, depth = todo.pop()
        yield lead, branch, depth
        for i, child in enumerate(reversed(branch.branches)):
            last = i == 0
            todo.append((f"{below}{'└─ ' if last else '├─ '}", f"{below}{'   ' if last else '│  '}", child, depth + 1))


def tree_text(roots: list[Branch]) -> str:
    """Draw :func:`forest` with lines of text."""
    return "".join(f"{lead}{describe(branch)}\n" for lead, branch, _ in _lines(roots))


def tree_dot(roots: list[Branch]) -> str:
    """Write :func:`forest` in Graphviz's language."""
    lines = ["digraph sessions {", "  rankdir=LR;", '  node [shape=box, fontname="monospace"];']
    for _, branch, _ in _lines(roots):
        info = branch.info
        lines.append(f"  {_quoted(info.id)} [label={_quoted(f'{info.id}{chr(10)}{info.n_entries} entries')}];")
    for _, branch, depth in _lines(roots):
        info = branch.info
        if depth and info.origin is not None:
            style = ", style=dashed" if info.relation == "compact" else ""
            label = _quoted(f"{info.relation} at {'?' if branch.at is None else branch.at}")
            lines.append(f"  {_quoted(info.origin.session_id)} -> {_quoted(info.id)} [label={label}{style}];")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


_ROW, _STEP, _LEFT = 28, 26, 16


def tree_svg(roots: list[Branch]) -> str:
    """Draw :func:`forest` as SVG: a dot a session, a line to where it comes from, dashed for a compaction."""
    rows = [(branch, depth) for _, branch, depth in _lines(roots)]
    place = {branch.info.id: (_LEFT + depth * _STEP, 20 + i * _ROW) for i, (branch, depth) in enumerate(rows)}
    width = max((_LEFT + depth * _STEP + 20 + 8 * len(describe(branch)) for branch, depth in rows), default=100)
    height = 20 + _ROW * max(1, len(rows))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for branch, depth in rows:
        x, y = place[branch.info.id]
        if depth and branch.info.origin is not None:
            px, py = place[branch.info.origin.session_id]
            dashed = ' stroke-dasharray="4 3"' if branch.info.relation == "compact" else ""
            out.append(f'<path d="M{px} {py} V{y} H{x}" fill="none" stroke="#888" stroke-width="1.5"{dashed}/>')
    for branch, _ in rows:
        x, y = place[branch.info.id]
        out.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{"#36c" if branch.info.origin is None else "#393"}"/>')
        out.append(f'<text x="{x + 12}" y="{y + 4}">{escape(describe(branch))}</text>')
    return "\n".join([*out, "</svg>", ""])
