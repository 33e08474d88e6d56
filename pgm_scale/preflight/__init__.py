"""`pgm-scale doctor --cluster`: are these nodes fit for a run? Looked at by all ranks together, told by rank 0.

`run` does it: each rank looks at its own machine (`versions`, `host`, `gpu`, `shared_memory`), the ranks look
together at what they share (`disks`, `data`) and at each other (`clocks`, `matmul`, `network`), `judgement`
decides from the numbers of all who is bad, and `report` tells it.
"""
