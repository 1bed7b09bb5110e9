"""How much memory a run takes, before it starts: a trial on a few tokens, counted by powers of batch and length, and what is free."""
