"""Pruning methods: the file name is the method's name in a spec. Importable without torch."""
