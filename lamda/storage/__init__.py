"""What a run leaves on disk: names, formats, atomicity, and who may write."""
