"""Files and locks of this machine. Imports nothing of infra but its errors.

Read locks.py first: what the artifact store, the results and the devices rely on is `flock`.
locks.py   flocked: a lock file; leased: what a host has only once, such as a GPU
disk.py    durable writes, hashes, free space, and a full or unwritable disk in one sentence
mounts.py  whether the locks of a (network) file system exclude other machines
"""
