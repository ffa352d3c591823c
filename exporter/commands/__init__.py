"""One file per command: options, a call, the printing of what it returned."""
