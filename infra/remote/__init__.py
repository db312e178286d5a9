"""The object store that several machines share (SLIMLINE_REMOTE). May import infra.artifacts and infra.filesystem.

Read store.py first. fsspec is imported only where there is an object store.
store.py  RemoteStore: fetch, share and lock artifacts; a failure costs a warning, never a stage
files.py  RemoteFiles: a folder of any fsspec file system, with files created only where there is none
locks.py  a lock file that expires unless it is renewed
"""
