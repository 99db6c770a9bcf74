"""How good a model is, beside another one and against limits."""
