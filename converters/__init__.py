"""Checkpoints of the Hugging Face ecosystem, in and out. The one public door of this package."""

from . import peft as peft
from .arrays import from_arrays as from_arrays
from .convert import inspect as inspect, load as load
from .errors import (
    ConversionError as ConversionError,
    MalformedCheckpoint as MalformedCheckpoint,
    Mismatch as Mismatch,
    NotPushed as NotPushed,
    SourceNotFound as SourceNotFound,
    UnsafeCheckpoint as UnsafeCheckpoint,
    UnsupportedConfig as UnsupportedConfig,
)
from .export import export as export
from .listing import listing as listing
from .origin import Origin as Origin
from .push import push as push
from .report import Report as Report
from .scan import Scan as Scan, scan as scan
from .verify import Verification as Verification, verify as verify
