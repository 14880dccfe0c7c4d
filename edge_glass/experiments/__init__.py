"""What a config describes: data, task, and how the task is judged."""
