from libc.stdint cimport int32_t, uint64_t
from libcpp.vector cimport vector


cdef class Changes:
    cdef vector[uint64_t] counts
    # Whose doing it is, by sequence: the Witness that is inside, or None.
    cdef list insiders
    cdef void note(self, int32_t seq) noexcept
    cdef int32_t checked(self, seq_id) except -1


cdef Changes count_changes(int n_seq_max)


cdef class Witness:
    cdef Changes changes
    cdef int32_t seq
    cdef uint64_t seen
    cdef unsigned long thread
    cdef int depth
    cdef object before
