"""An accelerator that is not there: its tensors compute on the CPU, refuse to mix with the CPU's, and count transfers.

* `device`   the tensors: a subclass that wraps CPU tensors, on PyTorch's device for backends in Python (PrivateUse1)
* `runtime`  streams, events and memory, as torch.cuda has them; without them nothing is computed beside anything

What a GPU would wait for is counted as a synchronisation: a blocking copy, a number read, a shape that depends on
values, an event or stream waited for by the host. It shows which way values go, not how long anything takes.
"""
