"""The only Cython of the package: llama.cpp's calls, checked and locked, without policy.

Importing this loads the very libraries that the extensions were built against (or says which command mends it).
"""

from llamastate._native import _loader

#: The libllama that this process runs.
library = _loader.load()
