# distutils: language = c++
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The usual blob, recognised at a glance.

Copying a state leaves the caches cold, and Python that runs then takes several times longer than its work would: it
was most of what a restore cost beside the copy. So the one shape that nearly all blobs have is compared here. Whatever
differs in any way goes to ``llamastate.layout``, which knows all shapes and can say what is wrong.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, memcpy


cdef inline uint32_t word(const uint8_t * at) noexcept nogil:
    # Blobs are little-endian. On a machine that is not no number fits, and everything goes to llamastate.layout.
    cdef uint32_t value
    memcpy(&value, at, 4)
    return value


def usual_sequence(const uint8_t[::1] body, bytes preamble, bytes headers, const int64_t[::1] cell_bytes):
    """What a blob holds, if it is one stream of cells of one sequence, in the order of their positions.

    Parameters
    ----------
    body : uint8[n]
        A sequence blob without the magic and the sequence id in front.
    preamble : bytes
        The two words between the cells and the layers.
    headers : bytes
        The 12 bytes in front of each layer's rows, one after the other.
    cell_bytes : int64[layers]
        Bytes that a cell takes in each layer.

    Returns
    -------
    (n_cells, first_pos, seq_id) or None
        None does not mean that anything is wrong.
    """
    cdef int64_t size = body.shape[0]
    cdef int64_t at = 8
    cdef int64_t n, i
    cdef Py_ssize_t n_layers = cell_bytes.shape[0]
    cdef const uint8_t * p
    cdef const char * expected = headers
    cdef uint32_t first, seq
    if size < 8 or len(preamble) != 8 or len(headers) != 12 * n_layers:
        return None
    p = &body[0]
    n = word(p + 4)
    if word(p) != 1 or n == 0 or at + 12 * n + 8 > size:
        return None
    first, seq = word(p + at), word(p + at + 8)
    if <int64_t> first + n > 0x7FFFFFFF:
        return None
    for i in range(n):
        if word(p + at) != first + i or word(p + at + 4) != 1 or word(p + at + 8) != seq:
            return None
        at += 12
    if memcmp(p + at, <const char *> preamble, 8) != 0:
        return None
    at += 8
    for i in range(n_layers):
        if at + 12 > size or memcmp(p + at, expected + 12 * i, 12) != 0:
            return None
        at += 12 + n * cell_bytes[i]
    return (n, first, seq) if at == size else None
