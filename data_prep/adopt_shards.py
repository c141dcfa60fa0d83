"""Makes a dataset of tokens that another program has written, without copying them."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from data_prep.build_shards import summary
from data_prep.command import available_cores, local_directory, new_parser, reading, run
from data_prep.foreign import Foreign, Link, find, link
from data_prep.plan import versions
from mamba_pretrain.data.manifest import SPLITS, Manifest, SourceInfo, SplitInfo, SplitRule, TokenizerInfo
from mamba_pretrain.data.scan import Scan, scan, undecodable
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from mamba_pretrain.files import atomic_directory

DESCRIPTION = """\
Use tokens made by Megatron-LM or GPT-NeoX (PREFIX.bin and .idx) or by datatrove (NAME.ds with .ds.index, or its
Megatron output) as they are. The dataset directory holds links to the token files, an index where there was none of
this format, the tokenizer, and a manifest with hashes and counts: training, evaluation, verify_shards and show_shards
work on it as on any other. The tokens are read once, to hash and check them. Example:

    python -m data_prep.adopt_shards --train /data/pile_text_document --tokenizer 20B_tokenizer.json --output data/pile
    python -m data_prep.show_shards data/pile --document 0

One prefix makes one split. Of a corpus in several files make a dataset each, and train on a mixture of them.
Neither format says which tokenizer made it: --tokenizer has to, and ids beyond its vocabulary, or documents that are no
UTF-8 text, are refused. Look at a document before training.
"""
SHOWN = 5  # problems in an error message


def adopt(
    sources: dict[str, Foreign],
    tokenizer: Tokenizer,
    output: Path,
    *,
    how: Link = "symbolic",
    adds_bos: bool | None = None,
    cut_documents: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> tuple[Manifest, list[str]]:
    """Makes the dataset `output`; returns its manifest and what its user should know. Raises ShardError.

    `adds_bos`: whether documents begin with the bos; None: found out. `cut_documents`: pieces of documents, which may
    begin and end inside a character, are what is expected.
    """
    with atomic_directory(output, error=ShardError, overwrite=overwrite) as scratch:
        try:
            manifest, notes = _adopt(scratch, sources, tokenizer, how, adds_bos, cut_documents, workers, command)
        except ShardError as error:
            raise ShardError(_as_given(str(error), sources, scratch)) from error
        tokenizer.save(scratch)
        manifest.write(scratch)
    return manifest, notes


def _adopt(
    scratch: Path,
    sources: dict[str, Foreign],
    tokenizer: Tokenizer,
    how: Link,
    adds_bos: bool | None,
    cut_documents: bool,
    workers: int,
    command: Sequence[str],
) -> tuple[Manifest, list[str]]:
    info = tokenizer.info
    shards = {split: link(source, scratch / split, how) for split, source in sources.items()}
    dtypes = {shard.dtype.name for shard in shards.values()}
    if len(dtypes) > 1:
        raise ShardError(f"the splits hold {' and '.join(sorted(dtypes))}: make a dataset of each")
    scans = _scan(shards, info, workers)
    no_text_of = {split: list(undecodable(shard, tokenizer)) for split, shard in shards.items()}
    not_text = [problem for problems in no_text_of.values() for problem in problems]
    if not_text and not cut_documents:
        raise ShardError(
            f"{len(not_text)} of the sampled documents are no text, the first: {not_text[0]}. Another tokenizer made "
            "them; or, if documents were cut in pieces (datatrove's shuffle_chunk_size), pass --cut-documents"
        )
    marks = [found.marks for found in scans.values()]
    documents, with_bos, with_eod = (
        sum(counts) for counts in zip(*((m.documents, m.with_bos, m.with_eod) for m in marks), strict=True)
    )
    begins_with_bos = _begin_with_bos(documents, with_bos, info, adds_bos)
    manifest = Manifest(
        tokenizer=info,
        dtype=dtypes.pop(),
        adds_bos=begins_with_bos,
        adds_eod=with_eod == documents,
        splits={
            split: SplitInfo(shard.n_documents, shard.n_tokens, None, None, scans[split].files, len(no_text_of[split]))
            for split, shard in shards.items()
        },
        split_rule=SplitRule(0, {}, "as they were when adopted"),
        sources=[SourceInfo(str(p), p.stat().st_size) for source in sources.values() for p in source.files],
        skipped_records=0,
        empty_documents=0,
        command=list(command),
        versions=versions(),
        origin=" and ".join(sorted({source.origin for source in sources.values()})),
    )
    notes = [f"the metadata of {s.tokens} names the tokenizer {s.tokenizer!r}" for s in sources.values() if s.tokenizer]
    notes.append(f"documents {'begin' if begins_with_bos else 'do not begin'} with the bos, id {info.bos_id}")
    if with_eod < documents:
        notes.append(
            f"warning: {documents - with_eod:,} of {documents:,} documents do not end with the eod, id {info.eod_id}: "
            "where none does, a model does not learn to end a text"
        )
    return manifest, notes


def _scan(shards: dict[str, Shard], info: TokenizerInfo, workers: int) -> dict[str, Scan]:
    total = sum(s.path.with_name(s.path.name + x).stat().st_size for s in shards.values() for x in (".bin", ".idx"))
    with reading(total, workers) as (pool, progress):
        scans = dict(zip(shards, pool.map(lambda shard: scan(shard, info, progress), shards.values()), strict=True))
    if problems := [problem for found in scans.values() for problem in found.problems]:
        more = f"\n- and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ShardError("\n- ".join(["these tokens cannot be used:", *problems[:SHOWN]]) + more)
    return scans


def _begin_with_bos(documents: int, with_bos: int, info: TokenizerInfo, given: bool | None) -> bool:
    if given is False or (given is None and with_bos == 0):
        return False
    if with_bos < documents:
        raise ShardError(
            f"{with_bos:,} of {documents:,} documents begin with the bos, id {info.bos_id}: pass --adds-bos no, and it "
            "is a token like any other"
        )
    return True


def _as_given(message: str, sources: dict[str, Foreign], scratch: Path) -> str:
    """The message with the user's files in place of the links to them."""
    for split, source in sources.items():
        idx = source.idx or source.ends or source.tokens
        for name, path in ((f"{split}.bin", source.tokens), (f"{split}.idx", idx), (split, source.tokens)):
            message = message.replace(str(scratch / name), str(path))
    return message


def parser() -> ArgumentParser:
    result = new_parser("data_prep.adopt_shards", DESCRIPTION)
    for split in SPLITS:
        result.add_argument(f"--{split}", type=local_directory, metavar="PREFIX", help=f"what becomes split {split}")
    result.add_argument(
        "--tokenizer",
        required=True,
        help="what made the tokens: `bytes`, a SentencePiece .model, a tokenizer.json, or a directory with one",
    )
    result.add_argument("--eod", help="special token that ends a document, where a tokenizer.json leaves it open")
    result.add_argument("--output", required=True, type=Path, help="dataset directory to make")
    result.add_argument(
        "--link",
        choices=("symbolic", "hard"),
        default="symbolic",
        help="symbolic (default), or hard: the tokens stay when the originals are removed, on the same file system",
    )
    result.add_argument(
        "--token-bytes", type=int, choices=(2, 4), help="of a .ds whose metadata do not say; it is never guessed"
    )
    result.add_argument(
        "--adds-bos",
        choices=("yes", "no"),
        help="whether documents begin with the bos (default: found out from all of them)",
    )
    result.add_argument(
        "--cut-documents", action="store_true", help="documents are pieces, which may begin inside a character"
    )
    result.add_argument(
        "--ignore-loss-mask", action="store_true", help="train on all tokens, whatever datatrove's .loss says"
    )
    result.add_argument(
        "--workers", type=int, default=available_cores(), metavar="N", help="splits read at a time (default: the cores)"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing output, once the new is complete")
    return result


def body(arguments: Namespace) -> int:
    prefixes: dict[str, Path] = {split: path for split in SPLITS if (path := getattr(arguments, split)) is not None}
    if not prefixes or arguments.workers < 1:
        raise ShardError("nothing to adopt: pass --train PREFIX, and --workers of 1 or more")
    sources = {
        split: find(prefix, arguments.token_bytes, ignore_loss_mask=arguments.ignore_loss_mask)
        for split, prefix in prefixes.items()
    }
    for path in (path for source in sources.values() for path in source.files):
        if path.resolve().is_relative_to(arguments.output.resolve()):
            raise ShardError(f"{arguments.output} holds {path}, which it would replace: choose another output")
    owner: dict[Path, str] = {}
    for split, source in sources.items():
        for path in (path.resolve() for path in source.files):
            if path in owner:
                raise ShardError(f"{path} is given as {owner[path]} and as {split}: a split of its own for each")
            owner[path] = split
    manifest, notes = adopt(
        sources,
        load_tokenizer(arguments.tokenizer, eod=arguments.eod),
        arguments.output,
        how=arguments.link,
        adds_bos=None if arguments.adds_bos is None else arguments.adds_bos == "yes",
        cut_documents=arguments.cut_documents,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        command=sys.argv,
    )
    print("\n".join([summary(manifest), *notes]))
    print(f"{arguments.output}: adopted, by {arguments.link} links")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
