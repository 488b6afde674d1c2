"""A radix tree over tokens: who begins like whom."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from llamastate.arrays import Int32Array
from llamastate.sessioncore import common_prefix

__all__ = ["Colour", "Common", "RadixTree"]


class Colour(IntEnum):
    """What a key stands for: a prompt that waits, or tokens whose state is in the context or on its way there."""

    WAITING = 0
    RESIDENT = 1


class Common(NamedTuple):
    """The longest prefix that two keys of different colours share."""

    n_tokens: int
    waiting: list[Hashable]


class _Node:
    """Tokens from ``start`` to ``end`` of every key below."""

    __slots__ = ("children", "counts", "edge", "end", "keys", "parent")

    def __init__(self, parent: _Node | None, edge: Int32Array, end: int) -> None:
        self.parent = parent
        self.edge = edge
        self.end = end
        self.children: dict[int, _Node] = {}
        #: Keys that end here.
        self.keys: dict[Hashable, Colour] = {}
        #: Keys here and below, by colour.
        self.counts = [0, 0]


class RadixTree:
    """Token sequences by what they begin with. Every operation is linear in the tokens it looks at.

    Examples
    --------
    >>> import numpy as np
    >>> tree = RadixTree()
    >>> tree.insert("a", np.array([1, 2, 3], np.int32), Colour.RESIDENT)
    >>> tree.insert("b", np.array([1, 2, 4], np.int32), Colour.WAITING)
    >>> tree.best_common()
    Common(n_tokens=2, waiting=['b'])
    """

    def __init__(self) -> None:
        self._root = _Node(None, np.empty(0, np.int32), 0)
        self._ends: dict[Hashable, _Node] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._ends

    @property
    def n_nodes(self) -> int:
        """Nodes, the root included; never more than twice the keys, and one."""
        return sum(1 for _ in self._below(self._root))

    def insert(self, key: Hashable, tokens: Int32Array, colour: Colour) -> None:
        """Add a key.

        Parameters
        ----------
        key : hashable
            Not in the tree yet.
        tokens : int32[n]
            Kept in part, not copied.
        colour : Colour
        """
        if key in self._ends:
            raise KeyError(key)
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                child = _Node(node, tokens[at:], len(tokens))
                node.children[int(tokens[at])] = child
                node, at = child, len(tokens)
                break
            same = common_prefix(child.edge, tokens[at:])
            if same < len(child.edge):
                child = self._split(child, same)
            node, at = child, at + same
        node.keys[key] = colour
        self._ends[key] = node
        self._count(node, colour, 1)

    def remove(self, key: Hashable) -> None:
        """Take a key out."""
        node = self._ends.pop(key)
        self._count(node, node.keys.pop(key), -1)
        parent = node.parent
        if parent is None:
            return
        if not node.keys and not node.children:
            del parent.children[int(node.edge[0])]
            node = parent
        self._join(node)

    def recolour(self, key: Hashable, colour: Colour) -> None:
        """Let a key stand for something else from now on."""
        node = self._ends[key]
        self._count(node, node.keys[key], -1)
        node.keys[key] = colour
        self._count(node, colour, 1)

    def match(self, tokens: Int32Array, colour: Colour) -> int:
        """Length of the longest prefix of ``tokens`` that a key of that colour begins with."""
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None or not child.counts[colour]:
                break
            same = common_prefix(child.edge, tokens[at:])
            at += same
            if same < len(child.edge):
                break
            node = child
        return at

    def branches(self, tokens: Int32Array, colour: Colour) -> list[int]:
        """Lengths at which keys of that colour part from ``tokens``, after at least one common token; ascending."""
        found: list[int] = []
        node, at = self._root, 0
        while True:
            child = node.children.get(int(tokens[at])) if at < len(tokens) else None
            below = 0 if child is None else child.counts[colour]
            if at and node.counts[colour] > below:
                found.append(at)
            if child is None or not below:
                return found
            same = common_prefix(child.edge, tokens[at:])
            at += same
            if same < len(child.edge):
                return [*found, at]
            node = child

    def best_common(self) -> Common:
        """The longest prefix that a waiting key shares with a resident one, and all waiting keys that do."""
        best = self._root
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node.end > best.end:
                best = node
            stack.extend(child for child in node.children.values() if child.counts[0] and child.counts[1])
        if not best.counts[Colour.WAITING] or not best.counts[Colour.RESIDENT]:
            return Common(0, [])
        return Common(best.end, self.keys_below(best, Colour.WAITING))

    def keys_below(self, node: _Node, colour: Colour) -> list[Hashable]:
        """Keys of a colour at a node and below."""
        return [key for n in self._below(node) for key, c in n.keys.items() if c is colour]

    def _below(self, node: _Node) -> Iterator[_Node]:
        stack = [node]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _split(self, node: _Node, n: int) -> _Node:
        """Cut a node's edge after ``n`` tokens; the new upper half."""
        parent = node.parent
        assert parent is not None
        upper = _Node(parent, node.edge[:n], node.end - len(node.edge) + n)
        upper.counts = list(node.counts)
        parent.children[int(node.edge[0])] = upper
        node.edge = node.edge[n:]
        node.parent = upper
        upper.children[int(node.edge[0])] = node
        return upper

    def _join(self, node: _Node) -> None:
        """Join a node with its only child, if nothing else needs it."""
        if node.parent is None or node.keys or len(node.children) != 1:
            return
        (child,) = node.children.values()
        child.edge = np.concatenate([node.edge, child.edge])
        child.parent = node.parent
        node.parent.children[int(child.edge[0])] = child

    def _count(self, node: _Node | None, colour: Colour, by: int) -> None:
        while node is not None:
            node.counts[colour] += by
            node = node.parent
