"""Where a method's input images come from: files, the network's own statistics, or nothing at all."""
