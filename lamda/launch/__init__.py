"""What launchers and the command start: a task and a framework, handed to the training loop."""
