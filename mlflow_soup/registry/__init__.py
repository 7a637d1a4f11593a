"""MLflow: a patient client, runs, versions, promotions, and every name that we write there."""
