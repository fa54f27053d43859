"""Head-to-head measurements of every registered mixer on this machine."""
