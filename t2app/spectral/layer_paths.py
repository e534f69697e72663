"""Which layers of a model there are to adapt, by their paths, and what the paths say of them."""

from collections.abc import Callable

from torch import nn


def block_linear_paths(
    model: nn.Module, keep: Callable[[str], bool] = lambda path: True, within: str = ""
) -> list[str]:
    """Paths of the linear layers inside the model's blocks (the longest list of modules), in the model's order.

    A layer whose output is several projections side by side (Phi-3's `qkv_proj`, GPT-NeoX's `query_key_value`) is one
    linear layer and has one z.

    Args:
        within: path of the part of the model whose blocks are meant; all of it by default.

    Raises:
        ValueError: the model has no list of blocks, no linear layer in it, or weights in it that are matrices of
            something else than a linear layer, such as those of a mixture of experts.
    """
    inside = f"{within}." if within else ""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(inside) and isinstance(module, nn.ModuleList)
    ]
    # A list inside a block, as of a mixture's experts, may be longer than the list of the blocks.
    outermost = [entry for entry in lists if not any(entry[0].startswith(f"{name}.") for name, _ in lists)]
    if not outermost:
        raise ValueError(f"{type(model).__name__} has no list of blocks to adapt")
    root, _ = max(outermost, key=lambda entry: len(entry[1]))
    _refuse_other_matrices(model, root)
    paths = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{root}.") and isinstance(module, nn.Linear) and keep(name)
    ]
    if not paths:
        raise ValueError(f"the blocks of {type(model).__name__} hold no linear layer to adapt")
    return paths


def _refuse_other_matrices(model: nn.Module, root: str) -> None:
    """Raises ValueError where the blocks hold matrices that no linear layer describes, naming one with its module."""
    others = [
        (f"{name}.{own_name}", parameter, module)
        for name, module in model.get_submodule(root).named_modules(prefix=root)
        if not isinstance(module, nn.Linear)
        for own_name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    if not others:
        return
    # Of a mixture of experts the experts say more than the router, which may come first.
    name, weight, module = max(others, key=lambda other: other[1].dim())
    shape = " × ".join(map(str, weight.shape))
    experts = ": a mixture of experts keeps its experts' matrices in one tensor, and" if weight.dim() > 2 else ";"
    raise ValueError(
        f"{type(model).__name__} cannot be adapted: its weight '{name}' ({shape}) belongs to {type(module).__name__}, "
        f"which is no torch.nn.Linear{experts} only linear layers are supported"
    )


def block_of(path: str) -> int:
    """The number of the block that a layer belongs to, by the name that the model gives it."""
    return next(int(part) for part in path.split(".") if part.isdecimal())


def place_in_blocks(path: str) -> str:
    """A layer's path from the list of blocks on: the same in a model and in one that has it for a part.

    A path that leads through no list is given back whole.
    """
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[max(numbers[0] - 1, 0) :]) if numbers else path


def is_mlp_path(path: str) -> bool:
    """Whether a layer belongs to a block's MLP, by the name that the model gives it."""
    return ".mlp." in path
