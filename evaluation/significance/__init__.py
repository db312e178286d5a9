"""Is a difference between two models or two nights more than noise? Plain statistics over figures and samples.

Imports `evaluation.report` and `evaluation.samples`; numpy, never torch. Read verdicts.py first.

* verdicts.py: Figure, and better, worse or noise for many figures at one level alpha (z test, Holm)
* paired.py: two models on the same items, with intervals and p-values for every metric and average
* resampling.py: McNemar's test, sign flips and the bootstrap as plain functions
"""
