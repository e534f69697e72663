"""The settings of a training, and those that go together by name."""

from dataclasses import dataclass
from typing import NamedTuple

ADVANTAGES = ("group", "plain")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training; the defaults train the shipped experts on two CPU cores.

    Attributes:
        warm_start_steps: supervised steps on the examples' solutions, before the `steps` of REINFORCE.
        warm_start_learning_rate: of these; it falls to 0 over their last third.
        prompts, samples: prompts a step, and sampled answers to each.
        advantage: "group" (reward against the prompt's other samples) or "plain" (the paper's r ∈ {−1, +1}).
        kl_weight: λ of the paper's λ·KL(π_z ‖ π_base), per answer token.
        decay_steps: steps at the end over which the learning rate falls to 0 in a straight line.
        clip_norm: the gradient's largest norm, over all z together.
        validate_every, validation_limit: steps between validations, and how many examples one takes.
    """

    warm_start_steps: int = 140
    warm_start_learning_rate: float = 6e-3
    steps: int = 40
    prompts: int = 32
    samples: int = 8
    advantage: str = "group"
    learning_rate: float = 1e-3
    decay_steps: int = 40
    kl_weight: float = 0.0
    clip_norm: float = 1.0
    temperature: float = 1.0
    validate_every: int = 20
    validation_limit: int = 231
    seed: int = 0

    def __post_init__(self):
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"there is no advantage '{self.advantage}'; choose one of {', '.join(ADVANTAGES)}")
        if self.advantage == "group" and self.samples < 2:
            raise ValueError("a group advantage needs at least 2 samples a prompt; use --advantage plain for one")
        for name in ("prompts", "samples", "validate_every", "validation_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 was expected")
        for name in ("warm_start_steps", "steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more was expected")
        if self.warm_start_steps + self.steps == 0:
            raise ValueError("a training without any step was asked for")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; more than 0 was expected, for samples that differ")


class Preset(NamedTuple):
    """Settings that go together, and which linear layers they are for: a name of `cli.training.LAYERS`."""

    settings: TrainingSettings
    layers: str


PRESETS = {
    "default": Preset(TrainingSettings(), "all"),
    # The authors' code, as far as it can be had in these terms; z starts at 1 and is not passed through a sigmoid.
    "paper": Preset(
        TrainingSettings(
            warm_start_steps=0,
            prompts=256,
            samples=1,
            advantage="plain",
            learning_rate=2e-3,
            decay_steps=0,
            clip_norm=1e-3,
        ),
        "mlp",
    ),
}
