"""Cut channels out of a network: what each is worth, which widths are fast, and the repair of the rest."""
