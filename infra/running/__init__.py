"""What runs now, in small files below SLIMLINE_HOME, so that another terminal can follow it without Prefect's server.

files.py  a file per flow run (which stages or cells, how it ended) and one per stage that is being made (how far)

Whoever works writes its own file, as a whole, and loses nothing but the view of it if it cannot. Imports infra only.
"""
