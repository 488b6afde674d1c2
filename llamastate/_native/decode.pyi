import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from llamastate._native.handles import ContextHandle

def decode(
    h: ContextHandle,
    tokens: npt.NDArray[np.int32],
    pos: npt.NDArray[np.int32],
    n_seq_id: npt.NDArray[np.int32],
    seq_ids: npt.NDArray[np.int32],
    outputs: npt.NDArray[np.int8],
) -> int: ...
def logits_into(h: ContextHandle, i: int, out: npt.NDArray[np.float32]) -> None: ...
def embeddings_into(h: ContextHandle, i: int, out: npt.NDArray[np.float32]) -> None: ...
def embeddings_seq_into(h: ContextHandle, seq_id: int, out: npt.NDArray[np.float32]) -> None: ...

@disjoint_base
class LogitsView:
    def __init__(self, h: ContextHandle, i: int) -> None: ...
    # numpy reads it through the C buffer protocol, which has no Python method before 3.12
    def __buffer__(self, flags: int, /) -> memoryview: ...
