"""What head methods cost: a model of true size with random weights, edited and not, in turn in one process."""
