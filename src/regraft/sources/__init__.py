"""Sources: from what somebody names, on this machine or beyond it, to one value that says what it is."""
