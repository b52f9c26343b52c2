"""Adapters of the PEFT library, in and out: LoRA and its variants, and (IA)³."""

from .reading import adapted as adapted, load as load
from .writing import save as save
