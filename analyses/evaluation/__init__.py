"""How far estimates can be trusted: comparison with activation patching, rankings, and checks of a ranking."""
