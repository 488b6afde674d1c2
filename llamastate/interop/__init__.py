"""Bridges to other packages. Each module here needs the package that it is named after, and nothing else does.

==============  ========================================================================================================
`llama_cpp`     llama-cpp-python: its context borrowed, its states without copies, a cache for its completions
`watch`         what is known of a Llama's sequence
`takeover`      the methods of a Llama that we take part in
`states`        its ``LlamaState``, taken and put back
`ray`           Ray Data: processors of datasets, prefixes for all actors
`rayactor`      what runs in Ray's workers
`rayrows`       rows to requests, results to columns
`rayservice`    several batches at once on an actor's one runner
==============  ========================================================================================================
"""
