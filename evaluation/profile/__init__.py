"""Speed, memory and size of a model, alone or beside the dense one, and of a GGUF file.

Imports `evaluation.inference` and the root of the room. Read profiler.py first: its `profile` measures a whole grid.

* config.py, report.py: what is asked and what is reported, without torch
* timed_generation.py: one generation with a clock; interleaved.py: ratios of two models' times on a busy machine
* compilation.py: device, attention implementation and torch.compile
* sizes.py: parameters, multiply-accumulates, bytes of the KV cache
* peak_memory.py: what a generation needs and what there is; on CPU the peak, in a process of its own (child.py)
* llama_cpp.py: size of a GGUF file, and llama.cpp's speed with it
* device.py: name, power and utilisation of the device
"""
