"""An expression as one HTML page, whose levels unfold."""

import html
from dataclasses import dataclass
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
LINES, COLUMNS = 40, 100
HEAD = '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title></head>\n<body>\n'


def to_html(expression: Traced, path: str | Path | None = None, *, equations: bool = False) -> str:
    """The page, which is also written to `path`; see `Expression.to_html`."""
    treescope = _treescope()
    drawn = _Drawn(expression.root, expression.skeleton(), Options(equations=equations))
    with treescope.using_expansion_strategy(max_height=LINES, target_width=COLUMNS):
        body = treescope.render_to_html(drawn, compressed=False)
    title = " ".join(node.tag for node in expression.root.children if node.kind == "module") or "expression"
    page = HEAD.format(title=html.escape(title)) + body + "\n</body>\n</html>\n"
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _treescope() -> Any:
    try:
        import treescope
    except ImportError as error:
        raise ImportError("A page needs treescope: pip install 'eqx_transformers[expression]'") from error
    return treescope


@dataclass(frozen=True)
class _Drawn:
    """A node that treescope asks how it is drawn."""

    node: Node
    model: Any
    options: Options

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        parts = _treescope().rendering_parts
        inside = [_Drawn(node, self.model, self.options) for node in shown(self.node, self.options)]
        return parts.build_foldable_tree_node_from_children(
            prefix=self._line(parts),
            children=[subtree_renderer(child, path=None) for child in inside],
            suffix="",
            path=self.node.path or None,
            child_type_single_and_plural=("call", "calls"),
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
