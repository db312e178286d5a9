"""The adapters: each stage opens artifacts, calls a library room, and writes one artifact. No mathematics in here."""
