"""One file a question; each prints ours and the peer's side by side, in one run. See README.md."""
