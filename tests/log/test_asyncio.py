"""The same for asyncio."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamastate.errors import HeadMovedError
from llamastate.log import AsyncSessionLog, SessionLog, SQLiteLogStore, TurnEnd, assistant, user


def test_every_operation(tmp_path: Path) -> None:
    async def run() -> None:
        with SQLiteLogStore(tmp_path / "log.db") as store:
            log = await AsyncSessionLog.create(store, system_prompt="x", session_id="a")
            at = await log.save_delta(user(str(n)) for n in range(3))
            await log.save_turn_end(1)
            await log.save_outcome("finished")
            await log.save_usage(3, 100, output_tokens=4)
            await log.save_cache_locked(2, state={"x": 1})
            await log.save_cache_unlocked()
            await log.save_config_changed({"t": 1})
            await log.append(TurnEnd(2))
            assert await log.verify() == log.n_entries == len(await log.entries()) == 11
            state = await log.restore()
            assert (state.turn_count, state.config, len(state.usage), state.lock) == (2, {"t": 1}, 1, None)
            fork = await log.fork_at(at)
            assert len((await fork.restore()).history) == 3
            assert (await (await log.fork()).restore()) == state
            assert (await (await log.compact([assistant("sum")])).restore()).turn_count == 2
            other = await AsyncSessionLog.open(store, "a")
            await other.save_turn_end(3)
            with pytest.raises(HeadMovedError):
                await log.save_turn_end(3)
            assert await log.ensure_head_or_fork()
            assert (await log.info()).origin.session_id == "a"
            assert not await log.refresh()
            with pytest.raises(TypeError):
                SessionLog()

    asyncio.run(run())


def test_tasks_take_turns(tmp_path: Path) -> None:
    async def run() -> None:
        with SQLiteLogStore(tmp_path / "log.db") as store:
            log = await AsyncSessionLog.create(store)
            await asyncio.gather(*(log.save_turn_end(n) for n in range(50)))
            assert await log.verify() == 51

    asyncio.run(run())


def test_a_cancelled_task_leaves_the_head_where_the_store_has_it(tmp_path: Path) -> None:
    async def run() -> None:
        with SQLiteLogStore(tmp_path / "log.db") as store:
            log = await AsyncSessionLog.create(store)
            for pause in range(10):
                with store.transaction():  # the task's thread has to wait for its end
                    task = asyncio.ensure_future(log.save_delta([user("x" * 1000)] * 50))
                    await asyncio.sleep(pause / 5000)
                    task.cancel()
                    await asyncio.sleep(0)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert store.head(log.id).hash == log.head_hash
            assert await log.verify() == log.n_entries

    asyncio.run(run())
