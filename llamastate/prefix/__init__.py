"""The prefix store: KV blocks, shared by everything that begins alike, kept in memory and on disk.

=========  ============================================================================================================
`chain`    names: a hash over the fingerprint and every token so far
`entry`    the bytes under a name
`ram`      entries in memory
`index`    which entries are on disk, in SQLite
`disk`     entries on disk
`remote`   entries on any file system that fsspec knows
`behind`   writing while the caller goes on
`rows`     between a sequence and entries
`store`    :class:`PrefixStore`: what is kept, where is looked, what is given back
`stats`    numbers
=========  ============================================================================================================

Full attention can be cut anywhere: its rows go into blocks, and a prefix is so many blocks. What a sliding window has
kept, or a recurrent state has become, cannot be cut. It is stored whole, as an *anchor*, at the ends of prompts and
turns and every so many tokens; a prefix ends at one of those then.
"""

from llamastate.prefix.stats import PrefixStats
from llamastate.prefix.store import PrefixStore

__all__ = ["PrefixStats", "PrefixStore"]
