"""Works on any Equinox tree and knows no model."""

from .paths import (
    at as at,
    keypath_of as keypath_of,
    leaves_by_path as leaves_by_path,
    nodes as nodes,
    spell as spell,
)
from .select import Selection as Selection, select as select
