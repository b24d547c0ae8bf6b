"""What `lamda doctor` looks at, one small function a check."""
