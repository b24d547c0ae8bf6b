"""The files of a run: names, formats, atomic writes, and the lock."""
