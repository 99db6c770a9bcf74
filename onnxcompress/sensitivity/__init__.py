"""What each layer costs at given bits or sparsity, and what a budget makes of it."""
