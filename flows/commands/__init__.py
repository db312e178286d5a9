"""The commands of `slimline`, one module for each group of them."""
