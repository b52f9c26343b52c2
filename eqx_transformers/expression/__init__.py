"""A model's call as a tree: trace, show, query, rewrite, evaluate, capture, patch, ablate."""

from .capture import ablate as ablate, capture as capture, patch as patch
from .compare import Difference as Difference, compare as compare
from .costs import Cost as Cost, costs as costs
from .errors import (
    ExpressionError as ExpressionError,
    NoMatch as NoMatch,
    QueryError as QueryError,
    ShapeMismatch as ShapeMismatch,
)
from .expression import Expression as Expression, trace as trace
from .node import Node as Node
from .query import Found as Found, find as find
from .rewrite import Rewritten as Rewritten, rewrite as rewrite
from .uses import Use as Use, direct_uses as direct_uses
