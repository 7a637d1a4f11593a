"""MLflow: a patient client; runs, versions and promotions; every name that we write there."""
