"""The output error of each layer at given bits or sparsity, and budgets allocated by it."""
