"""How much work the demo does: minutes for a newcomer, longer for numbers that last, seconds for a test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertRecipe:
    """How an expert is trained.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences per step.
        learning_rate: The highest one.
        first_layer: The decoder layer from which on there is LoRA: the backward pass ends there.
    """

    steps: int
    batch_size: int
    learning_rate: float
    first_layer: int = 0


@dataclass(frozen=True)
class Recipe:
    """What the whole demo does.

    Attributes:
        expert: How each expert is trained.
        gate: Options of `weft train`. To start from the experts' losses takes minutes, from the texts' labels seconds.
        gate_steps: Training steps of the gate.
        eval_sequences: Sequences evaluated per data set.
        new_tokens: Tokens generated per prompt.
        bfloat16: Whether to compute in bfloat16 where the processor is fast at that.
    """

    expert: ExpertRecipe
    gate: dict[str, str]
    gate_steps: int
    eval_sequences: int
    new_tokens: int
    bfloat16: bool = True


# The experts begin where the gate reads, so that one pass is enough; weight 1.5, since they are trained so little.
SHORT = Recipe(
    expert=ExpertRecipe(steps=40, batch_size=1, learning_rate=2e-3, first_layer=10),
    gate={"gate-layer": "10", "gate-start": "labels", "global-scaling-weight": "1.5"},
    gate_steps=72,
    eval_sequences=8,
    new_tokens=40,
)
# A short scaling pass, the start from the experts' losses and twice the weight are what docs/evaluate.md found best.
FULL = Recipe(
    expert=ExpertRecipe(steps=32, batch_size=2, learning_rate=2e-3),
    gate={"scaling-pass-layers": "4", "gate-start": "losses", "global-scaling-weight": "2"},
    gate_steps=96,
    eval_sequences=10,
    new_tokens=40,
    bfloat16=False,
)
QUICK = Recipe(
    expert=ExpertRecipe(steps=2, batch_size=2, learning_rate=2e-3, first_layer=10),
    gate={"gate-layer": "10", "gate-start": "random"},
    gate_steps=2,
    eval_sequences=1,
    new_tokens=8,
)
