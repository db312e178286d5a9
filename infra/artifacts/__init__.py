"""The artifact store. May import infra.filesystem, and of infra.models the name of the file that trusts code.

Read store.py first.
manifest.py       ArtifactRef and Manifest: what an artifact is, and which files it has
store.py          ArtifactStore: writing, reading and locking of artifacts
claims.py         what running processes count on, so that nobody clears it away
inventory.py      what lies in a store, and what of it is broken or belongs to nothing
garbage.py        `slimline gc`
bundle_writer.py  `slimline export`: a run with its artifacts as one tar
bundle_reader.py  `slimline import`: checked, copied, and visible only as a whole
"""
