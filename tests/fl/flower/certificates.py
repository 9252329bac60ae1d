"""Certificates and keys that a test makes for itself, as a federation's operator would."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID


class Certificates:
    """An authority, the SuperLink's certificate for 127.0.0.1, and a key for each SuperNode.

    Attributes:
        ca, certificate, key: files in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.ca, self.certificate, self.key = (
            folder / name for name in ("ca.pem", "superlink.pem", "superlink.key")
        )
        authority = ec.generate_private_key(ec.SECP256R1())
        issuer = _name("the test's authority")
        own = _builder(issuer, issuer, authority)
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.ca.write_bytes(own.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
        key = ec.generate_private_key(ec.SECP256R1())
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        server = _builder(_name("the test's SuperLink"), issuer, key).add_extension(here, False)
        signed = server.sign(authority, hashes.SHA256())
        self.certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        self.key.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        )

    def node(self, name: str) -> tuple[Path, Path]:
        """A SuperNode's private and public key, as ``ssh-keygen -t ecdsa -b 384`` makes them."""
        private, public = self._folder / name, self._folder / f"{name}.pub"
        if not private.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            private.write_bytes(
                key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            )
            public.write_bytes(
                key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            )
        return private, public


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
