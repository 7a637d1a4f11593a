"""`python -m mlflow_soup` is the `mlflow-soup` command."""

from mlflow_soup.cli import main

if __name__ == "__main__":
    main()
