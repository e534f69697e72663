"""A base model, from its name to one that is ready to be adapted.

`catalogue.py` has the models that are offered by name, and imports nothing that loads torch. `checkpoints.py` has a
model's files, out of a GGUF file by `gguf_conversion.py`; `weights.py` reads its weights one at a time, `bases.py` has
their singular vectors, and `model.py` puts all together. `vision.py` is what a model takes of a picture, `families.py`
checks what each architecture keeps. Each file is imported by who needs it.
"""
