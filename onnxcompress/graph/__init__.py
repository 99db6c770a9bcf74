"""What a graph says: its operators, shapes, layers and blocks, and the edits that passes share."""
