"""What datatrove's pipelines need of us: a reader over our corpora, words without a language model, filters by name,
and processes that may be killed.

Imported by `data_prep.clean` alone, once it is known that datatrove is there.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Final

from datatrove.data import Document as Record
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from tqdm import tqdm

from data_prep import pool
from data_prep.corpus import SHOWN, Corpus
from data_prep.plan import name_of
from data_prep.records import Unit
from data_prep.streams import CorpusError

WORD: Final = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]+")


class Share(Corpus):
    """The documents of some units of a corpus."""

    def __init__(self, whole: Corpus, units: list[Unit]) -> None:
        self.__dict__.update(whole.__dict__)
        self._share = units

    def units(self, unit_bytes: int = 0) -> list[Unit]:
        return self._share


class CorpusReader(PipelineStep):  # type: ignore[misc]
    """The first step of a pipeline: task `rank` reads its share of the corpus, whatever its format.

    A document's id is where it comes from, `source:line` (the line within the byte range, in a file read by ranges).
    """

    type = "READER"
    name = "corpus"

    def __init__(self, corpus: Corpus, units: list[Unit]) -> None:
        super().__init__()
        self.corpus, self.units = corpus, units

    def share(self, rank: int, world_size: int) -> list[Unit]:
        n = len(self.units)
        return self.units[n * rank // world_size : n * (rank + 1) // world_size]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()
        share = Share(self.corpus, self.share(rank, world_size))
        for document in share:
            self.stat_update("documents")
            self.stat_update("bytes", value=len(document.text.encode()))
            yield Record(text=document.text, id=f"{document.source}:{document.line}")
        self.stat_update("invalid", value=share.skipped)
        self.stat_update("empty", value=share.empty)
        for reason in share.left_out:
            self.stat_update(f"left out, it could not be read: {reason}")


class Words(WhitespaceTokenizer):  # type: ignore[misc]
    """Words, numbers and runs of signs by a regular expression, sentences by datatrove's: no package, no model.

    datatrove's own choice for English takes spaCy. For languages without spaces between words this is the wrong one.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)


WORDS: Final = Words()
FILTERS: Final[dict[str, Callable[[Any], Any]]] = {
    "gopher-repetition": lambda removed: GopherRepetitionFilter(exclusion_writer=removed, language=WORDS),
    "gopher-quality": lambda removed: GopherQualityFilter(exclusion_writer=removed, language=WORDS),
    "c4-quality": lambda removed: C4QualityFilter(exclusion_writer=removed, language=WORDS),
    "c4-fineweb": lambda removed: C4QualityFilter(
        exclusion_writer=removed, filter_no_terminal_punct=False, language=WORDS
    ),
    "c4-paragraphs": lambda removed: C4ParagraphFilter(exclusion_writer=removed),
    "fineweb-quality": lambda removed: FineWebQualityFilter(exclusion_writer=removed, language=WORDS),
}


def filter_steps(reader: CorpusReader, names: list[str], removed: str, output: str) -> list[Any]:
    """Reads, filters in this order, writes what is left to `output` and what is not to `removed`/FILTER."""
    filters = [FILTERS[name](JsonlWriter(f"{removed}/{name}")) for name in names]
    return [reader, *filters, JsonlWriter(output)]


def minhash_stages(
    documents: str, scratch: str, removed: str, output: str, *, tasks: int, ngram: int, buckets: int, hashes: int
) -> dict[str, tuple[int, list[Any]]]:
    """datatrove's four stages, in order: name -> (tasks, steps). One document of each cluster stays."""
    # SHA-1, since what datatrove calls of xxhash, its default, takes text no more as of xxhash 4.
    hashing = HashConfig(precision=64, hash_fc="sha1")
    config = MinhashConfig(n_grams=ngram, num_buckets=buckets, hashes_per_bucket=hashes, hash_config=hashing)
    signatures, matches, clusters = (f"{scratch}/{name}" for name in ("signatures", "matches", "clusters"))
    return {
        "minhash-signatures": (
            tasks,
            [
                JsonlReader(documents, add_file_path=False),
                MinhashDedupSignature(signatures, config=config, language=WORDS),
            ],
        ),
        "minhash-matches": (buckets, [MinhashDedupBuckets(signatures, matches, config=config)]),
        "minhash-clusters": (1, [MinhashDedupCluster(matches, clusters, config=config)]),
        "minhash": (
            tasks,
            [
                JsonlReader(documents, add_file_path=False),
                MinhashDedupFilter(clusters, exclusion_writer=JsonlWriter(f"{removed}/minhash")),
                JsonlWriter(output),
            ],
        ),
    }


def run_stage(pipeline: list[Any], tasks: int, workers: int, logs: Path) -> None:
    """Does those of a stage's tasks that are not complete; with one worker, in this process. `logs` ends in its name.

    Raises the first CorpusError or OSError of a task at once; where workers died, CorpusError after all other tasks.

    datatrove's own `run` waits forever for the result of a worker that was killed. Also, it forks a process that
    outlives a kill of this one, and holds the lock of the work directory then.
    """
    name, again = logs.name, "complete tasks are kept: start the same command again, and it does the others alone"
    again += f", with fewer --workers than {workers} if memory was short"
    executor = LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=str(logs))
    executor.save_executor_as_json()
    ranks = deque(executor.get_incomplete_ranks())
    complete, died = tasks - len(ranks), dict[int, str]()
    ended: Generator[tuple[Any, Any]]
    if workers == 1:
        ended = ((rank, _attempt(executor, rank)) for rank in ranks)
    else:
        ended = pool.run(ranks, min(workers, len(ranks)), _worker, (executor,), lambda *_: None)
    try:
        with contextlib.closing(ended):
            for rank, result in ended:
                if isinstance(result, pool.Failure):
                    died[rank] = f"{_name_of(rank, executor)}: {result.reason}"
                    logger.error(f"{died[rank]}. The other tasks go on")
                elif result is not None:
                    raise result
                else:
                    complete += 1
                    logger.info(f"{complete}/{tasks} tasks completed.")
    except pool.WorkerError as error:
        raise CorpusError(_failures(died, tasks, name, f"the stage {name}: {error}; {again}")) from error
    if died:
        raise CorpusError(_failures(died, tasks, name, again))


def _failures(died: dict[int, str], tasks: int, stage: str, end: str) -> str:
    if not died:
        return end
    shown = [f"- {died[rank]}" for rank in sorted(died)[:SHOWN]]
    shown += [f"- and {len(died) - SHOWN} more"] if len(died) > SHOWN else []
    return "\n".join([f"{len(died)} of the {tasks} tasks of the stage {stage} failed:", *shown, end])


def _worker(executor: LocalPipelineExecutor) -> pool.Work:
    tqdm.set_lock(threading.RLock())  # by itself it makes a semaphore, which a worker that is told to end leaves behind
    return partial(_attempt, executor)


def _attempt(executor: LocalPipelineExecutor, rank: int, _: object = None) -> CorpusError | OSError | None:
    """Runs a task, and returns what it raised: it may be another process that is to raise it."""
    # Of the plain types, since some libraries' errors do not survive the way to another process.
    try:
        # A copy, since its steps count what they see. Local rank 0, one task in so many, prints its log to the console.
        deepcopy(executor)._run_for_rank(rank, local_rank=rank % executor.workers)
    except CorpusError as error:
        return CorpusError(str(error))
    except OSError as error:
        plain = error.errno is None or error.strerror is None
        return OSError(str(error)) if plain else OSError(error.errno, error.strerror, error.filename)
    except Exception as error:  # whatever datatrove's steps, and the libraries below them, raise
        logs = Path(executor.logging_dir.path)
        return CorpusError(f"the stage {logs.name} failed: {error!r}; {logs / 'logs'} has each task's own words")
    return None


def _name_of(rank: int, executor: LocalPipelineExecutor) -> str:
    name, reader = f"task {rank}", executor.pipeline[0]
    if not isinstance(reader, CorpusReader):  # it reads what an earlier stage wrote
        return name
    units = reader.share(rank, executor.tasks)
    more = f" and {len(units) - 1} more" if len(units) > 1 else ""
    return f"{name} ({name_of(units[0])}{more})"
