"""Sign what we write, and check who signed what we read: DSSE envelopes around in-toto statements.

An envelope is one JSON text (Dead Simple Signing Envelope 1.0). Its statement names a text or a
file by its SHA-256, and says what it is about, so that nobody can pass the scores of one model off
as those of another. Keys are elliptic-curve keys in PEM files; `cryptography` signs and verifies.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlflow_soup.errors import SpecError
from mlflow_soup.files.untrusted import UNREADABLE, open_regular, parse_json

KEY_ENV = "MLFLOW_SOUP_KEY"
_STATEMENT = "https://in-toto.io/Statement/v1"
_TYPE = "application/vnd.in-toto+json"
_ALGORITHM = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class Signer:
    """Signs with a private key.

    Attributes:
        key: the private key.
        name: SHA-256 of the public key; readers find the key by it.
    """

    key: ec.EllipticCurvePrivateKey
    name: str

    def sign(self, kind: str, subject: str, sha256: str, about: Mapping[str, Any]) -> str:
        """The envelope of a statement.

        Args:
            kind: what the subject is: `scores`, `examination`, `verdict` or `entry`.
            subject: its name.
            sha256: the digest of its bytes.
            about: what it is about.
        """
        statement = {
            "_type": _STATEMENT,
            "subject": [{"name": subject, "digest": {"sha256": sha256}}],
            "predicateType": _predicate(kind),
            "predicate": dict(about),
        }
        payload = json.dumps(statement, sort_keys=True).encode()
        signature = self.key.sign(_encoded(payload), _ALGORITHM)
        envelope = {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _TYPE,
            "signatures": [{"keyid": self.name, "sig": base64.b64encode(signature).decode()}],
        }
        return json.dumps(envelope)


@dataclass(frozen=True)
class Verifier:
    """Believes what one of several public keys has signed."""

    keys: tuple[ec.EllipticCurvePublicKey, ...]

    def holds(self, envelope: str, kind: str, sha256: str, about: Mapping[str, Any]) -> bool:
        """Whether one of the keys signed this statement about these bytes.

        Args:
            envelope: what `Signer.sign` returned; any other text does not hold.
            kind: as for `Signer.sign`.
            sha256: the digest of the bytes that were read.
            about: what they must be about; the statement may say more.
        """
        try:
            content = parse_json(envelope.encode())
            payload = base64.b64decode(content["payload"], validate=True)
            signatures = [base64.b64decode(s["sig"], validate=True) for s in content["signatures"]]
            if content["payloadType"] != _TYPE or not self._signed(payload, signatures):
                return False
            statement = parse_json(payload)
            said = statement["predicate"]
            return bool(
                statement["predicateType"] == _predicate(kind)
                and statement["subject"][0]["digest"]["sha256"] == sha256
                and all(said.get(key) == value for key, value in about.items())
            )
        except UNREADABLE:
            return False

    def _signed(self, payload: bytes, signatures: Sequence[bytes]) -> bool:
        for key in self.keys:
            for signature in signatures:
                try:
                    key.verify(signature, _encoded(payload), _ALGORITHM)
                except InvalidSignature:
                    continue
                return True
        return False


def _predicate(kind: str) -> str:
    return f"urn:mlflow-soup:{kind}:v1"


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, which is what a key signs."""
    return b"DSSEv1 %d %s %d %s" % (len(_TYPE), _TYPE.encode(), len(payload), payload)


def sha256_of(content: str | Path) -> str:
    """The SHA-256 of a text, or of the bytes of a regular file.

    Raises:
        ValueError, OSError: as `open_regular`.
    """
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    with open_regular(content) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_signer() -> Signer | None:
    """The signer of this process; None if MLFLOW_SOUP_KEY is not set.

    The variable holds the name of a PEM file, or the PEM text itself.

    Raises:
        SpecError: it holds no unencrypted elliptic-curve key.
    """
    said = os.environ.get(KEY_ENV, "").strip()
    if not said:
        return None
    inline = said.startswith("-----BEGIN")
    where = KEY_ENV if inline else f"the file {said}, which {KEY_ENV} names"
    try:
        content = said.encode() if inline else Path(said).read_bytes()
        key = serialization.load_pem_private_key(content, password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key("no private key can be read", where, _PRIVATE, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no_key(f"the key is a {type(key).__name__.lstrip('_')}", where, _PRIVATE)
    return Signer(key, name_of(key.public_key()))


def own_verifier() -> Verifier | None:
    """The verifier of what this process itself signs; None if MLFLOW_SOUP_KEY is not set.

    Raises:
        SpecError: as `open_signer`.
    """
    signer = open_signer()
    return None if signer is None else Verifier((signer.key.public_key(),))


def open_verifier(files: Sequence[Path]) -> Verifier:
    """The verifier of some PEM files with public keys.

    Raises:
        SpecError: a file holds no elliptic-curve public key.
    """
    keys = []
    for file in files:
        where = f"--public-key {file}"
        try:
            key = serialization.load_pem_public_key(file.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise _no_key("no public key can be read", where, _PUBLIC, error) from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise _no_key(f"the key is a {type(key).__name__.lstrip('_')}", where, _PUBLIC)
        keys.append(key)
    return Verifier(tuple(keys))


def name_of(key: ec.EllipticCurvePublicKey) -> str:
    """The SHA-256 of a public key, by which signatures name it."""
    encoding = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*encoding)).hexdigest()


_PRIVATE = (
    "give the private part of an elliptic-curve key, in PEM, without a password; a new one: "
    "openssl ecparam -name prime256v1 -genkey -noout -out new.pem"
)
_PUBLIC = (
    "give the public part of an elliptic-curve key, in PEM: "
    "openssl ec -in gate.pem -pubout -out gate.pub.pem"
)


def _no_key(what: str, where: str, fix: str, error: Exception | None = None) -> SpecError:
    why = ""
    if isinstance(error, OSError):
        why = f": {error.strerror}"
    elif error is not None:  # an error of the library may quote the key
        why = f": it is not in PEM, has a password, or is of another kind ({type(error).__name__})"
    return SpecError(f"{what}{why}", where=where, fix=fix)
