"""Every family of models that the probes work on, tiny, with what is to be seen in it. Names are those of its modules."""

from zoo.family import Family, main_output
from zoo.other_libraries import HUGGING_FACE, TIMM
from zoo.ours import TAME
from zoo.steps import attention_alone, run_steps, traces
from zoo.torch_nn import TORCH

__all__ = ["FAMILIES", "Family", "attention_alone", "main_output", "run_steps", "traces"]

FAMILIES = {family.name: family for family in [*TORCH, *TAME, *HUGGING_FACE, TIMM]}
