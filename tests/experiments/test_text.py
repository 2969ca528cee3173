"""Natural language out of a package, and what a run on text reports."""

import gzip
import struct
import zlib

import pytest

from experiments import data
from experiments.data import corpora, prepare, sources

ENTRIES = b"Lark \\Lark\\, v. i.\n   To sport; to frolic.\n   [1913 Webster]\n\n" * 40


def dictzip(content, chunk=256):
    """A file of dictd as RFC 1952 and dictzip(1) lay it out: chunks that can be read alone, their sizes in the head."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [content[i : i + chunk] for i in range(0, len(content), chunk)]
    packed = [packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in parts]
    sizes = struct.pack(f"<3H{len(packed)}H", 1, chunk, len(packed), *map(len, packed))
    field = b"RA" + struct.pack("<H", len(sizes)) + sizes
    head = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", len(field)) + field
    return head + b"".join(packed) + packer.flush() + struct.pack("<II", zlib.crc32(content), len(content))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed dict-gcide."""
    folder = tmp_path / "dictd"
    folder.mkdir()
    (folder / "gcide.dict.dz").write_bytes(dictzip(ENTRIES))
    monkeypatch.setitem(sources.DEBIAN, "gcide", ("dict-gcide", folder))
    monkeypatch.setattr(sources, "_call", lambda *_: pytest.fail("a command was run"))
    return folder


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_dictionary_becomes_text_that_the_data_set_reads(by_hand, package, tmp_path, capsys):
    arguments = ["gcide", "--data_dir", str(tmp_path / "data")]
    if by_hand:
        moved = package.rename(tmp_path / "x")
        arguments += ["--manual_dir", str(moved)]
    assert prepare.main(arguments) == 0
    assert f"{tmp_path / 'data' / 'gcide.txt'}: {len(ENTRIES)} bytes." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["gcide.txt"]
    for data_dir in (tmp_path / "data" / "gcide.txt", tmp_path / "data"):
        dataset = data.load("text", "train", data_dir=data_dir, sequence=64)
        assert dataset.source.image.tobytes() == ENTRIES[: len(dataset) * 64]


def test_a_corpus_that_is_there_is_not_unpacked_again(package, tmp_path):
    (tmp_path / "gcide.txt").write_bytes(b"mine")
    assert corpora.prepare_text("gcide", data_dir=tmp_path).read_bytes() == b"mine"


@pytest.mark.parametrize(
    "spoil", [lambda x: x[:-100], lambda x: x[: len(x) // 2] + x[len(x) // 2 + 1 :], lambda x: b"no gzip"]
)
def test_a_package_that_is_not_whole_leaves_no_text(spoil, package, tmp_path, capsys):
    path = package / "gcide.dict.dz"
    path.write_bytes(spoil(path.read_bytes()))
    assert prepare.main(["gcide", "--data_dir", str(tmp_path / "data")]) == 1
    assert f"{path} must be a whole gzip file, got " in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []


def test_a_corpus_that_is_not_to_be_had_is_explained_with_the_commands_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.DEBIAN, "gcide", ("dict-gcide", tmp_path / "no"))
    monkeypatch.setattr(sources.shutil, "which", lambda _: None)
    assert prepare.main(["gcide", "--data_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'no'} does not exist.\n  apt-get is not on this machine." in said
    assert "apt-get download dict-gcide && dpkg-deb -x dict-gcide_*.deb x" in said
    assert f"python -m experiments.data.prepare gcide --data_dir {tmp_path} --manual_dir x/usr/share/dictd" in said


def test_what_only_data_sets_have_is_refused_for_a_corpus(package, tmp_path, capsys):
    assert prepare.main(["gcide", "--data_dir", str(tmp_path), "--num_shards", "2"]) == 1
    assert capsys.readouterr().err == "`--num_shards` must be left out for gcide, which is text, got 2.\n"
    with pytest.raises(ValueError, match="`name` must be one of gcide, got 'kjv'"):
        corpora.prepare_text("kjv", data_dir=tmp_path)


def test_dictzip_of_these_tests_is_gzip():
    assert gzip.decompress(dictzip(ENTRIES)) == ENTRIES
