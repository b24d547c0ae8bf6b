"""`lamda serve`: an OpenAI-compatible HTTP server around one model."""
