"""What a corpus holds, and what to leave out of it: `lamda data audit`, `lamda data clean`."""
