"""What pruning really saves: a model of true size with random weights, pruned and not, in turn in one process."""
