"""The checks of `lamda doctor`, one small function each."""
