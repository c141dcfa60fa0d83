"""A corpus and a dataset at gs://, as a real server of that protocol on this machine holds them."""

from __future__ import annotations

import gzip
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server

from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.processes import free_port


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    address = f"http://127.0.0.1:{(port := free_port())}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    # gcsfs would ask over gRPC what kind of bucket this is: the server does not speak that, which takes half a minute.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        yield address


@pytest.mark.slow
def test_a_corpus_at_gs_becomes_the_dataset_of_local_files(server: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    jsonl = write_jsonl(corpus / "a.jsonl", make_documents(1500)).read_bytes()
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(jsonl))
    for path in corpus.iterdir():
        url = f"{server}/upload/storage/v1/b/bucket/o?uploadType=media&name=corpus/{path.name}"
        urllib.request.urlopen(urllib.request.Request(url, path.read_bytes())).close()

    def run(command: str) -> None:  # in processes of their own, so that no other test finds gcsfs imported
        ended = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr

    build = "data_prep.build_shards --tokenizer bytes --unit-bytes 100000"
    run(f"{build} {corpus} --output {tmp_path}/local")
    for task in ("1/2", "0/2"):
        run(f"{build} gs://bucket/corpus/*.jsonl* --output gs://bucket/data --task {task} --processes 2")
    run("data_prep.merge_shards gs://bucket/data")
    run(f"data_prep.fetch gs://bucket/data {tmp_path}/copy")
    local, copy = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("local", "copy"))
    assert b"gs://bucket/corpus/a.jsonl" in copy.pop("manifest.json")  # which names the inputs
    assert local.pop("manifest.json") and copy == local
