"""Whether the long proofs run with their stated counts (`make test-full`), or with small ones."""

import os

FULL = os.environ.get("EQX_TRANSFORMERS_FULL") == "1"
