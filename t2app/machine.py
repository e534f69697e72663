"""The memory that this machine has for a model, and for what makes one faster."""

import psutil
import torch

# Of the host's free memory, for what works without it and is only faster with it.
_SPARE_SHARE = 0.1
# And of a GPU's memory that nothing is in.
_SPARE_GPU_SHARE = 0.5


def memory_bytes() -> int:
    """The memory that a model can have: of all GPUs, or of the host without one; what we hold now counts as free."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) for device in devices)


def gpu_can_spare(size: int, device: torch.device) -> bool:
    """Whether so many bytes of a GPU's memory may go to what would only be slower without them."""
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= _SPARE_GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + kept_by_torch)


def can_spare(size: int) -> bool:
    """Whether so many bytes of the host's memory may go to what would only be slower without them."""
    return size <= _SPARE_SHARE * psutil.virtual_memory().available
