"""Bridges to other packages. Each module here needs the package that it is named after, and nothing else does.

==============  ========================================================================================================
`llama_cpp`     llama-cpp-python: its context borrowed, its states without copies, a cache for its completions
`watch`         what is known of a Llama's sequence
`takeover`      the methods of a Llama that we take part in
`states`        its ``LlamaState``, taken and put back
==============  ========================================================================================================
"""
