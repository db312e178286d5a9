"""Faults done to a small night, again and again: `make chaos`. A small form of it runs with the tests."""
