"""Side by side with peers, printed as tables of ratios. Not in the wheel."""
