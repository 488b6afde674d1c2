"""A child: damaged inputs, one after the other, until the count or the time is up. Its last words are JSON."""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.journal import Journal
from tests.fuzz.operations import Play
from tests.fuzz.world import SETTINGS, World, WrongError, apply, check_world, make_case

#: Inputs between two looks at the logits; successes between two decodes of what was accepted.
CHECK_EVERY = 60
DECODE_EVERY = 10


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--part", type=int, default=0, help="which part of the settings ...")
    parser.add_argument("--parts", type=int, default=1, help="... of how many")
    parser.add_argument("--inputs", type=int, default=0, help="damaged inputs for each setting")
    parser.add_argument("--operations", type=int, default=0, help="operations for each setting")
    parser.add_argument("--until", type=float, default=float("inf"), help="time.time() at which to stop")
    parser.add_argument("--journal", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("error")
    journal = Journal(options.journal)
    outcomes: collections.Counter[str] = collections.Counter()
    try:
        with tempfile.TemporaryDirectory(prefix="llamastate-fuzz-") as folder:
            for number, settings in enumerate(SETTINGS):
                if number % options.parts != options.part:
                    continue
                if time.time() > options.until:
                    break
                seed = f"{options.seed}/{number}"
                if options.inputs:
                    inputs(seed, World(settings, Path(folder)), options, journal, outcomes)
                if options.operations:
                    play = Play(seed, settings, Path(folder), journal)
                    outcomes.update(play.run(options.operations, options.until))
    except WrongError as error:
        note, _ = journal.read()
        print(json.dumps({"wrong": f"{note}: {error}", "trace": traceback.format_exc(), "outcomes": outcomes}))
        return 1
    print(json.dumps({"wrong": None, "outcomes": outcomes}))
    return 0


def inputs(
    seed: str, world: World, options: argparse.Namespace, journal: Journal, outcomes: collections.Counter[str]
) -> None:
    """Damaged states for one world."""
    donors = list(world.donors())
    accepted = 0
    for n in range(options.inputs):
        if n % 16 == 0 and time.time() > options.until:
            break
        case = make_case(random.Random(f"{seed}/{n}"), world, donors)
        journal.write(f"{world.settings} seed {seed}/{n}: {case.describe()}", case.data)
        outcome = apply(world, case, decode=accepted % DECODE_EVERY == 0)
        accepted += outcome == "accepted"
        outcomes[outcome] += 1
        if n % CHECK_EVERY == CHECK_EVERY - 1:
            check_world(world)
    check_world(world)
    world.close()


if __name__ == "__main__":
    sys.exit(main())
