"""From prefix tokens and text to more text: language models, and the recursion that solves puzzles too."""
