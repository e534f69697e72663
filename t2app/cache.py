"""Where what is made once is kept: converted models, bases and compiled kernels."""

import os
from pathlib import Path

from huggingface_hub import constants


def cache_folder() -> Path:
    """The folder `t2app` of the Hugging Face cache; the variable T2_CACHE_DIR names another."""
    return Path(os.environ.get("T2_CACHE_DIR") or Path(constants.HF_HOME) / "t2app")
