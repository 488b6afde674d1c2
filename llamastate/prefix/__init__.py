"""The prefix store: KV blocks, shared by everything that begins alike, kept in memory and on disk.

==============  ========================================================================================================
`chain`         names: a hash over the fingerprint and every token so far
`entry`         the bytes under a name
`ram`           entries in memory
`index`         which entries are on disk, in SQLite
`disk`          entries on disk
`housekeeping`  and what has to be mended there
`remote`        entries on any file system that fsspec knows
`behind`        writing while the caller goes on
`ahead`         reading while the caller uses what was read
`levels`        one place below the other
`match`         how much of a sequence is stored
`rows`          between a sequence and entries
`source`        what there is to store of a session
`store`         :class:`PrefixStore`: what is kept, where is looked, what is given back
`stats`         numbers
==============  ========================================================================================================

Full attention can be cut anywhere: its rows go into blocks, and a prefix is so many blocks. What a sliding window has
kept, or a recurrent state has become, cannot be cut. It is stored whole, as an *anchor*, at the ends of prompts and
turns and every so many tokens; a prefix ends at one of those then.
"""

from typing import TYPE_CHECKING, Any

from llamastate.prefix.stats import PrefixStats
from llamastate.prefix.store import PrefixStore

if TYPE_CHECKING:
    from llamastate.prefix.remote import RemoteTier

__all__ = ["PrefixStats", "PrefixStore", "RemoteTier"]


def __getattr__(name: str) -> Any:
    # what only few need: SQLite and threads come with it
    if name == "RemoteTier":
        from llamastate.prefix.remote import RemoteTier

        return RemoteTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
