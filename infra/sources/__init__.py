"""Finding models and data sets, and reading texts. May import infra.offline,
infra.overlap and infra.hub.

Read find.py first. datasets.py is the only importer of `datasets`, and imported late, since that takes seconds.
find.py          Sources: local paths, mirrors, the offline default, the hub; TextData
located.py       Located: what was found, and its identity in a cache key
fingerprints.py  the content hash of a folder, remembered by file
safe_names.py    names that stay inside the data set they are said to belong to
datasets.py      rows of a located data set, and the errors of `datasets` in one sentence
data_files.py    the same file by file, where `datasets` says too little
text_columns.py  the texts of some columns, read or looked at early
excerpts.py      a seeded sample of texts from the beginnings of files
shared_rows.py   whether two parts of a run read the same rows, or the same words
file_kinds.py    endings of data files, and what a single file can be asked for
"""
