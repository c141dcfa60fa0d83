"""What every command of this package does alike: report a user's error as one message, without a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data_prep.streams import CorpusError
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import TokenizerError
from mamba_pretrain.files import DISK_FULL


def new_parser(module: str, description: str) -> ArgumentParser:
    """A parser whose --help keeps the line breaks of `description`."""
    return ArgumentParser(f"python -m {module}", description=description, formatter_class=RawDescriptionHelpFormatter)


def available_cores() -> int:
    """The cores this process may use, which in a container or a Slurm job are fewer than the machine's."""
    return len(os.sched_getaffinity(0))


def local_directory(name: str) -> Path:
    """An argument that names a dataset. Raises ArgumentTypeError for a URL, which Path would take for a name."""
    if "://" in name:
        raise ArgumentTypeError(f"{name} is a URL: copy the dataset to a disk of this machine first")
    return Path(name)


@contextlib.contextmanager
def reading(total: int, workers: int) -> Iterator[tuple[ThreadPoolExecutor, Callable[[int], None]]]:
    """Threads to read `total` bytes with, and what they call after each block: it shows progress.

    Ctrl-C, or an error in the block, ends every thread at its next call: one may have a terabyte before it.
    """
    lock, ended = threading.Lock(), threading.Event()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar, ThreadPoolExecutor(workers) as pool:

        def progress(read: int) -> None:
            if ended.is_set():
                raise KeyboardInterrupt
            with lock:
                bar.update(read)

        try:
            yield pool, progress
        except BaseException:
            ended.set()
            pool.shutdown(cancel_futures=True)
            raise


def run(parser: ArgumentParser, body: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    """The exit code of body(parsed arguments): 2 after a user's error, 130 after Ctrl-C.

    SIGTERM and SIGHUP, unless ignored (nohup), unwind the stack like Ctrl-C, so that no scratch directory stays.
    """
    arguments = parser.parse_args(argv)
    ending = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, _exit)
    try:
        return body(arguments)
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CorpusError, ShardError, TokenizerError, OSError) as error:
        cure = ""
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            cure = ": make room where the output goes, or choose another place, and start the same command again"
        print(f"{parser.prog}: error: {error}{cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: interrupted, {str(error) or 'nothing was written'}", file=sys.stderr)
        return 130
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)
