"""What can go wrong with an expression, each with a name of its own."""


class ExpressionError(ValueError):
    """A model's call cannot be taken apart, or put together, as was asked."""


class QueryError(ExpressionError):
    """A query that is none, or that asks for what a selection cannot be."""


class NoMatch(ExpressionError):
    """A query or a rule that selects nothing."""


class ShapeMismatch(ExpressionError):
    """A replacement that gives something of another structure, shape or dtype than what it replaces."""
