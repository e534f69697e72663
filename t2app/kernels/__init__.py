"""Decoding in bfloat16 on a CPU by kernels of our own, compiled on first use; without them torch does the same, slower.

`linear.py`, `attention.py` and `decoder.py` stand for torch's linear layers, transformers' attention and its decoders,
and call the kernels where those are the faster ones; `model.py` puts all three into a model. `build.py`, which compiles
them, needs torch alone, so that it can begin while transformers is imported.
"""
