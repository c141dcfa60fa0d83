"""All seven benchmarks, one after the other, each in a process of its own with its default options."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = ("scan", "loss", "train_step", "length", "decode", "distributed", "data")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="DIR", help="write NAME.json for each, and report.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed; all run all the same")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options, rest = parser.parse_known_args(argv)
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
    tables, codes = [], []
    for name in options.only:
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--check"] if options.check else []), *rest]
        if options.json:
            command += ["--json", str(options.json / f"{name}.json")]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        tables.append(done.stdout)
        codes.append(done.returncode)
    if options.json:
        (options.json / "report.md").write_text("\n".join(tables))
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
