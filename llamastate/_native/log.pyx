# distutils: language = c++
# cython: language_level=3
"""llama.cpp's log, kept out of the user's terminal.

llama.cpp writes every message to one global callback. Ours remembers the error lines of the calling thread, so that
an exception can quote llama.cpp's own reason, and hands the rest to the logger ``llamastate.native``. A callback that
somebody else installed first (llama-cpp-python does at import) is kept and still gets every message.
"""

import logging

from libcpp.string cimport string

from llamastate._native.llama cimport (
    GGML_LOG_LEVEL_CONT,
    GGML_LOG_LEVEL_DEBUG,
    GGML_LOG_LEVEL_ERROR,
    GGML_LOG_LEVEL_INFO,
    GGML_LOG_LEVEL_WARN,
    ggml_log_callback,
    ggml_log_level,
    llama_log_get,
    llama_log_set,
)

cdef extern from *:
    """
    #include <string>
    static std::string & llamastate_last_error() { static thread_local std::string text; return text; }
    static int & llamastate_last_level() { static thread_local int level = 0; return level; }
    """
    string & llamastate_last_error() nogil
    int & llamastate_last_level() nogil

logger = logging.getLogger("llamastate.native")

# Read without a lock by threads of ggml: a plain int, written only by set_level().
cdef int threshold = <int> GGML_LOG_LEVEL_WARN
cdef ggml_log_callback previous = NULL
cdef void * previous_data = NULL

_LEVELS = {
    <int> GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    <int> GGML_LOG_LEVEL_INFO: logging.INFO,
    <int> GGML_LOG_LEVEL_WARN: logging.WARNING,
    <int> GGML_LOG_LEVEL_ERROR: logging.ERROR,
}

# An error text longer than this is somebody's dump, not a reason.
cdef size_t MAX_ERROR = 2000


cdef void _to_logging(int level, const char * text) noexcept with gil:
    try:
        message = (<bytes> text).decode("utf-8", "replace").rstrip("\n")
        if message:
            logger.log(_LEVELS.get(level, logging.INFO), "%s", message)
    except BaseException:  # a logging handler must not be able to unwind through C
        pass


cdef void _callback(ggml_log_level level, const char * text, void * data) noexcept nogil:
    cdef int lvl = <int> level
    if lvl == <int> GGML_LOG_LEVEL_CONT:
        lvl = (&llamastate_last_level())[0]
    else:
        (&llamastate_last_level())[0] = lvl
    if lvl == <int> GGML_LOG_LEVEL_ERROR and (&llamastate_last_error())[0].size() < MAX_ERROR:
        (&llamastate_last_error())[0].append(text)
    if previous != NULL:
        previous(level, text, previous_data)
    elif lvl >= threshold:
        _to_logging(lvl, text)


def install(bint chain):
    """Make ours llama.cpp's log callback.

    Parameters
    ----------
    chain : bool
        Whether the callback in place now was put there on purpose by somebody else and must go on hearing everything.
        llama.cpp's own default prints to stderr and cannot be told apart from here, so the caller has to know.

    Notes
    -----
    ``llama_log_set`` is global and not thread safe: called once, while the package is imported.
    """
    global previous, previous_data
    cdef ggml_log_callback current = NULL
    cdef void * data = NULL
    llama_log_get(&current, &data)
    if current == _callback:
        return
    if chain:
        previous = current
        previous_data = data
    llama_log_set(_callback, NULL)


def set_level(int level):
    """Hand messages of at least this ``ggml_log_level`` (1 debug, 2 info, 3 warn, 4 error) to logging; 5 for none."""
    global threshold
    if not 1 <= level <= 5:
        raise ValueError(f"log level {level} is not in 1..5")
    threshold = level


def clear_errors():
    """Forget the error text of this thread."""
    (&llamastate_last_error())[0].clear()


def take_errors():
    """Return and forget what llama.cpp logged as errors in this thread, or ``None``."""
    cdef string text = (&llamastate_last_error())[0]
    (&llamastate_last_error())[0].clear()
    if text.empty():
        return None
    return (<bytes> text).decode("utf-8", "replace").strip()
