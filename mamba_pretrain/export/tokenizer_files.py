"""The tokenizer that belongs to a model: found beside it, described, and made readable for transformers.

transformers reads a `tokenizer.json` of the `tokenizers` library. For a SentencePiece model and for plain bytes one is
built here, and kept only if it gives the same ids as the original on a test text that holds every piece. What remains:
- As everywhere in transformers, the text of a special token becomes its id; load with split_special_tokens=True for
  the way this model was trained. The character U+2581 in a text is a space to it.
- A text such as "<0x41>", the name of a byte piece, may be cut in other places.
- Where two cuts of a unigram model have the same score, rounding decides, and SentencePiece adds in fp32, tokenizers in
  fp64. In 2 MB of Python source no line differed; of passages of 2,000 characters 26 in 981, in the order of two runs
  of spaces.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mamba_pretrain.data.tokenizer import BYTE_OF, SETTINGS
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.files import sha256_of

# The names `mamba_pretrain.data.tokenizer` gives its files, and the kinds it calls them. Where a directory holds
# several, the first is the original and the others were made from it.
KINDS = {"tokenizer.bytes": "bytes", "tokenizer.model": "sentencepiece", "tokenizer.json": "huggingface"}
SPECIAL_TOKENS = "special_tokens_map.json"
BYTES_END = "<|endoftext|>"
SPACE_MARK = "\u2581"
_AWKWARD = [
    "",
    " ",
    "  two  spaces ",
    "\ttabs\tand\nnew\r\nlines\n\n\n",
    "The quick brown fox jumps over 1,234,567.89 lazy dogs.",
    "def f(x):\n    return {'a': x ** 2}  # code\n",
    "a\x00b\x7f e\u0301 \ufb01 \uff21 zero\u200bwidth \u00a0no-break",
    # Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Chinese, Japanese, Korean, emoji
    *("".join(map(chr, range(start, start + 40))) for start in (0xA1, 0x391, 0x410, 0x5D0, 0x627, 0x904)),
    *("".join(map(chr, range(start, start + 40))) for start in (0x4E00, 0x3041, 0xAC00, 0x1F600)),
]


def find(directory: Path, facts: dict[str, Any] | None) -> tuple[Path | None, dict[str, Any] | None]:
    """The tokenizer's file and facts in a model's directory; None where there is none.

    `facts`, as in a checkpoint's manifest, hold as long as the file is the one they describe; otherwise, and without
    them, what is there is described anew. Facts without a file: those of the byte tokenizer, and the ids that begin and
    end a document where nothing else is known (kind None).
    """
    if facts and facts.get("kind") == "bytes" and not (directory / str(facts.get("file"))).is_file():
        return None, facts
    found = [directory / name for name in KINDS if (directory / name).is_file()]
    if not found:
        return None, facts if facts and facts.get("kind", "unknown") is None else None
    if facts and (its_own := next((path for path in found if facts.get("sha256") == sha256_of(path)), None)):
        return its_own, facts
    if facts and facts.get("sha256"):
        warnings.warn(
            f"{found[0]} is not the tokenizer that the model was trained with: its sha256 is "
            f"{sha256_of(found[0])[:12]}, the model's {str(facts['sha256'])[:12]}. It is taken as it is",
            stacklevel=3,
        )
    return found[0], _describe(found[0])


def copy(source: Path | None, target: Path) -> None:
    """Copies a tokenizer's file, and for a tokenizer.json the settings beside it, which name its special tokens."""
    if source is None:
        return
    (target / source.name).write_bytes(source.read_bytes())
    settings = source.with_name(SETTINGS)
    if KINDS.get(source.name) == "huggingface" and settings.is_file():
        (target / SETTINGS).write_bytes(settings.read_bytes())


def write_for_transformers(source: Path | None, facts: dict[str, Any] | None, target: Path) -> None:
    """Copies the tokenizer, and writes what AutoTokenizer.from_pretrained(target) needs to load it.

    Warns, and leaves the conversion out, where it is not proven to give identical ids.
    """
    copy(source, target)
    if facts is None or facts["kind"] is None:
        return
    kind, made = facts["kind"], None
    if kind == "bytes":
        made = _from_bytes()
    elif kind == "sentencepiece":
        assert source is not None, "only the byte tokenizer has no file"
        made = _from_sentencepiece(source)
        if made is None:
            warnings.warn(
                f"no tokenizer.json was written: a conversion of {source} gives other ids on the test text. The "
                f"exported directory holds {source.name}; encode with the sentencepiece library.",
                stacklevel=2,
            )
            return
    if made is not None:
        made.save(str(target / "tokenizer.json"))
    if not (target / SETTINGS).is_file():
        made = made or tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
        names = {"bos_token": facts.get("bos_id"), "eos_token": facts.get("eod_id"), "pad_token": facts.get("eod_id")}
        special = {name: made.id_to_token(i) for name, i in names.items() if i is not None}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
        (target / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        (target / SPECIAL_TOKENS).write_text(json.dumps(special, indent=2) + "\n")


def _describe(path: Path) -> dict[str, Any]:
    """Facts as a checkpoint's manifest has them, read from the file; ids it does not tell are None."""
    kind = KINDS[path.name]
    facts: dict[str, Any] = {"kind": kind, "file": path.name, "sha256": sha256_of(path), "bos_id": None, "eod_id": None}
    if kind == "bytes":
        return facts | {"vocab_size": 257, "bos_id": 256, "eod_id": 256}
    if kind == "sentencepiece":
        pieces = _load_sentencepiece(path)
        bos, eod = (i if i >= 0 else None for i in (pieces.bos_id(), pieces.eos_id()))
        return facts | {"vocab_size": pieces.get_piece_size(), "bos_id": eod if bos is None else bos, "eod_id": eod}
    try:
        vocab = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        settings = path.with_name(SETTINGS)
        named = json.loads(settings.read_bytes()) if settings.is_file() else {}
        tokens = [named.get(key) for key in ("bos_token", "eos_token")]
    except Exception as error:  # the tokenizers library raises bare Exception
        raise FormatError(path, [f"not a readable tokenizer: {error}"]) from error
    bos, eod = (vocab.get(str(t["content"] if isinstance(t, dict) else t)) for t in tokens)
    return facts | {
        "vocab_size": max(vocab.values(), default=-1) + 1,
        "bos_id": eod if bos is None else bos,
        "eod_id": eod,
    }


def _load_sentencepiece(path: Path) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise FormatError(path, ["not a SentencePiece model: it is damaged or of another kind"]) from error


def _from_bytes() -> tokenizers.Tokenizer:
    """GPT-2's byte alphabet without merges: id = byte. 256 ends a document."""
    made = tokenizers.Tokenizer(models.BPE(BYTE_OF, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([BYTES_END])
    return made


def _from_sentencepiece(path: Path) -> tokenizers.Tokenizer | None:
    """The model as a tokenizer of the `tokenizers` library; None where that gives other ids on the test text."""
    original = _load_sentencepiece(path)
    pieces = [original.id_to_piece(i) for i in range(original.get_piece_size())]
    unknown, prefixed = original.id_to_piece(original.unk_id()), original.normalize("a") != "a"
    has_bytes = any(map(original.is_byte, range(len(pieces))))
    # Pieces that text never matches, though it may read like their names.
    named = {i for i in range(len(pieces)) if original.is_control(i) or original.is_byte(i) or original.is_unknown(i)}
    scores = {i: original.get_score(i) for i in set(range(len(pieces))) - named}

    if all(score.is_integer() for score in scores.values()):  # BPE scores are ranks, unigram scores log-probabilities
        merges = _merges(pieces, scores)
        vocab = {piece: i for i, piece in enumerate(pieces)}
        made = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
        )
    else:
        scored = [(piece, scores.get(i, 0.0)) for i, piece in enumerate(pieces)]
        made = tokenizers.Tokenizer(models.Unigram(scored, unk_id=original.unk_id(), byte_fallback=has_bytes))
    prefix: list[Any] = [normalizers.Prepend(SPACE_MARK)] if prefixed else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE_MARK)])
    # Cut such names after their first character, since Unigram, unlike SentencePiece, would match them.
    names = [pieces[i] for i in named if not original.is_byte(i)]
    starts = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names] + ["<(?=0x[0-9A-F]{2}>)"] * has_bytes
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("|".join(starts)), "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    made.add_special_tokens([piece for i, piece in enumerate(pieces) if original.is_control(i)])

    texts = [*_AWKWARD, *_piece_texts([pieces[i] for i in scores])]
    same = all(made.encode(text, add_special_tokens=False).ids == original.encode(text) for text in texts)
    return made if same else None


def _merges(pieces: list[str], scores: dict[int, float]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces is a merge; the best-scored piece merges first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for i in sorted(scores, key=lambda i: -scores[i]):
        splits = [(pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i]))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges


def _piece_texts(pieces: list[str]) -> list[str]:
    """Every piece in random company, 20,000 or more in all: in lines of about fifty pieces, and as one text."""
    rng = random.Random(0)
    shuffled = [piece for _ in range(-(-20_000 // len(pieces))) for piece in rng.sample(pieces, len(pieces))]
    lines = ["".join(shuffled[i : i + 50]).replace(SPACE_MARK, " ") for i in range(0, len(shuffled), 50)]
    return [*lines, "".join(lines)]
