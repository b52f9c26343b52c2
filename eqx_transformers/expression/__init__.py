"""A model's call as a tree: trace, show, query, rewrite, evaluate, capture, patch, ablate."""

from .errors import (
    ExpressionError as ExpressionError,
    NoMatch as NoMatch,
    QueryError as QueryError,
    ShapeMismatch as ShapeMismatch,
)
from .expression import Expression as Expression, trace as trace
from .node import Node as Node
