"""The state of a language model as a thing that programs can hold.

llamastate captures, restores, rolls back, shares and persists the memory of models that llama.cpp runs: as fast as the
machine can copy bytes, and never silently wrong.
"""

import logging as _logging
import sys as _sys

from llamastate import _native  # first: it loads the library that everything else links to
from llamastate._native import log as _log

# llama-cpp-python installs a callback of its own when it is imported; if it has been, it goes on hearing everything.
_log.install("llama_cpp" in _sys.modules)
_logging.getLogger("llamastate").addHandler(_logging.NullHandler())

from llamastate import errors  # noqa: E402
from llamastate.adapters import Adapter  # noqa: E402
from llamastate.batching import Batch  # noqa: E402
from llamastate.context import Context  # noqa: E402
from llamastate.errors import *  # noqa: E402, F403
from llamastate.fingerprint import Fingerprint, require_same  # noqa: E402
from llamastate.flags import SeqFlags  # noqa: E402
from llamastate.history import Checkpoint  # noqa: E402
from llamastate.manager import SessionInfo, SessionManager  # noqa: E402
from llamastate.model import Model  # noqa: E402
from llamastate.sampler import Sampler, SamplingParams  # noqa: E402
from llamastate.session import Completion, Session, SyncResult  # noqa: E402
from llamastate.snapparts import CheckpointFlags, CheckpointRecord  # noqa: E402
from llamastate.snapshot import Snapshot  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Batch",
    "Checkpoint",
    "CheckpointFlags",
    "CheckpointRecord",
    "Completion",
    "Context",
    "Fingerprint",
    "Model",
    "Sampler",
    "SamplingParams",
    "SeqFlags",
    "Session",
    "SessionInfo",
    "SessionManager",
    "Snapshot",
    "SyncResult",
    "__version__",
    "errors",
    "native_version",
    "require_same",
]
__all__ += errors.__all__


def native_version() -> dict[str, str]:
    """Which llama.cpp runs: its version, ggml's version and commit, and the library's path."""
    from llamastate._native import consts

    return {
        "llama": consts.LLAMA_VERSION,
        "ggml": consts.GGML_VERSION,
        "ggml_commit": consts.GGML_COMMIT,
        "library": str(_native.library),
    }
