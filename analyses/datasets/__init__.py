"""How an analysis runs over a data set: in batches, over processes, with a progress bar, from a checkpoint on."""
