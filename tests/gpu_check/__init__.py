"""Whether a machine's GPU gives what its CPU gives, and how fast: `make gpu-check`, under eight minutes.

* `agreement`   tiny models of every family: plan, logits, perplexity and LoRA's losses; a killed walk; two processes
* `full_speed`  a random model of the shape of a 1B: seconds by part, bytes moved, peak memory, overlap

It writes gpu.json and prints a report that can be pasted into an issue. Without a GPU it runs small on the CPU, which
shows only that it runs.
"""
