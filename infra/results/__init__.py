"""What was measured. May import infra.filesystem and infra.settings; index.py is the only importer of duckdb.

Read rows.py first: the fields of its classes are the columns of the tables.
rows.py          the rows of runs, stages, metrics, checkpoints, pairs, layers, curves and nights; FORMAT
lineage.py       how checkpoints were made, as rows
store.py         ResultsStore: record a run or a night, read rows back
files.py         one parquet file per run or night, the only truth
older_formats.py what files of older formats lack
index.py         the DuckDB file over them, which can be deleted at any time
index_tables.py  its tables, and the SQL that fills them
views.sql        its views: leaderboard, pareto, history, lineage, ablations
published.sql    the figures of the papers, as a view
"""
