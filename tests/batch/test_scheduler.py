"""The scheduler on a simulated context: only what is exact is forked, parked or dropped, and nobody starves."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llamastate.batch import rows
from llamastate.batch.jobs import Job, Rules
from llamastate.batch.sources import best_source, n_roots, n_waits
from tests.batch.simulation import Simulation


def rules(**fields: object) -> Rules:
    given = {"n_slots": 4, "n_spare": 2, "n_cells": 400, "max_tokens": 400, "budget": 32, "min_share": 1, **fields}
    return Rules(**given)  # type: ignore[arg-type]


def text(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


@pytest.fixture(params=[True, False], ids=["anywhere", "exact"])
def anywhere(request):
    return request.param


def test_one(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere))
    sim.add(text(0, 50), 4)
    sim.run()
    assert sim.computed == 50 + 3  # the last token is not decoded


def test_a_prefix_is_computed_once(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere))
    shared = text(0, 100)
    for i in range(20):
        sim.add(shared + text(i + 1, 5), 3)
    sim.run()
    assert sim.computed == 100 + 20 * (5 + 2)


def test_groups_in_groups(anywhere):
    """All begin alike, some go on alike: each part is computed once."""
    sim = Simulation(rules(fork_anywhere=anywhere, n_cells=2000, max_tokens=2000, n_spare=6))
    system = text(0, 60)
    jobs = [system + text(100 + group, 40) + text(1000 * group + i, 4) for group in range(3) for i in range(8)]
    random.Random(1).shuffle(jobs)
    for tokens in jobs:
        sim.add(tokens, 2)
    sim.run()
    assert sim.computed == 60 + 3 * 40 + 24 * (4 + 1)


def test_a_few_tokens_are_not_waited_for():
    """Two of each pair begin alike beyond what all share. They compute that twice if it is little.

    But for the first one's, whom all wait for.
    """
    for extra, n_computed in ((3, 40 + 12 * 20 - 3), (12, 40 + 6 * 12 + 12 * 8)):
        sim = Simulation(rules(n_slots=12, n_cells=1000, budget=512, min_share=8))
        system = text(0, 40)
        for i in range(12):
            sim.add([*system, *text(100 + i // 2, extra), *text(1000 + i, 20 - extra)], 5)
        sim.run()
        assert sim.computed == n_computed + 12 * 4
        # the first one, the others, those that waited, and the steps after each
        assert sim.decodes == 2 + 4 + (extra > 8)


def test_what_waits_twice_has_to_gain_twice():
    given = rules(min_share=8)

    def job(n_shared: int, other: int) -> Job:
        return Job(np.array([*range(n_shared), *range(other, other + 20)], np.int32), 4)

    first, third = job(20, 700), job(38, 900)
    for n_shared, found in ((27, 20), (29, 29)):
        second = job(n_shared, 800)
        second.source, second.fork_at = first, 20
        assert (n_waits(first, 20), n_waits(second, 20), n_waits(second, 29)) == (1, 1, 2)
        assert best_source(third, [first, second], given) == (first if found == 20 else second, found)
    first.held = 40
    assert (n_waits(first, 20), n_waits(second, 20), n_waits(second, 29)) == (0, 0, 1)


def test_places_that_come_free_together_are_taken_together(anywhere):
    """The first one of a group is a step ahead of the others once, if it is not held up for them to begin there."""
    sim = Simulation(rules(fork_anywhere=anywhere, n_slots=8, n_cells=1000, budget=512, min_share=8))
    system = text(0, 40)
    for i in range(64):
        sim.add(system + text(i + 1, 5), 10)
    sim.run()
    assert sim.n_mixed == anywhere
    assert sim.decodes == 1 + 8 * 10


def test_a_little_more_in_common_is_kept_if_many_wait_for_it():
    """States that cannot be cut: 20 tokens beyond what all share are computed once for each family."""
    sim = Simulation(rules(fork_anywhere=False, n_slots=3, n_spare=8, n_cells=4000, budget=512, min_share=32))
    system = text(0, 100)
    for i in range(60):
        sim.add([*system, *text(100 + i % 3, 20), *text(1000 + i, 5)], 4)
    sim.run()
    assert sim.computed == 100 + 3 * 20 + 60 * (5 + 3)


def test_not_all_end_together_who_have_what_others_want():
    """Without a spare sequence what all begin with lives in those that run."""
    computed = {}
    for n_spare in (0, 1):
        sim = Simulation(rules(n_slots=4, n_spare=n_spare, n_cells=1000, budget=512, min_share=8))
        system = text(0, 40)
        for i in range(40):
            sim.add(system + text(i + 1, 5), 10)
        sim.run()
        computed[n_spare] = sim.computed - 40 * (5 + 9)
        assert sim.n_mixed > 5 or n_spare
    assert max(computed.values()) <= 40


def test_roots():
    first, second = np.arange(50, dtype=np.int32), np.arange(100, 150, dtype=np.int32)
    assert n_roots([first, second, first[:45]], [], 8) == 2
    assert n_roots([first, second], [np.append(first[:43], 7)], 8) == 1
    assert n_roots([first], [first[:42]], 8) == 1


def test_low_cells_are_for_who_stays():
    sim = Simulation(rules(n_slots=2))
    sim.add(text(0, 5), 10)
    sim.step()
    sim.add(text(1, 5), 10)
    for _ in sim.scheduler.plan():
        pass
    assert [start for _, start, _ in sim.scheduler.rows] == [0, 5]


def test_a_kept_prefix_serves_those_who_come_later(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere))
    shared = text(0, 64)
    for i in range(2):
        sim.add(shared + text(i + 1, 6), 2)
    sim.run()
    before = sim.computed
    sim.add(shared + text(9, 6), 2)
    sim.run()
    assert sim.computed - before == 6 + 1


def test_twins_fork_after_the_prompt(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere))
    first = sim.add(text(0, 30), 5)
    for _ in range(9):  # more than there are slots
        sim.add(first.tokens.tolist(), 5, twin_of=first)
    sim.run()
    assert len(sim.done) == 10
    assert sim.computed == 30 + 10 * 4


def test_twins_of_a_prompt_that_others_have(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere))
    tokens = text(0, 30)
    for _ in range(3):
        first = sim.add(tokens, 3)
        sim.add(tokens, 3, twin_of=first)
    sim.run()
    assert len(sim.done) == 6


def test_who_shares_nothing_waits_for_nobody(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere))
    tokens = text(0, 40)
    for _ in range(3):
        sim.add(tokens, 2, share=False)
    sim.run()
    assert sim.computed == 3 * 41


def test_little_memory_parks_the_youngest_and_all_end(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere, n_cells=100, max_tokens=100, reserve=4, n_spare=1))
    jobs = [sim.add(text(i, 10), 60) for i in range(12)]
    sim.run()
    assert sim.scheduler.n_preemptions > 0
    assert set(sim.done) == set(jobs)
    assert jobs[0].preemptions == 0  # the oldest is never the youngest
    assert sim.computed == 12 * (10 + 59)  # a parked state is not computed again


def test_reserving_all_parks_nobody(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere, n_cells=100, max_tokens=100, reserve=100, n_spare=1))
    for i in range(12):
        sim.add(text(i, 10), 30)
    sim.run()
    assert sim.scheduler.n_preemptions == 0


def test_kept_prefixes_make_room(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere, n_cells=120, max_tokens=120))
    for seed in range(4):
        sim.add([*text(seed, 40), 1], 2)
        sim.add([*text(seed, 40), 2], 2)
        sim.run()
    sim.add(text(99, 110), 8)
    sim.run()
    assert sim.scheduler.n_preemptions == 0


def test_as_long_as_the_cache(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere, n_cells=64, max_tokens=64))
    assert not sim.scheduler.fits(64, 5)
    assert sim.scheduler.fits(64, 1)
    sim.add(text(0, 63), 5)
    sim.add(text(1, 64), 1)
    sim.add(text(2, 10), 500)
    sim.run()
    assert len(sim.done) == 3


def overtaken(sim: Simulation, jobs: list[Job]) -> int:
    """The most later jobs that any job saw go before it, less those it may see when it had to give its place back."""
    most = 0
    for i, job in enumerate(jobs):
        n = sum(later.admitted < job.admitted for later in jobs[i + 1 :])
        most = max(most, n - (sim.rules.n_slots - 1 if job.gave_way else 0))
    return most


@pytest.mark.parametrize("patience", [0, 1, 5, 20])
def test_nobody_is_overtaken_more_often_than_said(anywhere, patience):
    """One that is unlike all others, before a hundred that are alike; and the same with all of higher priority."""
    for priority in (0, 7):
        sim = Simulation(rules(fork_anywhere=anywhere, patience=patience))
        shared = text(0, 50)
        jobs = [sim.add([*shared, 0], 2)]
        jobs.append(sim.add(text(1, 30), 2))
        jobs += [sim.add([*shared, i], 2, priority=priority) for i in range(1, 101)]
        sim.run()
        assert overtaken(sim, jobs) <= patience
        if patience > 1:
            assert overtaken(sim, jobs) == patience  # it does go after those that are alike


def test_priority(anywhere):
    sim = Simulation(rules(fork_anywhere=anywhere, n_slots=1))
    low = [sim.add(text(i, 10), 2) for i in range(3)]
    high = [sim.add(text(10 + i, 10), 2, priority=1) for i in range(3)]
    sim.run()
    assert sim.admissions == [*high, *low]


def test_the_store_is_asked_where_nobody_has_more(anywhere):
    stored: dict[Job, int] = {}
    sim = Simulation(rules(fork_anywhere=anywhere), stored=stored)
    shared = text(0, 100)
    jobs = [sim.add(shared + text(i + 1, 5), 2) for i in range(6)]
    stored.update(dict.fromkeys(jobs, 96))
    sim.run()
    if anywhere:
        assert sim.loaded == 96  # once: the others take it from the first
        assert sim.computed == (100 - 96) + 6 * (5 + 1)
    else:
        assert sim.loaded <= 2 * 96
    assert len(sim.done) == 6


def mixtures(n_shared: int, n_own: int, **fields: object) -> tuple[int, Simulation]:
    """How many batches had both prompts and steps in them, of a run in which slots come free one by one."""
    sim = Simulation(rules(n_slots=16, n_cells=8000, max_tokens=4000, budget=256, **fields))
    for i in range(40):
        sim.add(text(0, n_shared) + text(i + 1, n_own), 5 + 3 * i)
    sim.run()
    return sim.n_mixed, sim


def test_prompts_by_themselves_where_rows_are_computed_in_tiles():
    """Those that generate pay for the cells of all in a tile: nothing is lost where those are common to them."""
    alone, sim = mixtures(0, 200, tiled=True)
    both, other = mixtures(0, 200)
    assert alone < both / 2
    assert sim.computed == other.computed
    assert mixtures(3000, 100, tiled=True)[0] > 0.9 * mixtures(3000, 100)[0] > 0
    assert mixtures(0, 3, tiled=True)[0] == mixtures(0, 3)[0] > 0  # too few rows for a tile


def test_steps_go_on_beside_prompts_without_end():
    """A prompt whose first token is its last leaves its slot at once, and another one comes."""
    sim = Simulation(rules(n_slots=4, n_cells=4000, max_tokens=4000, budget=256, tiled=True))
    slow = [sim.add(text(i, 600), 20) for i in range(2)]
    for i in range(400):
        sim.add(text(1000 + i, 100), 1)
        sim.step()
        if all(job in sim.done for job in slow):
            break
    assert all(job in sim.done for job in slow)
    sim.run()


@pytest.mark.parametrize(
    ("n_steps", "held", "n_prompts", "prompt", "rows_each", "n_used", "dear"),
    [
        (15, 216, 1, 200, 200, 4000, True),  # nothing is shared: 80 instead of 77 tokens a second
        (31, 420, 3, 420, 20, 4000, False),  # eight groups: 8.9 instead of 7.6 prompts a second
        (15, 816, 4, 800, 18, 1200, False),  # all begin alike
        (15, 216, 1, 40, 40, 4000, False),  # no tile
        (0, 0, 2, 200, 200, 400, False),
        (5, 100, 0, 0, 0, 500, False),
    ],
)
def test_what_goes_apart(n_steps, held, n_prompts, prompt, rows_each, n_used, dear):
    steps = [Job(np.zeros(held, np.int32), 9) for _ in range(n_steps)]
    prompts = [Job(np.zeros(prompt, np.int32), 9) for _ in range(n_prompts)]
    for job in steps:
        job.held = held
    for job in prompts:
        job.held = prompt - rows_each
    assert rows.tiles_are_dear(steps, prompts, 512, n_used) is dear


@pytest.mark.parametrize("seed", range(60))
def test_anything(seed, monkeypatch):
    """Random requests, memory, prefixes, coming at random moments, some of them given up: all invariants hold."""
    rng = random.Random(seed)
    monkeypatch.setattr(rows, "TILE", 2 << seed % 5)
    n_cells = rng.choice([60, 120, 400, None])
    most = 60 if n_cells is None else n_cells
    anywhere = rng.random() < 0.5
    given = rules(
        n_slots=rng.randint(1, 6),
        n_spare=rng.randint(0, 3),
        n_cells=n_cells,
        max_tokens=most,
        budget=rng.choice([8, 16, 64]),
        fork_anywhere=anywhere,
        min_share=rng.choice([1, 4, 16]),
        reserve=rng.choice([1, 8, 64]),
        patience=rng.choice([0, 3, 50]),
        grid=None if n_cells is not None else rng.choice([None, 8]),
        tiled=seed % 4 > 0,
    )
    stored: dict[Job, int] = {}
    sim = Simulation(given, stored=stored)
    roots = [text(1000 + i, rng.randint(1, 40)) for i in range(4)]
    jobs: list[Job] = []
    given_up: set[Job] = set()
    for _ in range(80):
        tokens = (rng.choice(roots)[: rng.randint(1, 40)] + text(rng.randrange(6), rng.randint(0, 30)))[: most - 1]
        job = sim.add(tokens, rng.randint(1, 30), priority=rng.choice([0, 0, 0, 1]), share=rng.random() < 0.9)
        if rng.random() < 0.3:
            stored[job] = rng.randint(0, len(tokens))
        jobs.append(job)
        while rng.random() < 0.2:
            jobs.append(sim.add(tokens, rng.randint(1, 9), twin_of=job if job.share else None, share=job.share))
        while rng.random() < 0.5 and not sim.scheduler.idle:
            sim.step()
        if rng.random() < 0.05:
            victim = rng.choice(jobs)
            if victim not in sim.done:
                for job in [victim, *(j for j in jobs if j.twin_of is victim and j not in sim.done)]:
                    given_up.add(job)
                    for action in sim.scheduler.finish(job):
                        sim.carry_out(action)
    sim.run()
    assert set(sim.done) | given_up == set(jobs)
    # admitted for the last time; who was given up never was
    assert overtaken(sim, [job for job in jobs if job not in given_up]) <= given.patience


@pytest.mark.parametrize("tiled", [False, True])
def test_nobody_starves_where_room_is_short(tiled, monkeypatch):
    """So little that admissions are taken back, of some that are alike and many that are not."""
    monkeypatch.setattr(rows, "TILE", 4)
    n_preemptions = n_gave_way = 0
    for seed in range(20):
        rng = random.Random(seed)
        given = rules(
            n_slots=rng.randint(6, 8),
            n_spare=rng.randint(0, 2),
            n_cells=(n_cells := rng.choice([60, 80])),
            max_tokens=n_cells,
            budget=8,
            fork_anywhere=rng.random() < 0.5,
            reserve=1,
            patience=rng.choice([0, 1, 3]),
            tiled=tiled,
        )
        sim = Simulation(given)
        root = text(1000, 12)
        jobs = []
        for i in range(100):
            alike = rng.random() < 0.3
            tokens = root + text(i, rng.randint(1, 6)) if alike else text(i + 5000, rng.randint(1, 20))
            jobs.append(sim.add(tokens, rng.randint(5, 30), priority=int(rng.random() < 0.1)))
            while len(sim.scheduler.waiting) > 12:
                sim.step()
        sim.run()
        assert overtaken(sim, jobs) <= given.patience, seed
        n_preemptions += sim.scheduler.n_preemptions
        n_gave_way += sum(job.gave_way for job in jobs)
    assert n_preemptions > 0
    assert n_gave_way > 0
