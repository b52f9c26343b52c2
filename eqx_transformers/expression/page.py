"""An expression as one HTML page, whose levels unfold."""

import html
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..surgery.paths import at, is_array_like
from .node import Node
from .query import Traced, places
from .show import Options, head, shown, signature, told

# A page opens with about a screen of lines; the rest is folded.
LINES = 45
HEAD = '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title></head>\n<body>\n'


def to_html(expression: Traced, path: str | Path | None = None, *, equations: bool = False) -> str:
    """The page, which is also written to `path`; see `Expression.to_html`."""
    treescope = _treescope()
    options = Options(equations=equations)
    drawn = _Drawn(expression.root, expression.skeleton(), options, _levels(expression.root, options))
    body = treescope.render_to_html(drawn, compressed=False)
    title = " ".join(node.tag for node in expression.root.children if node.kind == "module") or "expression"
    page = HEAD.format(title=html.escape(title)) + body + "\n</body>\n</html>\n"
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _levels(root: Node, options: Options) -> int:
    """How many levels are open: all whose lines fit, and at least what was called."""
    level, lines, count = [root], 1, 0
    while level and lines <= LINES:
        level = [child for node in level for child in shown(node, options)]
        lines += len(level)
        count += 1
    return max(2, count - 1)


def _treescope() -> Any:
    try:
        import treescope
    except ImportError as error:
        raise ImportError("A page needs treescope: pip install 'eqx_transformers[expression]'") from error
    return treescope


@dataclass(frozen=True)
class _Drawn:
    """A node that treescope asks how it is drawn: open where `levels` are left."""

    node: Node
    model: Any
    options: Options
    levels: int

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        parts = _treescope().rendering_parts
        inside = [replace(self, node=node, levels=self.levels - 1) for node in shown(self.node, self.options)]
        if not inside:
            return parts.build_one_line_tree_node(self._line(parts), self.node.path or None)
        below = parts.indented_children([subtree_renderer(child, path=None) for child in inside])
        folded = parts.comment_color(parts.text(f" … {len(inside)} call{'s' * (len(inside) > 1)} inside"))
        return parts.build_custom_foldable_tree_node(
            label=self._line(parts),
            contents=parts.fold_condition(collapsed=folded, expanded=below),
            path=self.node.path or None,
            expand_state=parts.ExpandState.EXPANDED if self.levels > 0 else parts.ExpandState.COLLAPSED,
        )

    def _line(self, parts: Any) -> Any:
        said = told(self.node)
        count = _parameters(self.model, self.node)
        texts = [
            parts.text(head(self.node)),
            parts.comment_color(parts.text(f" [{' '.join(said)}]" if said else "")),
            parts.text(signature(self.node)),
            parts.comment_color(parts.text(f" {count:,} parameters" if count else "")),
        ]
        return parts.siblings(*texts)


def _parameters(model: Any, node: Node) -> int:
    """How many numbers the floating-point arrays of a module hold; of stacked blocks, those of all layers."""
    if node.kind != "module" or node.keypath is None:
        return 0
    leaves = jax.tree.leaves([at(model, keypath) for keypath in places(model, node.keypath)])
    return sum(prod(x.shape) for x in leaves if is_array_like(x) and jnp.issubdtype(x.dtype, jnp.inexact))
