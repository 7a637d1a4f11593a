"""Write the descriptions of versions and registered models, and leave those of others alone."""

from mlflow_soup.files.signing import sha256_of
from mlflow_soup.records import Version
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_registered

# MLflow's limit of a description, on databases that enforce it
LIMIT = 5000


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

    Returns:
        Whether the description is ours.
    """
    found, text = find_registered(client, name), redact(description)[:LIMIT]
    if found is None:
        return False
    before, now = ([sha256_of(t)[:16]] if t else [] for t in (found.description, text))
    if not {*before} <= {*found.tags.get(naming.NOTE, "").split()}:
        return False
    with asking(f"describe {name}"):
        # the tag first, for both texts: a process may be killed before it writes the second
        client.set_registered_model_tag(name, naming.NOTE, " ".join(dict.fromkeys(before + now)))
        client.update_registered_model(name, text)
    return True
