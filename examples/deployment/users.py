"""Make two users of MLflow's server: one who searches, one who decides what production is."""

import os
import secrets

from mlflow.server import get_app_client

TRAINING = "0"  # the experiment `Default`
# user → what they may do to what somebody else owns; they own what they make
GRANTS = {
    "searcher": (("experiment", TRAINING, "EDIT"),),
    "promoter": (("experiment", TRAINING, "READ"), ("registered_model", "my-llm", "READ")),
}

admin = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
for user, grants in GRANTS.items():
    password = secrets.token_urlsafe(16)
    admin.create_user(user, password)
    for grant in grants:
        admin.grant_user_permission(user, *grant)
    print(user, password)
