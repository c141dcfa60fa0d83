"""What datatrove's pipelines need of us: a reader over our corpora, words without a language model, filters by name.

Imported by `data_prep.clean` alone, once it is known that datatrove is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from datatrove.data import Document as Record
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
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from data_prep.corpus import Corpus
from data_prep.records import Unit

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

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()
        n = len(self.units)
        share = Share(self.corpus, self.units[n * rank // world_size : n * (rank + 1) // world_size])
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
