"""One file per suite; its name is the suite's name in a spec. Importing a suite imports neither torch nor lm_eval."""
