"""Small random models of the kinds that the kernels run in one call."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from t2app.spectral import Deltas, SpectralModel, basis_of
from t2app.spectral.layer_paths import block_linear_paths


def decoder_model(kind: str, **changes) -> PreTrainedModel:
    """A model in float32, with norms and biases that are not trivial."""
    settings = {
        "vocab_size": 50,
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": None,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | changes)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adapted(model: PreTrainedModel) -> SpectralModel:
    """The model with all linear layers of its blocks adapted."""
    paths = block_linear_paths(model)
    return SpectralModel(model, {path: basis_of(model.get_submodule(path).weight) for path in paths})


def mixtures_of(model: SpectralModel) -> list[Deltas]:
    """Two mixtures, the second of which changes more."""
    generator = torch.Generator().manual_seed(0)
    return [
        {path: strength * torch.randn(layer.rank, generator=generator) for path, layer in model.layers.items()}
        for strength in (0.2, 0.4)
    ]
