"""What makes a trained model LaMDA: conversations, judged candidates, tools, chat."""
