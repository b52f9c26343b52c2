"""Generation: greedy, sampling and beam search as one compiled loop over a preallocated cache."""

from .beam import Beams as Beams
from .generate import beam_search as beam_search, generate as generate
