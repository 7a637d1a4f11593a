"""Write the descriptions of versions and registered models, and leave those of others alone."""

from mlflow_soup.files.signing import sha256_of
from mlflow_soup.records import Version
from mlflow_soup.redaction import redact
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_registered

# MLflow's limit of a description, on databases that enforce it
LIMIT = 5000
_SEAL, _DIGITS = "\n\n<!-- mlflow-soup {} -->", 16


def describe(client: Store, version: Version, description: str) -> None:
    """Replace a version's description."""
    with asking(f"describe {version}"):
        text = redact(description)[:LIMIT]
        client.update_model_version(version.name, str(version.number), text)


def description_of(client: Store, version: Version) -> str:
    """A version's description."""
    with asking(f"read the description of {version}"):
        return str(client.get_model_version(version.name, str(version.number)).description or "")


def describe_model(client: Store, name: str, description: str) -> bool:
    """Describe a registered model, unless somebody else has described it.

    Our text ends with its own digest, in a comment that MLflow's page does not show. So one call
    writes both, and whichever of several processes writes last leaves a description of ours.

    Returns:
        Whether the description is ours.
    """
    found = find_registered(client, name)
    if found is None or not _is_ours(found.description or ""):
        return False
    with asking(f"describe {name}"):
        client.update_registered_model(name, _sealed(redact(description)))
    return True


def _sealed(text: str) -> str:
    text = text[: LIMIT - len(_SEAL.format("")) - _DIGITS].rstrip()
    return text + _SEAL.format(sha256_of(text)[:_DIGITS])


def _is_ours(description: str) -> bool:
    """Whether nobody wrote a description, or we wrote it and nobody changed it."""
    text, _, _ = description.partition(_SEAL.partition("{")[0])
    return not description.strip() or description.strip() == _sealed(text)
