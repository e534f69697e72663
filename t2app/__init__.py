"""Transformer²: a language model that adapts itself to the prompt by scaling its singular values (arXiv 2501.06252)."""
