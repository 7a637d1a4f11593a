"""Which stored scores count as evidence, and where they may lie.

Anybody may write runs into a store, with any tags. So a request believes only what lies where it
writes itself, in its experiment, or what a known key has signed. `--evidence` chooses:

    experiment   the runs of the request's experiment
    own          no run: everything is measured anew
    signed       the runs of any experiment whose files a public key of `--public-key` has signed

Tags and params find a run, and never decide: what a file holds is compared with what it must be.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from mlflow_soup.files import untrusted
from mlflow_soup.files.signing import (
    Signer,
    Verifier,
    open_signer,
    open_verifier,
    own_verifier,
    sha256_of,
)
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.tracking import fetch, find_runs, here
from mlflow_soup.request.spec import Spec

SIGNATURE = ".dsse.json"  # what the name of a file's signature adds to the file's name
# what reading a lost, damaged or malformed artifact or run raises
UNREADABLE = (MlflowException, *untrusted.UNREADABLE)


class Unbelieved(ValueError):
    """A file is not signed by a key that counts, or lies where its writers do not count."""


@dataclass(frozen=True)
class Trust:
    """Finds and reads what counts as evidence.

    Attributes:
        client: the store's client.
        mode: `experiment`, `own` or `signed`.
        experiment: the id of the experiment that the request writes to; empty if there is none yet.
        verifier: the keys that count, for `signed`.
    """

    client: Store
    mode: str
    experiment: str
    verifier: Verifier | None = None

    @property
    def hasty(self) -> "Trust":
        """The same without retries, for calls that may fail."""
        return replace(self, client=self.client.hasty)

    @property
    def stored(self) -> bool:
        """Whether anything that is stored counts."""
        return self.mode != "own"

    @property
    def to_sign(self) -> "Trust":
        """What counts for scores that this process will sign: only what its own key has signed.

        Otherwise its signature would vouch for scores that others wrote.
        """
        own = own_verifier()
        if own is None or not self.stored:
            return self
        return replace(self, mode="signed", verifier=own)

    def runs(self, tags: Mapping[str, str], *, finished: bool = True) -> list[Run]:
        """The runs with these tags that may hold evidence, oldest first."""
        if self.mode == "own":
            return []
        status = "FINISHED" if finished else ""
        where = None if self.mode == "signed" else [self.experiment]
        return find_runs(self.client, tags, status=status, experiments=where)

    def read(
        self, run_id: str, file: str, folder: Path, kind: str, about: Mapping[str, Any]
    ) -> Path:
        """Download a file of a run.

        Args:
            run_id: the run.
            file: the artifact.
            folder: where to put it.
            kind: what the file is, as in `Signer.sign`.
            about: what its signature must say that it is about.

        Raises:
            Unbelieved: the file does not count.
            MlflowException, OSError: the run has no such file.
            StoreError: the store is away.
        """
        if self.mode == "own":
            raise Unbelieved("only what is measured anew counts")
        if self.mode == "experiment":
            if self.client.experiment_of(run_id) != self.experiment:
                raise Unbelieved("the run is in another experiment")
            return fetch(self.client, run_id, file, folder)
        path = fetch(self.client, run_id, file, folder)
        signature = fetch(self.client, run_id, file + SIGNATURE, folder)
        envelope = untrusted.read_regular(signature, untrusted.LARGEST_JSON).decode()
        assert self.verifier is not None
        if not self.verifier.holds(envelope, kind, sha256_of(path), about):
            raise Unbelieved("no key that counts has signed it")
        return path


def trust_of(client: Store, spec: Spec, experiment: str | None = None) -> Trust:
    """What counts for a request.

    Args:
        client: the store's client.
        spec: the request.
        experiment: the id of the experiment that the request writes to; None to look it up.

    Raises:
        SpecError: a public key cannot be read.
    """
    verifier = open_verifier(spec.public_keys) if spec.believed == "signed" else None
    where = here(client, spec.experiment) if experiment is None else experiment
    return Trust(client, spec.believed, where, verifier)


def sign_file(
    client: Store, run_id: str, file: str, content: str | Path, kind: str, about: Mapping[str, Any]
) -> None:
    """Log the signature of an artifact beside it, if this process has a key.

    Args:
        client: the store's client.
        run_id: the run that holds the artifact.
        file: the artifact.
        content: its text, or where its bytes are.
        kind: what it is, as in `Signer.sign`.
        about: what it is about.
    """
    signer: Signer | None = open_signer()
    if signer is not None:
        envelope = signer.sign(kind, file, sha256_of(content), about)
        client.log_text(run_id, envelope, file + SIGNATURE)
