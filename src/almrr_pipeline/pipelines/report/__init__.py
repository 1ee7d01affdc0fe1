"""All categories and seeds side by side: a table, a page, and comparable runs in MLflow."""
