"""Training an expert: settings, the training itself, its log; a LoRA in the same loop, and what settings are worth.

Each file is imported by who needs it: settings are known without torch.
"""
