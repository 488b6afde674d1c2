import numpy as np
import numpy.typing as npt

def usual_sequence(
    body: memoryview, preamble: bytes, headers: bytes, cell_bytes: npt.NDArray[np.int64]
) -> tuple[int, int, int] | None: ...
