"""The book: notebooks, figures, pages and what they compute."""
