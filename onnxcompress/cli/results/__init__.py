"""What each pass shows at the terminal."""
