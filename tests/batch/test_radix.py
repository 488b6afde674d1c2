"""The radix tree and the ledger of cells, each against the plainest way to have the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamastate.batch.cells import Cells, Holder
from llamastate.batch.radix import Colour, RadixTree

WAITING, RESIDENT = Colour.WAITING, Colour.RESIDENT
#: Few different tokens, so that much is shared.
texts = st.lists(st.integers(0, 2), max_size=8)
colours = st.sampled_from([WAITING, RESIDENT])


def array(tokens):
    return np.array(tokens, np.int32)


def common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@given(st.lists(st.tuples(texts, colours), max_size=25), st.data())
@settings(max_examples=150, deadline=None)
def test_against_comparing_all_with_all(items, data):
    tree = RadixTree()
    keys: dict[int, tuple[list[int], Colour]] = {}
    for key, (tokens, colour) in enumerate(items):
        tree.insert(key, array(tokens), colour)
        keys[key] = tokens, colour
    for key in data.draw(st.lists(st.sampled_from(range(len(items))), unique=True) if items else st.just([])):
        if data.draw(st.booleans()):
            tree.remove(key)
            del keys[key]
        else:
            colour = data.draw(colours)
            tree.recolour(key, colour)
            keys[key] = keys[key][0], colour
    assert len(tree) == len(keys)
    assert tree.n_nodes <= 2 * len(keys) + 1
    probe = data.draw(texts)
    for colour in Colour:
        lengths = [common(probe, tokens) for tokens, c in keys.values() if c is colour]
        assert tree.match(array(probe), colour) == max(lengths, default=0)
        assert tree.branches(array(probe), colour) == sorted({n for n in lengths if n})
    pairs = {
        (a, common(keys[a][0], keys[b][0]))
        for a in keys
        for b in keys
        if keys[a][1] is WAITING and keys[b][1] is RESIDENT
    }
    n, waiting = tree.best_common()
    assert n == max((n for _, n in pairs), default=0)
    if n:  # several prefixes may be as long: one of them is given, with all that wait for it
        assert waiting
        (prefix,) = {tuple(keys[key][0][:n]) for key in waiting}
        assert set(waiting) == {k for k, (t, c) in keys.items() if c is WAITING and tuple(t[:n]) == prefix}


def test_all_of_a_long_edge_or_a_part():
    tree = RadixTree()
    tree.insert("long", array(range(1000)), RESIDENT)
    assert tree.match(array(range(700)), RESIDENT) == 700
    assert tree.match(array([*range(600), 5]), RESIDENT) == 600
    assert tree.match(array(range(700)), WAITING) == 0
    assert tree.n_nodes == 2


def test_what_is_gone_leaves_nothing():
    tree = RadixTree()
    for key in range(10):
        tree.insert(key, array([1, 2, 3, key]), WAITING)
    for key in range(10):
        tree.remove(key)
    assert tree.n_nodes == 1
    assert "gone" not in tree
    with pytest.raises(KeyError):
        tree.remove(3)


def test_a_key_is_there_once():
    tree = RadixTree()
    tree.insert("a", array([1]), WAITING)
    with pytest.raises(KeyError):
        tree.insert("a", array([2]), WAITING)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_cells_against_sets(data):
    """Forking, growing and emptying in any order: as many cells as a set of them has."""
    cells = Cells(10_000)
    holders: list[Holder] = []
    sets: dict[Holder, list[int]] = {}
    fresh = iter(range(100_000))
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["new", "grow", "fork", "release"]))
        if what == "new" or not holders:
            holders.append(Holder())
            sets[holders[-1]] = []
            continue
        holder = data.draw(st.sampled_from(holders))
        if what == "grow":
            n = data.draw(st.integers(1, 5))
            cells.grow(holder, n)
            sets[holder] += [next(fresh) for _ in range(n)]
        elif what == "fork":
            dest = Holder()
            n = data.draw(st.integers(0, holder.held))
            cells.fork(holder, dest, n)
            holders.append(dest)
            sets[dest] = sets[holder][:n]
        else:
            cells.release(holder)
            holders.remove(holder)
            del sets[holder]
        assert all(h.held == len(sets[h]) for h in holders)
        assert cells.used == len({cell for held in sets.values() for cell in held})
    for holder in holders:
        cells.release(holder)
    assert cells.used == 0
    assert cells.free == 10_000
