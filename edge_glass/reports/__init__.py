"""What a finished run shows: a table in the terminal, figures, and a page."""
