"""Everything that stands on a model while relevance is propagated: rules on HookPoints, readers of tensors, and the way back."""
