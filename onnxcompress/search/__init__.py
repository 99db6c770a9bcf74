"""Many runs of recipes: a matrix of them (`sweep`), or a search for the best ones (`search`).

Trial (model, recipe) --compress, several at once--> Result --measure, nothing beside it--> figures
"""
