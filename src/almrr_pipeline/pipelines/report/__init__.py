"""All categories and seeds side by side: a table, a page, and runs in MLflow that can be compared."""
