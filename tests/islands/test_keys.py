"""Keys of a run, against Python's own strict verification."""

import contextlib
import datetime
import os
import re
import ssl
import stat
import sys

import pytest

from crossover_jax.__main__ import main
from crossover_jax.islands import keys
from crossover_jax.islands.transport import Tls


def contexts(directory, server, client):
    """As an island's, and as strict as `ssl.create_default_context` is from Python 3.13 on."""
    found = [Tls.of(str(directory), server).context(server=True), Tls.of(str(directory), client).context(server=False)]
    for context in found:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    return found


def handshake(server, client, name):
    """Shake hands in memory; the names that the server and the client see in each other's certificates."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=name),
    ]
    for _ in range(4):
        for end in reversed(ends):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return [end.getpeercert()["subjectAltName"] for end in ends]


def test_islands_of_a_run_accept_each_other(tmp_path):
    keys.make_keys(str(tmp_path), ["a", "b"])
    assert handshake(*contexts(tmp_path, "a", "b"), "a") == [(("DNS", "b"),), (("DNS", "a"),)]
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(*contexts(tmp_path, "a", "b"), "b")


def test_later_islands_get_keys_of_the_same_authority(tmp_path):
    keys.make_keys(str(tmp_path), ["a"])
    authority = (tmp_path / "ca.crt").read_bytes()
    others = (tmp_path / "a.key").read_bytes(), (tmp_path / "observer.key").read_bytes()
    assert set(keys.make_keys(str(tmp_path), ["late"])) == {"late"}
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert ((tmp_path / "a.key").read_bytes(), (tmp_path / "observer.key").read_bytes()) == others
    assert handshake(*contexts(tmp_path, "a", "late"), "a")


def test_another_run_is_not_trusted(tmp_path):
    for run in ("one", "other"):
        keys.make_keys(str(tmp_path / run), ["a"])
    server, _ = contexts(tmp_path / "one", "a", "a")
    _, client = contexts(tmp_path / "other", "a", "a")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|local issuer"):
        handshake(server, client, "a")


def test_a_running_island_reads_a_renewed_certificate(tmp_path, monkeypatch):
    now = keys._now()
    monkeypatch.setattr(keys, "_now", lambda: now - datetime.timedelta(days=100))
    keys.make_keys(str(tmp_path), ["a", "b"])
    server, client = (Tls.of(str(tmp_path), name) for name in "ab")
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(server.context(server=True), client.context(server=False), "a")
    monkeypatch.setattr(keys, "_now", lambda: now)
    keys.make_keys(str(tmp_path), ["a", "b"])
    assert handshake(server.context(server=True), client.context(server=False), "a")


def test_files_are_for_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        keys.make_keys(str(tmp_path / "keys"), ["a"])
        keys.make_keys(str(tmp_path / "keys"), ["a"])  # again: new files in place of the old ones
    finally:
        os.umask(before)
    files = sorted((tmp_path / "keys").iterdir())
    assert [file.name for file in files] == ["a.crt", "a.key", "ca.crt", "ca.key", "observer.crt", "observer.key"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_certificates_hold_as_long_as_asked_for(tmp_path):
    from cryptography import x509

    begins = datetime.datetime.now(datetime.UTC)
    ends = keys.make_keys(str(tmp_path), ["a"], days=2.0)["a"]
    assert abs(ends - begins - datetime.timedelta(days=2)) < datetime.timedelta(minutes=1)
    said = x509.load_pem_x509_certificate((tmp_path / "a.crt").read_bytes()).not_valid_after_utc
    assert abs(said - ends) < datetime.timedelta(seconds=2)


def test_the_command_makes_keys(tmp_path, capsys):
    assert main(["islands", "keys", str(tmp_path), "a", "b", "--days", "7"]) == 0
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=7)
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["a", "b", "observer"]
    assert shown.count(f"{until:%Y-%m-%d}") == 3
    assert "ca.crt, b.crt, b.key" in shown


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (["a_b"], r"an island's name must be 1 to 63 lower-case .* got 'a_b'\."),
        (["ca"], r"an island's name must not be 'ca', which names the authority's own files\."),
        (["a", "--days", "0"], r"`days` must be above 0 and less than 10 years, got 0\."),
        (["a", "--days", "3655"], r"`days` must end before the authority of .* does, on .*, got 3655: make keys in"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, capsys, asked, error):
    assert main(["islands", "keys", str(tmp_path), *asked]) == 2
    assert re.match(error, capsys.readouterr().err)


def test_an_authority_without_its_key_is_not_replaced(tmp_path):
    keys.make_keys(str(tmp_path), ["a"])
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ValueError, match=r"it has ca\.crt without ca\.key: make keys where the run's first ones"):
        keys.make_keys(str(tmp_path), ["b"])


def test_without_cryptography_one_sentence_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert main(["islands", "keys", str(tmp_path), "a"]) == 2
    assert "pip install 'crossover_jax[islands]'" in capsys.readouterr().err


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    keys.make_keys(str(tmp_path), ["a"])
    with pytest.raises(ValueError, match=r"needs the file .*b\.crt, which is missing: .* islands keys .* b`\."):
        Tls.of(str(tmp_path), "b")
