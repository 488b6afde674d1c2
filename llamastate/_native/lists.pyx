# distutils: language = c++
# cython: language_level=3, boundscheck=False, wraparound=False
"""Loops over things that are too many for Python, or too few for NumPy's preparations."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy


def skip_strings(const unsigned char[::1] data, Py_ssize_t at, uint64_t count):
    """Where ``count`` strings end that begin at ``at``, each a little-endian u64 length and so many bytes.

    Raises
    ------
    ValueError
        The data ends first.
    """
    cdef Py_ssize_t n = data.shape[0]
    cdef uint64_t length, i
    cdef unsigned char raw[8]
    cdef int j
    if at < 0:
        raise ValueError(f"offset {at}")
    for i in range(count):
        if at > n - 8:
            raise ValueError(f"the file ends inside a list of strings, at {at}")
        memcpy(raw, &data[at], 8)
        length = 0
        for j in range(8):
            length |= <uint64_t> raw[j] << (8 * j)
        at += 8
        if length > <uint64_t> (n - at):
            raise ValueError(f"a string of {length} bytes at {at}")
        at += <Py_ssize_t> length
    return at


def first_outside(const int32_t[::1] ids, uint32_t limit):
    """Index of the first number that is not in ``[0, limit)``, or -1."""
    cdef Py_ssize_t i
    for i in range(ids.shape[0]):
        if <uint32_t> ids[i] >= limit:
            return i
    return -1
