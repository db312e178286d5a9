"""The world outside the mathematics: settings, keys, artifact store, data sources, DuckDB results, MLflow tracking."""
