"""Training an expert: settings, the training itself, its log; a LoRA in the same loop, and what settings are worth.

`lora.py` and `ablation.py` are imported by who needs them.
"""

from t2app.models import processes
from t2app.training.settings import ADVANTAGES, PRESETS, TrainingSettings
from t2app.training.trainer import Trainer, TrainingStep

__all__ = ["ADVANTAGES", "PRESETS", "Trainer", "TrainingSettings", "TrainingStep", "processes"]
