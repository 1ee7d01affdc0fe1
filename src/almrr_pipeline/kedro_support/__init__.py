"""Everything that knows Kedro and MLflow: configuration, hooks, datasets, the `kedro` command."""
