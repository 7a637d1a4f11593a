"""Sign a folder of files, and check who signed it: OpenSSF Model Signing with elliptic-curve keys.

The signature is the file `model.sig` in the folder. It names every other file with its digest, so
that none can be changed, added or taken away. Anybody can check it without us:

    model_signing verify key --public_key pub.pem --signature FOLDER/model.sig FOLDER

The package model-signing is an extra, and takes a second to import.
"""

import base64
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlflow_soup.errors import MismatchError, SpecError
from mlflow_soup.files.signing import KEY_ENV, Signer, Verifier, name_of, open_signer
from mlflow_soup.files.untrusted import parse_json, read_regular
from mlflow_soup.weights.manifest import SIGNATURE, UNSIGNED

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)  # those of model-signing
_PEM = serialization.Encoding.PEM
_LARGEST = 64 << 20  # bytes of a signature; a file takes some 200


@dataclass(frozen=True)
class Checked:
    """What a check of a signature found.

    Attributes:
        key: the name of the key that made it; empty if none of those that count did.
        wrong: why it does not hold, in words; empty if it holds.
        digests: file → the digest that was signed, if it holds.
    """

    key: str = ""
    wrong: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


def check_library() -> None:
    """Refuse to sign or check without the package model-signing.

    Raises:
        SpecError: it is not installed.
    """
    try:
        import model_signing.signing  # noqa: F401
    except ImportError as error:
        raise SpecError(
            f"signatures need packages that are not installed: {error}",
            where=f"the signature {SIGNATURE} of a soup",
            fix="pip install 'model-signing>=1.1,<2' pyOpenSSL",  # the extra sign
        ) from error


def open_tree_signer() -> Signer:
    """The signer of this process, able to sign a folder.

    Raises:
        SpecError: MLFLOW_SOUP_KEY is not set, or holds no key that can sign a folder; or
            model-signing is not installed.
    """
    signer = open_signer()
    if signer is None:
        raise SpecError(
            "there is no key to sign with",
            where=f"the environment variable {KEY_ENV} is not set",
            fix=f"make an elliptic-curve key, and name its file: openssl ecparam -name prime256v1 "
            f"-genkey -noout -out gate.pem; export {KEY_ENV}=gate.pem",
        )
    if not isinstance(signer.key.curve, _CURVES):
        raise SpecError(
            f"the key is on the curve {signer.key.curve.name}, with which no folder can be signed",
            where=KEY_ENV,
            fix="use a key on P-256, P-384 or P-521: openssl ecparam -name prime256v1 -genkey "
            "-noout -out gate.pem",
        )
    check_library()
    return signer


def sign_tree(folder: Path, signer: Signer) -> bytes:
    """The signature of a folder's files, the content of its `model.sig`. Nothing is written there.

    Raises:
        MismatchError: the folder holds a link or a special file.
    """
    from model_signing import signing

    _refuse_odd(folder)
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = signer.key.private_bytes(_PEM, *plain)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / SIGNATURE
        with _piped(pem) as key:
            config = signing.Config().use_elliptic_key_signer(private_key=key, password=None)
        config.set_hashing_config(_hashing(folder)).sign(folder, made)
        return made.read_bytes()


def _hashing(folder: Path) -> Any:
    """Settings of model-signing that hash every file which a signature covers, and keep the result.

    A check hashes the files once it knows that the key made the signature.
    """
    from model_signing import hashing, manifest

    class Hashing(hashing.Config):
        found: dict[str, str] | None = None

        def hash(self, *args: Any, **kwargs: Any) -> manifest.Manifest:
            made = super().hash(*args, **kwargs)
            self.found = {r.identifier: r.digest.digest_hex for r in made.resource_descriptors()}
            return made

    unsigned = [folder / name for name in UNSIGNED]
    settings = Hashing()  # type: ignore[no-untyped-call]
    # by itself it would leave out git's files, and so let anybody add some
    return settings.set_ignored_paths(paths=unsigned, ignore_git_paths=False)


@contextlib.contextmanager
def _piped(content: bytes) -> Iterator[Path]:
    """A path that can be read once: a private key is not written to a disk.

    Args:
        content: fewer bytes than a pipe holds, 4096.
    """
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as file:
            file.write(content)
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)


def check_tree(folder: Path, verifier: Verifier, signature: bytes | None = None) -> Checked | None:
    """Check who signed a folder's files; None if nobody did.

    Args:
        folder: the folder.
        verifier: the keys that count.
        signature: the signature; that of the folder by default.

    Raises:
        SpecError: model-signing is not installed.
    """
    check_library()
    if signature is None:
        if not os.path.lexists(folder / SIGNATURE):
            return None
        try:
            signature = read_regular(folder / SIGNATURE, _LARGEST)
        except (OSError, ValueError) as error:
            return Checked(wrong=(f"{SIGNATURE} cannot be read: {error}",))
    try:
        statement = _statement(signature)
    except (ValueError, KeyError, TypeError) as error:
        return Checked(wrong=(f"{SIGNATURE} is no signature: {type(error).__name__} {error}",))
    try:
        _refuse_odd(folder)
    except MismatchError as error:
        return Checked(wrong=(error.what,))
    for key in verifier.keys:
        now, holds = _check(folder, key, signature)
        if now is not None:
            wrong = _differing(folder, now, _digests(statement))
            if not (holds or wrong):
                wrong = [f"{SIGNATURE} does not hold"]
            return Checked(name_of(key), tuple(wrong), {} if wrong else now)
    return Checked(wrong=(f"no key of --public-key made {SIGNATURE}",))


def _statement(signature: bytes) -> bytes:
    """What was signed, as JSON.

    Raises:
        ValueError, KeyError, TypeError: this is no signature.
    """
    bundle = parse_json(signature)
    # model-signing takes `dsse_envelope` for the same, and so could read another statement
    if unknown := set(bundle) - {"mediaType", "verificationMaterial", "dsseEnvelope"}:
        raise ValueError(f"it has a field {min(unknown)!r}")
    return base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)


def _check(
    folder: Path, key: ec.EllipticCurvePublicKey, signature: bytes
) -> tuple[dict[str, str] | None, bool]:
    """The files that a signature covers → their digests now, and whether it holds.

    None and False if another key made it.
    """
    from model_signing import verifying

    hashing = _hashing(folder)
    with tempfile.TemporaryDirectory() as temporary:
        made, public = Path(temporary) / SIGNATURE, Path(temporary) / "public.pem"
        made.write_bytes(signature)
        public.write_bytes(key.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=public)
            config.set_hashing_config(hashing).verify(folder, made)
        except OSError:
            raise
        except Exception:  # it says ValueError, and raises many: it reads what others wrote
            return hashing.found, False
    return hashing.found, True


def _differing(folder: Path, now: dict[str, str], then: Mapping[str, str]) -> list[str]:
    # what a signature itself leaves out is there, and not signed
    there = dict.fromkeys(_files(folder) - {*UNSIGNED}, "") | now
    return [
        f"{name} is {'missing' if name not in there else 'changed' if name in then else 'unsigned'}"
        for name in sorted({*there, *then})
        if there.get(name) != then.get(name)
    ]


def _digests(statement: bytes) -> dict[str, str]:
    """File → digest, of a statement whose signature holds; none for older kinds of statements."""
    try:
        resources = parse_json(statement)["predicate"]["resources"]
        return {str(resource["name"]): str(resource["digest"]) for resource in resources}
    except (ValueError, KeyError, TypeError):
        return {}


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def _refuse_odd(folder: Path) -> None:
    """Refuse links and special files, which a signature cannot cover."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise MismatchError(
                f"{path.relative_to(folder)} is not a plain file",
                where=str(path),
                fix="do not use this version: somebody put a link or a special file there",
            )
