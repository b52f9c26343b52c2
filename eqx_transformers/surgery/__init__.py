"""Works on any Equinox tree and knows no model."""

from .paths import leaves_by_path as leaves_by_path, spell as spell
