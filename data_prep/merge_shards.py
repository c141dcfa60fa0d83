"""Makes the dataset of what the tasks of a build have left."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from data_prep.build_shards import RUN_LOCK, merge_with_bar, place, summary
from data_prep.command import new_parser, run
from data_prep.merge import require_room
from data_prep.parts import finished
from data_prep.plan import PLAN, Plan, warn_of_changes, work_of
from data_prep.store import Store
from mamba_pretrain.data.shards import ShardError

DESCRIPTION = """\
Merge the parts that `build_shards --task I/N` has left in OUTPUT.work into the dataset OUTPUT, which is byte for byte
that of one machine, and remove them. Example:

    python -m data_prep.merge_shards data/pile
"""
SHOWN = 20  # missing parts that a message lists


def require_complete(store: Store, plan: Plan, parts: Sequence[int]) -> None:
    missing = [part for part in range(len(plan.parts)) if part not in set(parts)]
    if not missing:
        return
    counts = {int(found[1]) for name in store.names() if (found := re.fullmatch(r"task-\d+-of-(\d+)\.lock", name))}
    rows = [f"{len(missing)} of {len(plan.parts)} parts are missing in {store}:"]
    rows += [f"- {plan.name_of(part)}" for part in missing[:SHOWN]]
    rows += [f"- and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
    for count in sorted(counts):
        tasks = sorted({part % count for part in missing})
        rows.append(f"start these tasks again: --task {', '.join(f'{task}/{count}' for task in tasks)}")
    if not counts:
        rows.append("start build_shards again, with the same inputs and options")
    raise ShardError("\n".join(rows))


def parser() -> ArgumentParser:
    result = new_parser("data_prep.merge_shards", DESCRIPTION)
    result.add_argument("output", type=place, help="the --output of the tasks")
    result.add_argument("--overwrite", action="store_true", help="replace an existing output, once the new is complete")
    return result


def body(arguments: Namespace) -> int:
    store = work_of(arguments.output)
    require_room(arguments.output, arguments.overwrite)
    Plan.read(store)  # before a lock makes the directory
    with store.lock(RUN_LOCK):
        plan = Plan.read(store)
        warn_of_changes(store, plan)
        parts = finished(store, plan)
        require_complete(store, plan, list(parts))
        manifest = merge_with_bar(arguments.output, store, plan, parts, arguments.overwrite)
        store.remove_all(first=PLAN)
    print(summary(manifest))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
