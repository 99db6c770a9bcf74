"""Show the results of each pass at the terminal."""
