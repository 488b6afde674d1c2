# distutils: language = c++
# cython: language_level=3
"""Who has changed a sequence.

Positions tell how many tokens a sequence holds, not which. So every call that may change cells counts, by sequence, and
whoever relies on what he has left there compares the count. What he does himself, between :meth:`Witness.enter` and
:meth:`Witness.leave` and in the same thread, is counted as seen at once: there is no moment at which Ctrl-C could come
between the one and the other.
"""

from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int32_t, uint64_t

from llamastate.errors import InvalidSequenceError
from llamastate.words import brief


cdef class Changes:
    """How often the sequences of a context have been changed, by whomever. Only touched with the GIL held."""

    def __init__(self):
        raise TypeError("a context has one")

    cdef void note(self, int32_t seq) noexcept:
        """Count a change of a sequence, or of all of them (-1)."""
        cdef int32_t i
        cdef int32_t first = 0 if seq < 0 else seq
        cdef int32_t end = <int32_t> self.counts.size() if seq < 0 else seq + 1
        cdef Witness inside
        for i in range(first, end):
            self.counts[i] += 1
            inside = self.insiders[i]
            if inside is not None and inside.thread == PyThread_get_thread_ident():
                inside.seen += 1

    def note_all(self, seq_ids):
        """Count a change of each of these sequences."""
        for seq in seq_ids:
            self.note(self.checked(seq))

    def count(self, seq_id):
        """How often a sequence has been changed, for :meth:`set_back`."""
        return self.counts[self.checked(seq_id)]

    def set_back(self, seq_id, uint64_t count):
        """What has changed since ``count`` was asked for has been put back as it was, by this thread."""
        cdef int32_t seq = self.checked(seq_id)
        cdef Witness inside = self.insiders[seq]
        if inside is not None and inside.thread == PyThread_get_thread_ident():
            inside.seen -= self.counts[seq] - count
        self.counts[seq] = count

    cdef int32_t checked(self, seq_id) except -1:
        cdef long n = <long> self.counts.size()
        if not 0 <= seq_id < n:
            raise InvalidSequenceError(
                f"sequence id {brief(seq_id)} is not in [0, {n})", seq_id=seq_id, n_seq_max=n
            )
        return seq_id


cdef Changes count_changes(int n_seq_max):
    cdef Changes changes = Changes.__new__(Changes)
    changes.counts.resize(n_seq_max)
    changes.insiders = [None] * n_seq_max
    return changes


cdef class Witness:
    """Tells whether anybody but its owner has changed a sequence.

    Parameters
    ----------
    changes : Changes
        Of the context.
    seq_id : int

    Raises
    ------
    InvalidSequenceError
    """

    def __init__(self, Changes changes not None, seq_id):
        self.seq = changes.checked(seq_id)
        self.changes = changes
        self.accept()

    @property
    def intact(self):
        """Whether nobody has since :meth:`accept`."""
        return self.seen == self.changes.counts[self.seq]

    def accept(self):
        """Take the sequence as it is now for one's own doing."""
        self.seen = self.changes.counts[self.seq]

    def enter(self):
        """From now on changes by this thread are the owner's. Nests."""
        if self.depth == 0:
            self.before = self.changes.insiders[self.seq]
            self.changes.insiders[self.seq] = self
            self.thread = PyThread_get_thread_ident()
        self.depth += 1

    def leave(self):
        """Undo one :meth:`enter`."""
        self.depth -= 1
        if self.depth == 0:
            self.changes.insiders[self.seq] = self.before
            self.before = None
            self.thread = 0
