# distutils: language = c++
# cython: language_level=3
"""LoRA adapters: who owns them, and which a context uses.

llama.cpp trusts an adapter's file more than a state: wrong types of metadata and tensors of odd shapes end the process.
``llamastate.adapters`` reads the file first and refuses those; here is only what needs C.
"""

cimport cython
from libc.stdint cimport uintptr_t
from libcpp.vector cimport vector

from llamastate._native cimport llama as c
from llamastate._native import log
from llamastate._native.handles cimport ContextHandle, ModelHandle, _ModelPtr
from llamastate.errors import AdapterLoadError, ClosedError


@cython.no_gc_clear
cdef class _AdapterPtr:
    """The one place that frees a ``llama_adapter_lora``. Keeps the model, which would free it too."""
    cdef c.llama_adapter_lora * ptr
    cdef _ModelPtr model
    cdef object keep

    def __dealloc__(self):
        # A model that is somebody else's may be gone by now, and its adapters with it; it frees them in any case, while
        # its owner's context may use them longer than any handle of ours lives.
        if self.ptr == NULL or self.keep is not None or self.model.keep is not None:
            return
        # A destructor must not wait: a decode may hold the lock for seconds.
        if self.model.adapters_lock.try_lock():
            c.llama_adapter_lora_free(self.ptr)
            self.model.adapters_lock.unlock()
        else:
            self.model.discarded.push_back(self.ptr)
        self.ptr = NULL


cdef class AdapterHandle:
    """A claim on a ``llama_adapter_lora``."""
    cdef _AdapterPtr _owned
    cdef readonly bint borrowed

    def __init__(self):
        raise TypeError("use load_adapter() or borrow_adapter()")

    @property
    def closed(self):
        """Whether :meth:`close` has been called."""
        return self._owned is None

    @property
    def address(self):
        """The ``llama_adapter_lora *`` as an integer; 0 when closed."""
        return 0 if self._owned is None else <uintptr_t> self._owned.ptr

    def close(self):
        """Give up the claim. The weights go when no context uses them any more. Idempotent."""
        self._owned = None


cdef AdapterHandle _wrap(c.llama_adapter_lora * ptr, _ModelPtr model, keep):
    cdef _AdapterPtr owned = _AdapterPtr.__new__(_AdapterPtr)
    cdef AdapterHandle handle = AdapterHandle.__new__(AdapterHandle)
    owned.model = model
    owned.keep = keep
    owned.ptr = ptr
    handle._owned = owned
    handle.borrowed = keep is not None
    return handle


def load_adapter(ModelHandle model, bytes path):
    """Load a LoRA (``llama_adapter_lora_init``). Releases the GIL.

    Raises
    ------
    AdapterLoadError
        With llama.cpp's own words as ``reason``.
    """
    cdef c.llama_model * m = model.ptr()
    cdef _ModelPtr keep = model._owned
    cdef const char * p = path
    cdef c.llama_adapter_lora * adapter
    cdef vector[c.llama_adapter_lora *] discarded
    cdef size_t i
    name = path.decode("utf-8", "surrogateescape")
    discarded.swap(keep.discarded)
    log.clear_errors()
    try:
        with nogil:
            keep.adapters_lock.lock()
            try:
                for i in range(discarded.size()):
                    c.llama_adapter_lora_free(discarded[i])
                adapter = c.llama_adapter_lora_init(m, p)
            finally:
                keep.adapters_lock.unlock()
    except (RuntimeError, IndexError, MemoryError, ValueError, OverflowError) as error:
        raise AdapterLoadError(f"cannot load {name}: {error}", path=name, reason=str(error)) from None
    if adapter == NULL:
        reason = log.take_errors() or "llama.cpp gave no reason"
        raise AdapterLoadError(f"cannot load {name}: {reason}", path=name, reason=reason)
    return _wrap(adapter, keep, None)


def borrow_adapter(ModelHandle model, uintptr_t address, keep):
    """Wrap a ``llama_adapter_lora *`` that ``keep`` owns."""
    model.ptr()
    if address == 0:
        raise ClosedError("the adapter is closed", what="adapter")
    return _wrap(<c.llama_adapter_lora *> address, model._owned, keep)


def belongs(AdapterHandle adapter, ContextHandle context):
    """Whether an adapter was loaded for the model of a context."""
    if adapter._owned is None:
        raise ClosedError("the adapter is closed", what="adapter")
    if context._model is None:
        raise ClosedError("the context is closed", what="context")
    return adapter._owned.model.ptr == context._model.ptr


def set_adapters(ContextHandle h, tuple adapters, *, bint apply):
    """Make these the adapters of a context (``llama_set_adapters_lora``).

    Parameters
    ----------
    h : ContextHandle
    adapters : tuple of (object, AdapterHandle, float)
        The object is what :attr:`ContextHandle.adapters` gives back. No handle twice, no scale 0.
    apply : bool
        False to record what its owner has set already.
    """
    cdef vector[c.llama_adapter_lora *] pointers
    cdef vector[float] scales
    cdef AdapterHandle handle
    claims = []
    for _, handle, scale in adapters:
        if handle._owned is None:
            raise ClosedError("the adapter is closed", what="adapter")
        pointers.push_back(handle._owned.ptr)
        scales.push_back(scale)
        claims.append(handle._owned)
    h.enter("set_adapters")
    try:
        if apply:
            c.llama_set_adapters_lora(h.ptr, pointers.data(), pointers.size(), scales.data())
            h.forget_outputs()
            h.on_device.clear()
        h.adapters = tuple([(owner, scale) for owner, _, scale in adapters])
        h._adapter_claims = claims
    finally:
        h.release()
