"""Keys of a run: a certificate authority of its own, and a key and a certificate for each island."""

import datetime
import os
import pathlib
import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

from crossover_jax.islands.roster import OBSERVER, check_name

AUTHORITY = "ca"
YEARS = 10  # of the authority, whose certificate every island has
SKEW = datetime.timedelta(hours=1)  # by which the clock of another site may be late


class Signer(NamedTuple):
    """The run's authority: its certificate, and the key that makes other certificates."""

    certificate: Any
    key: Any


def make_keys(directory: str, names: Iterable[str], *, days: float = 90.0) -> dict[str, datetime.datetime]:
    """Make a key and a certificate for each island, and the run's authority if the directory has none.

    An island needs three files of the directory: ca.crt, NAME.crt and NAME.key. Who has ca.key can make new islands;
    it stays where it is. The first call makes a key for the observer too, who may look but not exchange. A name that
    has a key already gets a new one; the old one holds until it expires. Certificates hold for `days` from now.
    Returns when each of them expires. Raises `ValueError` for a name that no island can have, for a time that the
    authority does not last, and where the package `cryptography` is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     made = make_keys(directory, ["a", "b"])
    >>> sorted(made)
    ['a', 'b', 'observer']
    """
    names, folder = list(names), pathlib.Path(directory)
    for name in names:
        if name != OBSERVER:
            check_name(name)
        if name == AUTHORITY:
            raise ValueError(f"an island's name must not be {AUTHORITY!r}, which names the authority's own files.")
    if not 0 < days < 366 * YEARS:
        raise ValueError(f"`days` must be above 0 and less than {YEARS} years, got {days:g}.")
    _cryptography()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    signer = _signer(folder)
    if not (folder / f"{OBSERVER}.key").exists():
        names.append(OBSERVER)
    begins = _now()
    ends = begins + datetime.timedelta(days=days)
    last = signer.certificate.not_valid_after_utc
    if ends > last:
        raise ValueError(
            f"`days` must end before the authority of {folder} does, on {last:%Y-%m-%d}, got {days:g}: make keys in "
            "another directory, and give them to all islands."
        )
    for name in dict.fromkeys(names):
        _write(folder, name, *_issue(name, begins - SKEW, ends, signer))
    return dict.fromkeys(names, ends)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _cryptography() -> Any:
    try:
        from cryptography import x509
    except ImportError as error:
        raise ValueError(
            "making keys needs the package `cryptography`, which is missing: pip install 'crossover_jax[islands]'."
        ) from error
    return x509


def _signer(folder: pathlib.Path) -> Signer:
    """The authority that is there already, so that its islands trust those that come later; else a new one."""
    x509 = _cryptography()
    from cryptography.hazmat.primitives import serialization

    certificate, key = folder / f"{AUTHORITY}.crt", folder / f"{AUTHORITY}.key"
    if certificate.exists() != key.exists():
        there, missing = (certificate, key) if certificate.exists() else (key, certificate)
        raise ValueError(
            f"{folder} must have both of the authority's files or neither; it has {there.name} without {missing.name}: "
            "make keys where the run's first ones were made."
        )
    if key.exists():
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        return Signer(x509.load_pem_x509_certificate(certificate.read_bytes()), private)
    begins = _now()
    made = _issue(None, begins - SKEW, begins + datetime.timedelta(days=365 * YEARS), None)
    _write(folder, AUTHORITY, *made)
    return Signer(*made)


def _issue(name: str | None, begins: datetime.datetime, ends: datetime.datetime, signer: Signer | None) -> Signer:
    """A new key, and its certificate: an island's, or without `name` and `signer` an authority's."""
    x509 = _cryptography()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key, is_authority = ec.generate_private_key(ec.SECP256R1()), name is None
    # Two authorities of one name are told apart by their signatures only, and the error then says less.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name or f"islands, run {secrets.token_hex(4)}")])
    issuer, signing = (signer.certificate.subject, signer.key) if signer else (subject, key)
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)
    extensions: list[tuple[Any, bool]] = [
        # Python 3.13 verifies strictly: it refuses chains that lack one of these four.
        (x509.BasicConstraints(is_authority, 0 if is_authority else None), True),
        (_usage(x509, is_authority), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), False),
    ]
    if name is not None:
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        extensions += [(x509.ExtendedKeyUsage(both), False), (x509.SubjectAlternativeName([x509.DNSName(name)]), False)]
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, is_critical)
    return Signer(builder.sign(signing, hashes.SHA256()), key)


def _usage(x509: Any, is_authority: bool) -> Any:
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        decipher_only=False,
        **dict.fromkeys(others, False),
    )


def _write(folder: pathlib.Path, name: str, certificate: Any, key: Any) -> None:
    from cryptography.hazmat.primitives import serialization as form

    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    for suffix, content in (("key", private), ("crt", certificate.public_bytes(form.Encoding.PEM))):
        path = folder / f"{name}.{suffix}"
        new = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        new.replace(path)
