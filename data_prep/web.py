"""Documents out of web archives: .warc and .wet, plain or compressed.

Of a WARC the pages are taken: responses with status 200 that are HTML, of which the main text is extracted, or plain
text. Of a WET the conversions are taken as they are. Requests, metadata, images, redirects are not documents.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Final

from data_prep.records import Document, Invalid, Reading, Record, Unit, too_long
from data_prep.streams import CorpusError, UnreadableError, open_bytes, optional

HTML: Final = ("text/html", "application/xhtml+xml")
PLAIN: Final = "text/plain"


def read_warc(unit: Unit, reading: Reading) -> Iterator[Record]:
    source, limit = unit.source, reading.max_record_bytes
    warc = optional("fastwarc.warc", source, "warc")
    number = 0
    try:
        with open_bytes(source) as stream:
            # Of every type, and HTTP not parsed yet, so that each record's length can be held against its header's.
            for record in warc.ArchiveIterator(stream, parse_http=False):
                promised = int(record.headers["Content-Length"])
                block = None if promised > limit else record.reader.read()
                found = record.reader.consume() if block is None else len(block)
                if found != promised:
                    raise EOFError(f"the next has {found:,} of {promised:,} bytes")
                number += 1
                made = _document(record, block, source, number, reading, warc)
                if made is not None:
                    yield made
    except (EOFError, zlib.error, KeyError, ValueError, OSError) as error:
        if isinstance(error, CorpusError) or (isinstance(error, OSError) and error.errno):
            raise
        raise UnreadableError(f"{source} is damaged after record {number} ({error}); get the file again") from error


def _document(record: Any, block: bytes | None, source: str, number: int, reading: Reading, warc: Any) -> Record | None:
    if record.record_type == warc.WarcRecordType.conversion:
        if block is None:
            return too_long(source, number, reading)
        try:
            return Document(block.decode(), source, number)
        except UnicodeDecodeError as error:
            return Invalid(f"byte {block[error.start]:#04x} is not UTF-8", source, number)
    if record.record_type != warc.WarcRecordType.response or not record.is_http:
        return None
    return too_long(source, number, reading) if block is None else _page(block, source, number, warc)


def _page(block: bytes, source: str, number: int, warc: Any) -> Record | None:
    extract = optional("resiliparse.extract.html2text", source, "warc")
    answer = warc.WarcRecord()
    answer.init_headers(warc.WarcRecordType.response)
    answer.set_bytes_content(block)
    answer.is_http = True
    answer.parse_http(auto_decode="all")
    kind = answer.http_content_type
    if answer.http_headers.status_code != 200 or kind not in (*HTML, PLAIN):
        return None
    body = answer.reader.read()
    text = _decoded(body, answer.http_charset, source)
    if kind in HTML:
        text = extract.extract_plain_text(text, main_content=True, alt_texts=False)
    return Document(text, source, number)


def _decoded(body: bytes, charset: str | None, source: str) -> str:
    """What a page is encoded in it says itself, or not, or wrongly: bytes that fit nothing become U+FFFD."""
    encodings = optional("resiliparse.parse.encoding", source, "warc")
    if charset is None:
        try:
            return body.decode("utf-8-sig")
        except UnicodeDecodeError:
            charset = encodings.detect_encoding(body, from_html_meta=True) or "utf-8"
    return str(encodings.bytes_to_str(body, charset, errors="replace"))
