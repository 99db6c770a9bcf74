"""Analysis of a graph (operators, shapes, layers, blocks) and the edits that passes share."""
